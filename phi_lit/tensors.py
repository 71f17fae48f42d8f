"""Reading files of tensors without running code from them, in every LitGPT command.

A `.pth` file is a pickle, and unpickling calls whatever the file names. LitGPT's `lazy_load` (which
generate, chat, serve, finetuning and the converters read with) and its `LLM` put no limit on that;
here every such file goes through torch's restricted unpickler, memory-mapped, and what is not plain
tensors is refused in one line. The seams are in `seam_table.py`.
"""

from pathlib import Path
from typing import Any

import torch

from phi_lit.errors import UserError


def load_file(path: Path) -> Any:
    """Read a file of tensors, memory-mapped; never runs code from it.

    Raises:
        UserError: the file is missing, cut short, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: this checkpoint is not whole")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Say in one clause what torch says in a paragraph."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    told = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), None)
    if told is not None:
        return (
            f"it holds more than tensors, and code from a file is never run ({told.rstrip('.')}). "
            "Ask its maker for safetensors, or for a file saved from state_dict() alone"
        )
    return f"it is cut short, or not a file of tensors ({lines[0].partition('.')[0]})"


def lazy_load(filename: Path | str) -> Any:
    """Replace LitGPT's `lazy_load`: as lazy (memory-mapped), and nothing in the file is called.

    Raises:
        FileNotFoundError: there is no such file (as in LitGPT).
        UserError: it is cut short, or holds more than tensors and plain values.
    """
    if not Path(filename).is_file():
        raise FileNotFoundError(f"Path {str(filename)!r} does not exist or is not a file.")
    return load_file(Path(filename))


def check_valid_checkpoint_dir(
    checkpoint_dir: Path,
    model_filename: str = "lit_model.pth",
    verbose: bool = True,
    raise_error: bool = False,
    ignore_tokenizer_files: bool = False,
) -> None:
    """Replace LitGPT's check of a checkpoint directory: also open the weights, before any model.

    Raises:
        UserError: the weights are cut short, or hold more than tensors and plain values.
    """
    from phi_lit.seams import stock

    stock("litgpt.utils.check_valid_checkpoint_dir")(
        checkpoint_dir, model_filename, verbose, raise_error, ignore_tokenizer_files
    )
    load_file(checkpoint_dir / model_filename)


def fsdp_load_checkpoint(
    self: Any, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
) -> dict[str, Any]:
    """Replace `FSDPStrategy.load_checkpoint`: Lightning unpickles a full checkpoint unrestricted.

    Raises:
        UserError: the file is cut short, or holds more than tensors and plain values.
    """
    from phi_lit.seams import stock

    if Path(path).is_file():
        load_file(Path(path))
    return stock("litgpt.utils.FSDPStrategy.load_checkpoint")(
        self, path, state, strict, weights_only
    )
