"""`litgpt finetune_lora`, `finetune_adapter(_v2)`, `merge_lora` and QLoRA on our checkpoints."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import CLI
from litgpt.config import Config
from litgpt.model import GPT
from runs import RECIPE, losses, merged, quiet_environment, rows

from phi_lit.errors import UserError
from phi_lit.train.checkpoint import weights_of

LITGPT = str(Path(sys.executable).with_name("litgpt"))
FILES = {
    "lora": "lit_model.pth.lora",
    "adapter": "lit_model.pth.adapter",
    "adapter_v2": "lit_model.pth.adapter_v2",
}


@pytest.fixture(scope="session")
def base(recipe: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model of four layers (LitGPT's adapter begins at the third)."""
    from runs import pretrain

    out = tmp_path_factory.mktemp("base") / "out"
    config = {"name": "phi1-test", "n_layer": 4, "n_embd": 64, "n_head": 2, "block_size": 64}
    config |= {"vocab_size": 512, "padded_vocab_size": 512, "rotary_percentage": 0.5}
    config |= {"parallel_residual": True, "shared_attention_norm": True, "bias": True}
    config |= {"lm_head_bias": True, "mlp_class_name": "GptNeoxMLP", "gelu_approximate": "tanh"}
    pretrain(
        recipe(
            out, model_config=config, train={"max_steps": 30, "save_interval": 30},
            eval={"interval": 30},
        )
    )  # fmt: skip
    return out / "final"


