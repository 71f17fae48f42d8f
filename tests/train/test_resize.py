"""A checkpoint with room for another token: LLaMA's 32,000 ids and [[PAD]], opened by LitGPT."""

import shutil
from pathlib import Path

import litgpt.finetune.full
import pytest
import torch
from litgpt import GPT, Config
from litgpt.tokenizer import Tokenizer
from litgpt.utils import save_config

from phi_lit.data.padding import padding_id
from phi_lit.errors import UserError
from phi_lit.train.checkpoint_dir import find_checkpoint_dir, require_checkpoint
from phi_lit.train.resize import resize


@pytest.fixture(scope="session")
def llama_checkpoint_dir(tmp_path_factory, llama_tokenizer_dir: Path) -> Path:
    """A tiny model of LLaMA's kind, with LLaMA's vocabulary and random weights."""
    directory = tmp_path_factory.mktemp("llama") / "checkpoint"
    shutil.copytree(llama_tokenizer_dir, directory)
    config = Config.from_name(
        "Llama-2-7b-hf", n_layer=1, n_embd=16, n_head=2, intermediate_size=32, block_size=128
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(GPT(config).state_dict(), directory / "lit_model.pth")
    save_config(config, directory)
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "lit_model.pth", weights_only=True)


def test_llama_with_padding_has_32001_rows_and_says_the_same(llama_checkpoint_dir, tmp_path):
    out = tmp_path / "padded"
    resize(llama_checkpoint_dir, out)
    config = Config.from_file(out / "model_config.yaml")
    assert (config.vocab_size, config.padded_vocab_size) == (32_001, 32_001)
    before, after = weights(llama_checkpoint_dir), weights(out)
    assert before.keys() == after.keys()
    for name, old in before.items():
        assert torch.equal(after[name][: len(old)], old), name
        if len(after[name]) > len(old):
            torch.testing.assert_close(after[name][32_000:], old.mean(0, keepdim=True))
    old, new = GPT(Config.from_file(llama_checkpoint_dir / "model_config.yaml")), GPT(config)
    old.load_state_dict(before)
    new.load_state_dict(after)
    tokenizer = Tokenizer(out)
    ids = tokenizer.encode("def f(x): return 1234")[None]
    logits = new(ids)
    assert torch.equal(logits[..., :32_000], old(ids))
    assert padding_id(tokenizer) == 32_000
    assert (logits[..., 32_000] < logits.max(-1).values).all(), "a mean row never wins"


def test_rows_are_rounded_up_where_asked_and_never_cut(llama_checkpoint_dir, tmp_path):
    resize(llama_checkpoint_dir, tmp_path / "fast", multiple=64)
    assert weights(tmp_path / "fast")["lm_head.weight"].shape == (32_064, 16)
    resize(tmp_path / "fast", tmp_path / "again")
    assert weights(tmp_path / "again")["lm_head.weight"].shape == (32_064, 16)


def test_a_head_with_bias_grows_too_and_padding_can_take_spare_rows(tiny_checkpoint_dir, tmp_path):
    resize(tiny_checkpoint_dir, tmp_path / "spare")  # 257 ids, 512 rows
    assert weights(tmp_path / "spare")["lm_head.bias"].shape == (512,)
    assert Config.from_file(tmp_path / "spare" / "model_config.yaml").vocab_size == 258
    resize(tiny_checkpoint_dir, tmp_path / "more", multiple=1000)
    grown, old = weights(tmp_path / "more"), weights(tiny_checkpoint_dir)
    assert grown["lm_head.bias"].shape == (1000,)
    torch.testing.assert_close(grown["lm_head.bias"][999], old["lm_head.bias"][:257].mean())


def test_litgpts_commands_open_it_and_orcas_stages_train_on_it(
    llama_checkpoint_dir, tmp_path, capsys, one_thread
):
    from litgpt.args import EvalArgs
    from litgpt.generate.base import main as generate

    from phi_lit.data.instruct import Instruct
    from phi_lit.train.args import TrainArgs

    resize(llama_checkpoint_dir, tmp_path / "padded")
    litgpt.finetune.full.setup(
        tmp_path / "padded",
        out_dir=tmp_path / "orca",
        precision="32-true",
        data=Instruct(data_dir=tmp_path / "data", sources={"stdlib": True, "max_documents": 60},
                      val_fraction=0.1),
        train=TrainArgs(
            global_batch_size=2, micro_batch_size=1, max_steps=2, lr_warmup_steps=1, epochs=4,
            max_seq_length=128, pack=True, save_interval=2, compile="off",
        ),
        eval=EvalArgs(interval=2, max_iters=2),
    )  # fmt: skip
    said = capsys.readouterr()
    assert "rows of 128:" in said.out
    assert "ids to learn" in said.err
    final = tmp_path / "orca" / "final"
    require_checkpoint(final)
    assert "FreeWilly2" in (final / "prompt_style.yaml").read_text()
    generate(final, prompt="Say it.", max_new_tokens=3, precision="32-true")
    assert "### User:\nSay it." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "does not exist"),
        (lambda d: d.mkdir(), r"it lacks lit_model\.pth, model_config\.yaml, tokenizer\.json"),
        (lambda d: (d / "final").mkdir(parents=True) or (d / "final/lit_model.pth").touch(),
         r"Did you mean .*final\?"),
        (lambda d: d.mkdir() or (d / "shard-0.pth").touch(), "phi-lit consolidate"),
    ],
)  # fmt: skip
def test_a_wrong_checkpoint_directory_is_told_in_one_line(tmp_path, make, message):
    directory = tmp_path / "wrong"
    make(directory)
    with pytest.raises(UserError, match=message) as caught:
        find_checkpoint_dir(directory)
    assert "\n" not in str(caught.value)
