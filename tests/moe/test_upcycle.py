"""A dense checkpoint becomes experts: the same logits at step 0, other experts later."""

import shutil
from pathlib import Path

import pytest
import torch
from litgpt import GPT, Config
from litgpt.utils import save_config

from phi_lit.errors import UserError
from phi_lit.upcycle import upcycle

SMALL = dict(n_layer=3, n_embd=32, n_head=2, block_size=32, vocab_size=64, padded_vocab_size=64)
DENSE = {
    "phi": dict(name="phi-2", intermediate_size=48, **SMALL),
    "llama": dict(
        name="Llama-3.2-1B", n_query_groups=1, intermediate_size=48, rope_adjustments=None, **SMALL
    ),
}


@pytest.fixture(params=DENSE)
def dense(request: pytest.FixtureRequest, tmp_path: Path, tiny_tokenizer_dir: Path) -> Path:
    """A dense checkpoint with a tokenizer, whose MLPs say something (std 0.2, biases too)."""
    return make_checkpoint(Config.from_name(**DENSE[request.param]), tmp_path, tiny_tokenizer_dir)


def make_checkpoint(config: Config, tmp_path: Path, tokenizer_dir: Path) -> Path:
    directory = tmp_path / "dense"
    shutil.copytree(tokenizer_dir, directory)
    (directory / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Default\n")
    torch.manual_seed(0)
    gpt = GPT(config)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    torch.save(gpt.state_dict(), directory / "lit_model.pth")
    save_config(config, directory)
    return directory


def opened(checkpoint: Path) -> GPT:
    gpt = GPT(Config.from_file(checkpoint / "model_config.yaml"))
    gpt.load_state_dict(torch.load(checkpoint / "lit_model.pth", weights_only=True))
    return gpt.eval()


@torch.no_grad()
def logits(checkpoint: Path) -> torch.Tensor:
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
    return opened(checkpoint)(ids)


@pytest.mark.parametrize(
    "options",
    [
        {},  # 8 experts of half the MLP's width, 2 per token: groups of two
        {"moe_intermediate_size": 48},  # whole copies
        {"moe_intermediate_size": 24, "n_expert_per_token": 4},  # two groups of two per token
        {"n_expert": 4, "n_expert_per_token": 4},  # every expert, each a quarter
        {"every": 2},
        {"every": 3, "moe_intermediate_size": 48, "n_expert": 3},
    ],
    ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()) or "halves",
)
def test_experts_instead_of_the_mlp_answer_as_the_mlp_did(
    dense: Path, tmp_path: Path, options: dict
) -> None:
    upcycle(dense, tmp_path / "moe", **options)
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=2e-5, atol=2e-5)
    blocks = opened(tmp_path / "moe").transformer.h
    with_experts = [hasattr(block.mlp, "experts") for block in blocks]
    every = options.get("every", 1)
    assert with_experts == [(number + 1) % every == 0 for number in range(3)]


