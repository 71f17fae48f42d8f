"""Room for another token: a checkpoint with a longer embedding and head.

Orca's model is LLaMA with one id more, for padding (arXiv 2306.02707, section 4). New rows are the
mean of those that stand for ids: a new token's logit is then no larger than others', and nothing
that the model says changes but by that share (Hewitt, "Initializing New Word Embeddings for
Pretrained Language Models", 2021).
"""

import dataclasses
import shutil
from pathlib import Path

import torch
from litgpt.config import Config, find_multiple
from litgpt.utils import save_config
from torch import Tensor

from phi_lit.data.padding import PADDING, with_padding
from phi_lit.data.tokenizer import load_tokenizer
from phi_lit.errors import UserError
from phi_lit.files import staged_dir
from phi_lit.train.checkpoint import MODEL_FILE, weights_of
from phi_lit.train.checkpoint_dir import TOKENIZER_FILES, require_checkpoint

SIDE_FILES = ("prompt_style.yaml",)
"""What of a checkpoint stays as it is, beside weights, config and tokenizer."""

GROWING = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")
"""LitGPT's names of what has a row for every id; not every model has the last."""


def resize(
    checkpoint_dir: Path,
    out_dir: Path,
    tokenizer_dir: Path | None = None,
    pad_token: str | None = PADDING,
    multiple: int = 1,
) -> None:
    """Give a checkpoint a padding token, or another tokenizer's extra ids, and room for them.

    Args:
        checkpoint_dir: A LitGPT checkpoint directory.
        out_dir: Where to write the new checkpoint; every command of LitGPT opens it.
        tokenizer_dir: A tokenizer whose first ids are the checkpoint's; default: its own.
        pad_token: A padding token to add to the tokenizer, or null for none.
        multiple: Round the number of rows up to a multiple of this (64 is fast on GPUs; Orca has
            exactly 32,001).
    """
    if multiple < 1:
        raise UserError(f"multiple is {multiple}; choose at least 1.")
    require_checkpoint(checkpoint_dir)
    tokenizer_dir = tokenizer_dir or checkpoint_dir
    used = load_tokenizer(checkpoint_dir).vocab_size
    files = {
        name: (tokenizer_dir / name).read_bytes()
        for name in TOKENIZER_FILES
        if (tokenizer_dir / name).is_file()
    }
    ids = load_tokenizer(tokenizer_dir).vocab_size
    number = None
    if pad_token is not None:
        texts, number = with_padding(tokenizer_dir, pad_token)
        files |= {name: text.encode() for name, text in texts.items()}
        files.pop("tokenizer.model", None)  # it lacks the token, and tokenizer.json is read first
        ids = max(ids, number + 1)
    config = Config.from_file(checkpoint_dir / "model_config.yaml")
    room = config.padded_vocab_size or 0
    rows = max(room, find_multiple(ids, multiple))
    weights = {name: _grown(name, each, rows, used) for name, each in _weights(checkpoint_dir)}
    config = dataclasses.replace(config, vocab_size=ids, padded_vocab_size=rows)
    with staged_dir(out_dir) as directory:
        torch.save(weights, directory / MODEL_FILE)
        save_config(config, directory)
        for name, content in files.items():
            (directory / name).write_bytes(content)
        for name in SIDE_FILES:
            if (checkpoint_dir / name).is_file():
                shutil.copyfile(checkpoint_dir / name, directory / name)
    padding = "" if number is None else f", {pad_token} is id {number:,}"
    print(f"{out_dir}: {ids:,} ids{padding}; embedding and head {room:,} -> {rows:,} rows")


def _weights(checkpoint_dir: Path) -> list[tuple[str, Tensor]]:
    weights = weights_of(checkpoint_dir)
    missing = [name for name in GROWING[:2] if name not in weights]
    if missing:
        raise UserError(
            f"{checkpoint_dir / MODEL_FILE} has no {missing[0]}; it holds no whole LitGPT model."
        )
    return list(weights.items())


def _grown(name: str, tensor: Tensor, rows: int, used: int) -> Tensor:
    """Return a tensor with `rows` rows, the new ones being the mean of the first `used`."""
    if name not in GROWING or len(tensor) >= rows:
        return tensor.clone()  # off the memory map of a file that may be replaced
    mean = tensor[:used].double().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), *tensor.shape[1:])])
