"""What can be told before a model is loaded to generate: its weights, the memory, the prompt.

`checked` goes around LitGPT's `generate*` commands; chat and serve call `check_inference` and the
prompt's checks themselves. Everything that is wrong is gathered and said once, in one line.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from phi_lit.errors import UserError

TRUE_PRECISIONS = {"16-true": 2, "bf16-true": 2, "32-true": 4}
"""What a quantized model may compute in, with its bytes per number."""

BYTES_QUANTIZED = {
    "nf4": 1 / 2 + 4 / 64,  # a float32 scale per block of 64
    "fp4": 1 / 2 + 4 / 64,
    "nf4-dq": 1 / 2 + 1 / 64,  # a scale of one byte
    "fp4-dq": 1 / 2 + 1 / 64,
    "int8": 1.0,
    "int8-training": 2.0,
}
"""Bytes per weight of a quantized matrix."""

MARGIN = 1.1
"""Memory that must be free for each predicted byte: activations, the allocator's loss."""


def checked(main: Callable[..., None]) -> Callable[..., None]:
    """Return one of LitGPT's `generate*` commands with its input looked at first.

    Raises:
        UserError (when called): everything that cannot work, in one line.
    """

    @wraps(main)
    def run(*args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(main).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        for name in [name for name in given if name.endswith("checkpoint_dir")]:
            check_inference(
                given[name],
                quantize=given["quantize"],
                precision=given["precision"],
                prompt=given["prompt"],
                sys_prompt=given["sys_prompt"],
                max_new_tokens=given["max_new_tokens"],
            )
        main(*args, **kwargs)

    # any string may be typed: LitGPT's parser answers an unknown quantizer with twelve lines
    parameters = inspect.signature(main).parameters
    anything = parameters["quantize"].replace(annotation=str | None)
    run.__signature__ = inspect.signature(main).replace(  # type: ignore[attr-defined]
        parameters=[*(parameters | {"quantize": anything}).values()]
    )
    return run


def check_inference(
    checkpoint_dir: Path,
    *,
    quantize: str | None,
    precision: str | None,
    max_new_tokens: int | None,
    prompt: str | None = None,
    sys_prompt: str | None = None,
    accelerator: str = "auto",
) -> None:
    """Raise one `UserError` with everything that keeps a checkpoint from generating.

    A directory without weights is left to LitGPT, which may download them.

    Args:
        checkpoint_dir: what the user typed; below checkpoints/ too, as in LitGPT.
        quantize: bnb.MODE, or None.
        precision: Fabric's word for it, or None for LitGPT's choice.
        max_new_tokens: how long an answer may get; None for the whole context.
        prompt: what to answer, if it is known yet.
        sys_prompt: the system prompt that goes before it.
        accelerator: Fabric's word for where the model goes.
    """
    from litgpt.utils import extend_checkpoint_dir

    faults = [*_faults_of_quantizer(quantize, precision)]
    if max_new_tokens is not None and max_new_tokens < 1:
        faults.append(f"max_new_tokens is {max_new_tokens}; choose at least 1")
    directory = extend_checkpoint_dir(Path(checkpoint_dir))
    weights = directory / "lit_model.pth"
    if weights.is_file() and (directory / "model_config.yaml").is_file():
        from phi_lit.tensors import load_file

        state = load_file(weights)
        if prompt is not None:
            faults += _faults_of_prompt(directory, prompt, sys_prompt, max_new_tokens or 1)
        if not faults:
            faults += _faults_of_memory(state.get("model", state), quantize, precision, accelerator)
    if faults:
        raise UserError(f"{'; '.join(faults)}.")


def check_quantizer(quantize: str | None) -> None:
    """Raise a `UserError` if there is no such quantizer here: bnb.MODE with bitsandbytes."""
    if faults := _faults_of_quantizer(quantize, None):
        raise UserError(f"{'; '.join(faults)}.")


def _faults_of_quantizer(quantize: str | None, precision: str | None) -> list[str]:
    if quantize is None:
        return []
    from phi_lit.quantize import check_mode, import_bitsandbytes

    if not quantize.startswith("bnb."):
        return [f"--quantize {quantize} is unknown; bnb.nf4 is what most choose"]
    faults = []
    for check in (lambda: check_mode(quantize[4:]), import_bitsandbytes):
        try:
            check()
        except UserError as error:
            faults.append(str(error).rstrip("."))
    if precision is not None and precision not in TRUE_PRECISIONS:
        faults.append(
            f"--precision {precision} does not go with --quantize; "
            f"choose one of {', '.join(TRUE_PRECISIONS)}"
        )
    return faults


def _faults_of_prompt(
    directory: Path, prompt: str, sys_prompt: str | None, max_new_tokens: int
) -> list[str]:
    from litgpt.config import Config
    from litgpt.prompts import PromptStyle, has_prompt_style, load_prompt_style
    from litgpt.tokenizer import Tokenizer

    config = Config.from_file(directory / "model_config.yaml")
    styled = has_prompt_style(directory)
    style = load_prompt_style(directory) if styled else PromptStyle.from_config(config)
    if fault := fault_of_text(prompt) or fault_of_text(sys_prompt or "a", "the system prompt"):
        return [fault]
    tokens = Tokenizer(directory).encode(style.apply(prompt, sys_prompt=sys_prompt)).numel()
    fault = fault_of_length(tokens, max_new_tokens, config.block_size)
    return [fault] if fault else []


def fault_of_text(text: str, what: str = "the prompt") -> str | None:
    """Say what is wrong with a text that a user typed, or None."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return f"{what} is not valid UTF-8"
    return None if text.strip() else f"{what} is empty"


def fault_of_length(tokens: int, max_new_tokens: int, context: int) -> str | None:
    """Say that a prompt of so many tokens and its answer don't fit into the context, or None."""
    if tokens >= context:
        return f"the prompt has {tokens:,} tokens, but the model attends to {context:,} at most"
    if tokens + max_new_tokens > context:
        return (
            f"the prompt's {tokens:,} tokens and --max_new_tokens {max_new_tokens:,} are more than "
            f"the {context:,} that the model attends to; ask for at most {context - tokens:,} new"
        )
    return None


def _faults_of_memory(
    state: dict[str, Any], quantize: str | None, precision: str | None, accelerator: str
) -> list[str]:
    needed, free = predicted_bytes(state, quantize, precision), free_bytes(accelerator)
    if needed * MARGIN <= free:
        return []
    as_what = quantize or precision or "the default precision"
    smaller = predicted_bytes(state, "bnb.nf4", precision)
    advice = (
        f"; --quantize bnb.nf4 would need {smaller / 1e9:.1f} GB" if smaller < needed * 0.9 else ""
    )
    return [
        f"the weights need {needed / 1e9:.1f} GB as {as_what}, but {free / 1e9:.1f} GB are free"
        f"{advice}"
    ]


def predicted_bytes(state: dict[str, Any], quantize: str | None, precision: str | None) -> float:
    """Return the bytes that weights of these shapes take once loaded.

    Args:
        state: the checkpoint's tensors by name, in LitGPT's names.
        quantize: bnb.MODE, or None.
        precision: Fabric's word for it, or None for LitGPT's choice.
    """
    from litgpt.utils import get_default_supported_precision

    precision = precision or get_default_supported_precision(training=False)
    plain = TRUE_PRECISIONS.get(precision, 4)  # mixed precisions keep weights in float32
    packed = BYTES_QUANTIZED[quantize[4:]] if quantize else plain
    return sum(
        tensor.numel() * (packed if tensor.ndim > 1 and ".wte." not in name else plain)
        for name, tensor in state.items()
        if hasattr(tensor, "numel")
    )


def free_bytes(accelerator: str = "auto") -> float:
    """Return the memory that is free where the model goes: the GPU's, or what this process may.

    Args:
        accelerator: Fabric's word; auto is the GPU where there is one.
    """
    import torch

    if accelerator not in ("cpu", "mps") and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    import psutil

    return min(psutil.virtual_memory().available, _free_in_container())


def _free_in_container() -> float:
    """Return what a control group leaves, or infinity where there is none."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        reclaimable = int(cached.get("inactive_file", 0))
        return float("inf") if limit == "max" else int(limit) - used + reclaimable
    except (OSError, ValueError):
        return float("inf")
