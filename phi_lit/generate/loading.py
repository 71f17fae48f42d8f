"""From a checkpoint directory to a model that samples, checked before weights are read.

LitGPT's own functions open the directory, so what its `generate` takes is taken here, quantized
models included.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning import Fabric
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.prompts import Default, PromptStyle, has_prompt_style, load_prompt_style, prompt_styles
from litgpt.tokenizer import Tokenizer
from litgpt.utils import (
    check_valid_checkpoint_dir,
    extend_checkpoint_dir,
    get_default_supported_precision,
    load_checkpoint,
)

from phi_lit.checks import free_bytes, predicted_bytes
from phi_lit.errors import UserError, did_you_mean
from phi_lit.tensors import load_file

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""The precisions that a model samples in."""

WEIGHTS = "lit_model.pth"

_TAIL = 1 << 20
"""Bytes at the end of a weights file that hold the checksums of all tensors in it."""


@dataclass
class Checkpoint:
    """A checkpoint directory, opened but for its weights."""

    path: Path
    config: Config
    tokenizer: Tokenizer

    def prompt_style(self, name: str | None) -> PromptStyle:
        """Return LitGPT's prompt style of that name, or the checkpoint's own.

        Raises:
            UserError: LitGPT has no such style.
        """
        if name == "default":
            return Default()
        if name is not None:
            if name not in prompt_styles:
                near = did_you_mean(name, prompt_styles)
                raise UserError(
                    f"prompt_style {name!r} is unknown.{near} `default` takes prompts as they are."
                )
            return PromptStyle.from_name(name)
        if has_prompt_style(self.path):
            return load_prompt_style(self.path)
        return PromptStyle.from_config(self.config)

    def fingerprint(self) -> str:
        """Return a hash that differs where the weights or the architecture do."""
        weights = self.path / WEIGHTS
        digest = hashlib.sha256(str(weights.stat().st_size).encode())
        with open(weights, "rb") as file:
            file.seek(max(0, weights.stat().st_size - _TAIL))
            digest.update(file.read())
        digest.update((self.path / "model_config.yaml").read_bytes())
        return digest.hexdigest()


def open_checkpoint(checkpoint_dir: Path) -> Checkpoint:
    """Open a checkpoint directory, or a name below `checkpoints/`, and check that it is whole.

    Raises:
        UserError: there is none, or files are missing or cut short.
    """
    path = Path(extend_checkpoint_dir(checkpoint_dir))
    try:
        check_valid_checkpoint_dir(path, verbose=False, raise_error=True)
    except FileNotFoundError as error:
        raise UserError(f"{str(error).rstrip('.')}; `litgpt download` fetches models") from error
    try:
        config = Config.from_file(path / "model_config.yaml")
    except Exception as error:  # yaml's, and those of a dataclass with unknown fields
        reason = str(error).splitlines()[0]
        raise UserError(f"{path / 'model_config.yaml'} is no model config ({reason})") from error
    try:
        tokenizer = Tokenizer(path)
    except Exception as error:  # those of three libraries
        raise UserError(f"{path}: its tokenizer cannot be read ({error!r})") from error
    return Checkpoint(path, config, tokenizer)


def choose_precision(precision: str | None) -> str:
    """Return a precision: float32 on a CPU, LitGPT's choice on a GPU, or the one asked for.

    Raises:
        UserError: it is none that a model samples in.
    """
    if precision is None:
        if not torch.cuda.is_available():
            return "32-true"
        return get_default_supported_precision(training=False)
    if precision not in DTYPES:
        raise UserError(
            f"precision is {precision!r}.{did_you_mean(precision, DTYPES)} "
            f"Choose {', '.join(DTYPES)}."
        )
    return precision


def has_room_twice(checkpoint: Checkpoint, precision: str, quantize: str | None) -> bool:
    """Tell whether a second copy of the weights fits, laid out for faster products."""
    state = load_file(checkpoint.path / WEIGHTS)
    return 2 * predicted_bytes(state.get("model", state), quantize, precision) < free_bytes()


def load_model(checkpoint: Checkpoint, precision: str, quantize: str | None = None) -> GPT:
    """Build the model and read its weights, as `litgpt generate` does.

    Args:
        checkpoint: the opened directory.
        precision: one of `DTYPES`.
        quantize: `bnb.nf4` and so on, or None.

    Raises:
        UserError: the weights do not fit the config.
    """
    plugin = None
    if quantize is not None:
        from phi_lit.quantize import BitsandbytesPrecision

        plugin = BitsandbytesPrecision(quantize.removeprefix("bnb."), DTYPES[precision])
    fabric = Fabric(
        devices=1,
        precision=None if plugin else precision,  # type: ignore[arg-type]
        plugins=plugin,
    )
    with fabric.init_module(empty_init=True):
        model = GPT(checkpoint.config)
    wrapped = fabric.setup_module(model.eval())
    try:
        load_checkpoint(fabric, wrapped, checkpoint.path / WEIGHTS)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint.path / WEIGHTS} does not fit its config: {reason}") from error
    return wrapped.module