@pytest.fixture(scope="session")
def experts(
    recipe: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A pretrained model with experts."""
    from runs import pretrain

    out = tmp_path_factory.mktemp("experts") / "out"
    short = {"max_steps": 20, "save_interval": 20}
    pretrain(recipe(out, model_name="phi1-test-moe", train=short, eval={"interval": 20}))
    return out / "final"


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "examples.json"
    words = ("return", "import", "class", "value")
    path.write_text(
        json.dumps(
            [
                {"instruction": f"say {words[n % 4]}", "input": "", "output": words[n % 4] * 2}
                for n in range(48)
            ]
        )
    )
    return path


@pytest.fixture
def finetune(base: Path, examples: Path, one_thread: None) -> Callable[..., Path]:
    """Runs `litgpt finetune_METHOD` in this process; returns the output directory."""

    def run(method: str, out_dir: Path, **changes: Any) -> Path:
        arguments = {key: value for key, value in RECIPE.items() if key != "model_name"}
        data = {
            "class_path": "litgpt.data.JSON",
            "init_args": {
                "json_path": str(examples), "val_split_fraction": 0.25, "mask_prompt": True,
                "num_workers": 0, "prompt_style": {"class_path": "litgpt.prompts.Default"},
            },
        }  # fmt: skip
        train = {"max_steps": 12, "attention_dropout": None, "residual_dropout": None}
        arguments = merged(
            arguments,
            {
                "checkpoint_dir": str(base), "out_dir": str(out_dir), "devices": 1, "data": data,
                "train": train,
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        )  # fmt: skip
        config = out_dir.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(merged(arguments, changes)))
        module = importlib.import_module(f"litgpt.finetune.{method}")
        CLI(module.setup, args=["--config", str(config)])
        return out_dir

    return run


@pytest.mark.parametrize("method", sorted(FILES))
def test_few_parameters_learn_the_answers_and_the_rest_stays(
    tmp_path: Path, finetune: Callable[..., Path], base: Path, method: str
) -> None:
    out = finetune(
        method, tmp_path / "out", eval={"initial_validation": True, "interval": 4},
        train={"keep_best": True},
    )  # fmt: skip
    held_out = [row["val_loss"] for row in rows(out) if "val_loss" in row]
    assert held_out[-1] < held_out[0]
    best = json.loads((out / "best" / "checkpoint.json").read_text())
    assert best["val_loss"] == min(held_out[1:])
    saved = torch.load(out / "final" / FILES[method], weights_only=True)["model"]
    assert not saved.keys() & weights_of(base).keys() or method == "adapter_v2"
    assert all(value.isfinite().all() for value in saved.values())
    moved = [name for name, value in saved.items() if "gating" in name or "lora_B" in name]
    assert all(saved[name].abs().max() > 0 for name in moved)
    assert moved


@pytest.mark.parametrize(("method", "pack"), [("lora", True), ("full", False)])
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn_from_it(
    tmp_path: Path, finetune: Callable[..., Path], base: Path, method: str, pack: bool
) -> None:
    teacher = {"teacher": str(base), "distill_weight": 1.0, "distill_temperature": 2.0}
    out = finetune(method, tmp_path / "out", train={**teacher, "pack": pack, "max_steps": 2})
    assert losses(out)[0] == pytest.approx(0.0, abs=1e-5)  # the divergence from itself
    other = finetune(method, tmp_path / "other", train={"pack": pack, "max_steps": 1})
    assert losses(other)[0] > 1.0


def test_our_examples_show_a_question_as_they_train(
    tmp_path: Path,
    finetune: Callable[..., Path],
    examples: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = {
        "class_path": "Instruct",
        "init_args": {
            "sources": str(examples), "data_dir": str(tmp_path / "data"), "val_fraction": 0.2,
            "prompt_style": "default",
        },
    }  # fmt: skip
    finetune("lora", tmp_path / "out", data=data)
    told = capsys.readouterr().err
    assert "--- sample after step 6" in told
    assert told.count("say ") >= 2


def test_the_adapters_prefix_trains(tmp_path: Path, finetune: Callable[..., Path]) -> None:
    """LitGPT keeps the first prefix's keys and values for good: its prefix never moves."""
    out = finetune("adapter", tmp_path / "out")
    first, last = (
        torch.load(out / name / FILES["adapter"], weights_only=True)["model"]
        for name in ("step-00000004", "step-00000012")
    )
    prefixes = [name for name in first if "adapter_wte" in name]
    assert len(prefixes) == 2
    assert all(not torch.equal(first[name], last[name]) for name in prefixes)


def test_merged_lora_gives_the_logits_of_the_adapted_model(
    tmp_path: Path, finetune: Callable[..., Path], base: Path
) -> None:
    """Also for the best checkpoint; and `litgpt merge_lora` on another one does the same."""
    from litgpt.lora import GPT as LoraGPT
    from litgpt.lora import Config as LoraConfig

    out = finetune("lora", tmp_path / "out", lora_mlp=True, train={"keep_best": True})
    ids = torch.arange(32)[None]

    def merged_logits(directory: Path) -> torch.Tensor:
        gpt = GPT(Config.from_file(directory / "model_config.yaml"))
        gpt.load_state_dict(weights_of(directory))
        return gpt(ids)

    adapted = LoraGPT(
        LoraConfig.from_file(
            base / "model_config.yaml", lora_r=8, lora_alpha=16, lora_query=True, lora_value=True,
            lora_mlp=True,
        )
    ).eval()  # fmt: skip
    lora = torch.load(out / "final" / FILES["lora"], weights_only=True)["model"]
    adapted.load_state_dict({**weights_of(base), **lora})
    torch.testing.assert_close(merged_logits(out / "final"), adapted(ids), rtol=1e-4, atol=1e-5)
    assert (out / "best" / "lit_model.pth").is_file()
    from litgpt.scripts.merge_lora import merge_lora

    merge_lora(out / "step-00000004")
    assert not torch.equal(merged_logits(out / "step-00000004"), merged_logits(out / "final"))
    with pytest.raises(UserError, match=r"has no lit_model\.pth\.lora"):
        merge_lora(base)


def test_lora_resumes_to_the_bit_and_only_on_its_own_base(
    tmp_path: Path, finetune: Callable[..., Path], base: Path
) -> None:
    whole = finetune("lora", tmp_path / "whole")
    part = finetune("lora", tmp_path / "part", train={"max_steps": 8, "lr_total_steps": 12})
    finetune("lora", part, train={"lr_total_steps": 12}, resume="auto")
    assert losses(part) == losses(whole)
    ours, theirs = (
        torch.load(out / "latest" / FILES["lora"], weights_only=True)["model"]
        for out in (part, whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    state = {name: tensor + 1e-3 for name, tensor in weights_of(base).items()}
    torch.save({"model": state}, other / "lit_model.pth")
    with pytest.raises(UserError, match=r"base was '\w+' and is '\w+'"):
        finetune("lora", part, checkpoint_dir=str(other), resume="auto")


def test_lora_makes_no_whole_logits_and_no_gradient_of_the_head(base: Path) -> None:
    from phi_lit.train.adaptation import LORA
    from phi_lit.train.model import LossModel

    gpt = LORA.build(LORA.configure(base, {"lora_r": 4, "lora_query": True}), base)
    model = LossModel(gpt)
    assert model.fused
    ids = torch.randint(0, 512, (2, 33))
    loss = model(ids[:, :-1], ids[:, 1:])
    plain = torch.nn.functional.cross_entropy(gpt(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, plain)
    loss.backward()
    assert {name for name, p in gpt.named_parameters() if p.grad is not None} == {
        f"transformer.h.{layer}.attn.qkv.lora_{side}" for layer in range(4) for side in "AB"
    }


@pytest.mark.parametrize("method", ["lora", "adapter_v2"])
def test_a_quantized_base_can_be_finetuned_on_a_cpu(
    tmp_path: Path, finetune: Callable[..., Path], method: str
) -> None:
    pytest.importorskip("bitsandbytes")
    out = finetune(
        method, tmp_path / "out", quantize="bnb.nf4",
        eval={"initial_validation": True, "interval": 12},
    )  # fmt: skip
    held_out = [row["val_loss"] for row in rows(out) if "val_loss" in row]
    assert held_out[-1] < held_out[0]
    if method == "lora":
        assert weights_of(out / "final")["lm_head.weight"].dtype == torch.float32
        half = finetune(
            method, tmp_path / "half", quantize="bnb.nf4", eval={"initial_validation": True},
            train={"max_steps": 8, "lr_total_steps": 12},
        )  # fmt: skip
        finetune(method, half, quantize="bnb.nf4", resume="auto", train={"lr_total_steps": 12})
        assert losses(half) == losses(out)


@pytest.mark.parametrize(
    ("method", "more"), [("lora", {"lora_mlp": True, "lora_r": 4}), ("adapter_v2", {})]
)
def test_models_with_experts_are_adapted_too(
    tmp_path: Path, finetune: Callable[..., Path], experts: Path, method: str, more: dict[str, Any]
) -> None:
    out = finetune(
        method, tmp_path / "out", checkpoint_dir=str(experts),
        eval={"initial_validation": True, "interval": 12}, **more,
    )  # fmt: skip
    held_out = [row["val_loss"] for row in rows(out) if "val_loss" in row]
    assert held_out[-1] < held_out[0]
    if method == "lora":
        gpt = GPT(Config.from_file(out / "final" / "model_config.yaml"))
        gpt.load_state_dict(weights_of(out / "final"))
        moved = {
            name
            for name, tensor in weights_of(out / "final").items()
            if not torch.equal(tensor, weights_of(experts)[name])
        }
        assert any("experts" in name for name in moved)
        assert not any("wte" in name or "norm" in name for name in moved)


@pytest.mark.parametrize("kind", ["CodeExercises", "Instruct"])
def test_our_examples_train_lora_packed(
    tmp_path: Path, finetune: Callable[..., Path], kind: str
) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"prompt": f"def f{n}(x):\n", "response": "    return x" + " + 1" * (n % 5)})
            for n in range(60)
        )
    )
    source = {"path": str(path), "prompt": "prompt", "answer": "response"}
    mode = {"mode": "sft"} if kind == "CodeExercises" else {"prompt_style": "default"}
    data = {
        "class_path": kind,
        "init_args": {"sources": [source], "data_dir": str(tmp_path / "data"), **mode},
    }
    out = finetune("lora", tmp_path / "out", data=data, train={"pack": True, "max_steps": 6})
    assert losses(out)[-1] < losses(out)[0]