def test_experts_after_the_mlp_add_nothing_at_first(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe", placement="after", n_expert=5, moe_intermediate_size=7)
    assert torch.equal(logits(tmp_path / "moe"), logits(dense))  # to the bit
    for block in opened(tmp_path / "moe").transformer.h:
        assert block.moe.experts.fc.weight.std() > 0, "an expert that is all zero would never learn"


def test_noise_parts_the_copies_and_is_said(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upcycle(dense, tmp_path / "same", moe_intermediate_size=48)
    assert "logits are the dense model's, up to the rounding" in capsys.readouterr().out
    upcycle(dense, tmp_path / "noisy", moe_intermediate_size=48, noise=0.1)
    assert "logits differ from the dense model's: noise of 0.1" in capsys.readouterr().out
    same, noisy = (opened(tmp_path / name).transformer.h[1].mlp for name in ("same", "noisy"))
    assert torch.equal(same.experts.fc.weight[0], same.experts.fc.weight[1])
    difference = (noisy.experts.fc.weight - same.experts.fc.weight).detach()
    assert float(difference.std() / same.experts.fc.weight.detach().std()) == pytest.approx(
        0.1, rel=0.05
    )
    assert not torch.equal(difference[0], difference[1])


def test_a_shared_expert_starts_silent(dense: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    from phi_lit.upcycle import grown, target_config

    config = Config.from_file(dense / "model_config.yaml")
    shared = target_config(config, None, {"n_shared_expert": 1}, {})
    gpt = grown(config, shared, torch.load(dense / "lit_model.pth"), noise=0.0, seed=1).eval()
    ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(gpt(ids), logits(dense), rtol=2e-5, atol=2e-5)
    assert gpt.transformer.h[0].mlp.shared_experts.fc.weight.std() > 0


def test_what_goes_along_and_what_does_not(dense: Path, tmp_path: Path) -> None:
    (dense / "training_state.pth").write_bytes(b"of another model")
    upcycle(dense, tmp_path / "moe")
    assert sorted(file.name for file in (tmp_path / "moe").iterdir()) == [
        "lit_model.pth", "model_config.yaml", "prompt_style.yaml", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_half_precision_stays(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    dense = make_checkpoint(Config.from_name(**DENSE["phi"]), tmp_path, tiny_tokenizer_dir)
    state = torch.load(dense / "lit_model.pth")
    torch.save({k: v.bfloat16() for k, v in state.items()}, dense / "lit_model.pth")
    upcycle(dense, tmp_path / "moe")
    state = torch.load(tmp_path / "moe" / "lit_model.pth")
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in state.items()}
    assert kinds.pop("selection_bias") == torch.float32  # its steps are too small for bf16
    assert set(kinds.values()) == {torch.bfloat16}


def test_a_model_by_name(tiny_checkpoint_dir: Path, tmp_path: Path) -> None:
    """phi1-test-moe holds experts of half the width of phi1-test's MLP."""
    for name, exact in (("phi1-test-moe", False), ("phi1-test-moe-after", True)):
        upcycle(tiny_checkpoint_dir, tmp_path / name, model_name=name)
        before, after = logits(tiny_checkpoint_dir), logits(tmp_path / name)
        torch.testing.assert_close(after, before, rtol=2e-5, atol=2e-5)
        assert torch.equal(after, before) or not exact
        found, wanted = Config.from_file(tmp_path / name / "model_config.yaml"), name
        assert found == Config.from_name(wanted)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"model_name": "phi1-nano-moe"}, r"n_layer is 3 in .* and 6 in phi1-nano-moe"),
        ({"model_name": "phi1-nano-moe"}, "padded_vocab_size is 64 in .* and 4096 in"),
        ({"model_name": "phi1-nano"}, "without experts of phi_lit; phi1-nano-moe"),
        ({"moe_intermediate_size": 32}, "is 32: 8 experts of that width.* can be 48 or 24"),
        ({"n_expert": 9}, "24: 9 experts of that width, 2 per token, .* it can be 48"),
        ({"n_expert_per_token": 1}, "a softmax over all experts and do not add up to one"),
        ({"n_expert_per_token": 9}, "n_expert_per_token is 9, but the model has 8 experts"),
        ({"noise": -0.5}, "noise is -0.5; it is a share"),
        ({"every": 4}, "every is 4; choose 1 to 3"),
    ],
)
def test_what_cannot_be_upcycled_is_told_in_one_line(
    options: dict, fault: str, tmp_path: Path, tiny_tokenizer_dir: Path
) -> None:
    dense = make_checkpoint(Config.from_name(**DENSE["phi"]), tmp_path, tiny_tokenizer_dir)
    with pytest.raises(ValueError, match=fault) as error:
        upcycle(dense, tmp_path / "moe", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "moe").exists()


def test_weights_of_another_model_than_the_config_beside_them_are_told(
    dense: Path, tmp_path: Path
) -> None:
    state = torch.load(dense / "lit_model.pth")
    state["transformer.ln_f.weight"] = torch.ones(7)
    torch.save(state, dense / "lit_model.pth")
    with pytest.raises(UserError, match=r"transformer.ln_f.weight differs \(1 such tensors\)"):
        upcycle(dense, tmp_path / "moe")


def test_experts_are_not_upcycled_again(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe")
    with pytest.raises(UserError, match="has 8 experts per layer already"):
        upcycle(tmp_path / "moe", tmp_path / "again")
    with pytest.raises(UserError, match=r"out_dir .*moe exists; choose a new one"):
        upcycle(dense, tmp_path / "moe")


def test_upcycled_experts_learn_and_part_without_noise(
    tiny_checkpoint_dir: Path, tmp_path: Path, one_thread: None
) -> None:
    """Both placements, from a trained model's place: the loss falls, and no two experts agree."""
    from phi_lit.train.model import LossModel

    ids = torch.randint(0, 64, (8, 33), generator=torch.Generator().manual_seed(2))
    for name in ("phi1-test-moe", "phi1-test-moe-after"):
        upcycle(tiny_checkpoint_dir, tmp_path / name, model_name=name)
        gpt = opened(tmp_path / name).train()
        model = LossModel(gpt)
        optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
        losses = []
        for _ in range(12):
            loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.5
        block = gpt.transformer.h[0]
        experts = (block.moe if hasattr(block, "moe") else block.mlp).experts
        for stack in (experts.fc.weight, experts.proj.weight):
            for one in range(4):
                for other in range(one):
                    assert (stack[one] - stack[other]).abs().max() > 1e-3


def test_the_command_says_what_it_made(
    tiny_checkpoint_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from phi_lit.__main__ import main

    out = str(tmp_path / "moe")
    words = ["upcycle", str(tiny_checkpoint_dir), out, "--model_name", "phi1-test-moe"]
    monkeypatch.setattr("sys.argv", ["phi-lit", *words])
    assert main() == 0
    said = capsys.readouterr().out
    state = torch.load(f"{out}/lit_model.pth")
    size = sum(t.numel() for name, t in state.items() if not name.endswith("selection_bias"))
    assert f"{out}: phi1-test-moe, {size:,} parameters, of which a token visits" in said
    assert f"litgpt pretrain phi1-test-moe --initial_checkpoint_dir {out} --train" in said
    upcycle(tiny_checkpoint_dir, tmp_path / "own", n_expert=6)  # a model without a name
    assert f"train on: litgpt finetune_full {tmp_path / 'own'} " in capsys.readouterr().out