def test_flat_arrays_of_code_train_lora_too(
    tmp_path: Path, finetune: Callable[..., Path], corpus: Path
) -> None:
    data = {
        "class_path": "CodeTextbook",
        "init_args": {
            "num_workers": 1, "val_fraction": 0.15, "sources": [str(corpus / "text")],
            "data_dir": str(corpus / "tokens"),
        },
    }  # fmt: skip
    out = finetune("lora", tmp_path / "out", data=data)
    assert losses(out)[-1] < losses(out)[0]


def test_samples_are_written_and_training_goes_on_with_dropout(
    tmp_path: Path, finetune: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A question of the data by default, as in LitGPT; masks of dropout after it are the same."""
    rare = finetune("lora", tmp_path / "rare", eval={"interval": 12})
    assert capsys.readouterr().err.count("--- sample after step") == 1
    often = finetune("lora", tmp_path / "often", eval={"interval": 4, "max_new_tokens": 5})
    told = capsys.readouterr().err
    assert told.count("--- sample after step") == 3
    assert told.count("say ") == 3
    assert losses(often) == losses(rare)


def test_what_cannot_be_is_told_in_one_line(
    tmp_path: Path, finetune: Callable[..., Path], base: Path
) -> None:
    def said(method: str, **changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            finetune(method, tmp_path / "out", **changes)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    text = said("adapter", train={"attention_dropout": 0.1, "tie_embeddings": True})
    assert "train.attention_dropout does not reach" in text
    assert "tie_embeddings" in text
    assert "LoRA is asked for nowhere" in said("lora", lora_query=False, lora_value=False)
    assert "does not exist" in said("lora", checkpoint_dir=str(tmp_path / "none"))
    assert "bnb.nf5" in said("lora", quantize="bnb.nf5")
    assert "precision bf16-mixed cannot be" in said(
        "lora", quantize="bnb.nf4", precision="bf16-mixed"
    )
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "checkpoint.json").write_text(
        json.dumps({"format": 1, "step": 1, "files": {}, "sharded": True})
    )
    (sharded / "shard-00000-of-00002.pth").touch()
    assert "phi-lit consolidate" in said("lora", checkpoint_dir=str(sharded))


# ------------------------------------------------------------------------------ LitGPT's own loops


def test_litgpts_own_loop_counts_rows_without_a_target_and_merges(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from litgpt.__main__ import main

    long = {"instruction": "one two three four five six seven eight nine " * 3, "input": ""}
    short = {"instruction": "a", "input": "", "output": "b c d"}
    path = tmp_path / "examples.json"
    path.write_text(json.dumps([{**long, "output": "lost"}, short] * 8))
    config = tmp_path / "config.yaml"
    data = {
        "json_path": str(path), "val_split_fraction": 0.4, "mask_prompt": True, "num_workers": 0,
        "prompt_style": {"class_path": "litgpt.prompts.Default"},
    }  # fmt: skip
    config.write_text(
        yaml.safe_dump(
            {
                "checkpoint_dir": str(base), "out_dir": str(tmp_path / "out"),
                "precision": "32-true",
                "data": {"class_path": "litgpt.data.JSON", "init_args": data},
                "train": {
                    "global_batch_size": 2, "max_steps": 2, "epochs": 1, "lr_warmup_steps": 1,
                    "max_seq_length": 24,
                },
                "eval": {"max_new_tokens": 4, "interval": 1, "max_iters": 20},
            }
        )
    )  # fmt: skip
    words = ["litgpt", "finetune_lora", "--config", str(config)]
    monkeypatch.setattr("sys.argv", words)
    main()
    told = capsys.readouterr()
    assert "8 of 16 examples have no target left" in told.err
    assert "validation batches have no target" in told.out
    assert "nan" not in told.out
    assert not (tmp_path / "out" / "metrics.jsonl").exists(), "that was to be LitGPT's own loop"
    assert (tmp_path / "out" / "final" / "lit_model.pth").is_file()


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "adapter_v2"])
def test_litgpts_examples_leave_the_model_training(base: Path, method: str) -> None:
    from types import SimpleNamespace

    from lightning import Fabric
    from litgpt.prompts import Default
    from litgpt.tokenizer import Tokenizer

    module = importlib.import_module(f"litgpt.finetune.{method}")
    fabric = Fabric(devices=1, accelerator="cpu")
    model = fabric.setup_module(
        module.GPT(module.Config.from_file(base / "model_config.yaml"))
    ).train()
    model.max_seq_length = 16
    rows_of = SimpleNamespace(data=[{"instruction": "word " * 30}])
    data = SimpleNamespace(prompt_style=Default(), test_dataset=rows_of, train_dataset=rows_of)
    eval_args = SimpleNamespace(evaluate_example="first", max_new_tokens=4)
    module.generate_example(fabric, model, Tokenizer(base), eval_args, data)
    assert model.training
    assert model.mask_cache is None


# ----------------------------------------------------------------------------------- as a user does


def test_a_finetuned_checkpoint_generates_from_the_command_line(
    tmp_path: Path, finetune: Callable[..., Path], base: Path
) -> None:
    """LitGPT's generate_adapter reads our base and our adapter, and needs no `### Response:`."""
    out = finetune("adapter", tmp_path / "out")
    done = subprocess.run(
        [
            LITGPT, "generate_adapter", str(base), "--prompt", "say return",
            "--adapter_path", str(out / "final" / FILES["adapter"]), "--max_new_tokens", "8",
            "--precision", "32-true",
        ],
        env=quiet_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "say return" in done.stdout


@pytest.mark.slow
def test_two_sharded_ranks_adapt_as_one(
    tmp_path: Path, finetune: Callable[..., Path], base: Path
) -> None:
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}}
    one = finetune(
        "lora", tmp_path / "one", optimizer=sgd, lora_dropout=0.0, train={"micro_batch_size": 2}
    )
    arguments = yaml.safe_load((tmp_path / "one.yaml").read_text())
    arguments |= {"out_dir": str(tmp_path / "two"), "devices": 2, "strategy": "fsdp"}
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(arguments))
    done = subprocess.run(
        [LITGPT, "finetune_lora", "--config", str(config)],
        env=quiet_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=1e-5)
    ours, theirs = (weights_of(tmp_path / name / "final") for name in ("two", "one"))
    assert all(torch.allclose(ours[name], theirs[name], atol=2e-5) for name in theirs)
