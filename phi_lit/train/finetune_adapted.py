"""`litgpt finetune_lora`, `finetune_adapter` and `finetune_adapter_v2`, extended.

All three of LitGPT's `setup` functions get the same: our training options, and our loop where one
of them, or data of ours, is used; anything else runs in LitGPT's own loop. So there is one function
here, made around each of them (see `wraps` in `seam_table.py`).
"""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import Any, Literal

from litgpt.args import TrainArgs as LitGPTTrainArgs

from phi_lit.checks import check_quantizer
from phi_lit.train.args import Sharding, Strategy, TrainArgs
from phi_lit.train.pretrain import options_are_ours, run_stock

ADDED: dict[str, tuple[Any, Any, str]] = {
    "resume": (
        bool | Literal["auto"] | Path,
        False,
        "Path to a checkpoint directory to resume from, or ``True`` or ``'auto'`` for the newest "
        "in ``out_dir`` (``'auto'`` does not insist on there being one).",
    ),
    "strategy": (
        Strategy | None,
        None,
        "How several devices share the work: auto (fsdp where there are several), ddp or fsdp.",
    ),
    "sharding": (Sharding | None, None, "What is sharded: full, grad_op or hybrid (fsdp)."),
    "cpu_offload": (bool, False, "Keep sharded parameters and optimizer state in host memory."),
}
"""What our commands take beside LitGPT's parameters: type, default, help."""


def extended(setup: Callable[..., None]) -> Callable[..., None]:
    """Return LitGPT's `setup` with our options, and our loop where they are used."""
    signature = _extended_signature(setup)

    @wraps(setup)
    def run(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        check_quantizer(arguments.get("quantize"))
        if options_are_ours(arguments) or any(arguments[name] for name in _added(setup)):
            _launch(setup.__module__, arguments)
        else:
            run_stock(setup, arguments)

    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {name: each.annotation for name, each in signature.parameters.items()}
    helps = "".join(f"\n        {name}: {ADDED[name][2]}" for name in _added(setup))
    run.__doc__ = f"{(setup.__doc__ or '').rstrip()}{helps}\n"
    return run


def _extended_signature(setup: Callable[..., None]) -> inspect.Signature:
    found = inspect.signature(setup)
    changed: dict[str, dict[str, Any]] = {"train": {"annotation": TrainArgs}}
    changed["train"]["default"] = _extended_train(found.parameters["train"].default)
    # any string may be typed: LitGPT's parser answers an unknown quantizer with twelve lines
    changed["quantize"] = {"annotation": str | None}
    parameters = [each.replace(**changed.get(name, {})) for name, each in found.parameters.items()]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters += [
        inspect.Parameter(name, kind, annotation=annotation, default=default)
        for name, (annotation, default, _) in _added(setup).items()
    ]
    return found.replace(parameters=parameters)


def _added(setup: Callable[..., None]) -> dict[str, tuple[Any, Any, str]]:
    """Return what LitGPT's `setup` lacks (one of the three can resume)."""
    known = inspect.signature(setup).parameters
    return {name: added for name, added in ADDED.items() if name not in known}


def _extended_train(stock: LitGPTTrainArgs) -> TrainArgs:
    """Return our dataclass with LitGPT's defaults of this command."""
    return TrainArgs(**{field.name: getattr(stock, field.name) for field in fields(stock)})


def _launch(module: str, arguments: dict[str, Any]) -> None:
    """Run the command in our loop."""
    from litgpt.prompts import Default

    from phi_lit.train.adaptation import adaptation_of
    from phi_lit.train.foreign import base_checkpoint
    from phi_lit.train.job import Job
    from phi_lit.train.launch import launch

    given = base_checkpoint(arguments["checkpoint_dir"], arguments["access_token"])
    data = arguments["data"]
    if data is None:
        from litgpt.data import Alpaca

        data = Alpaca()
    method = adaptation_of(module)
    arguments |= {"checkpoint_dir": given, "data": data, "train": copy(arguments["train"])}
    arguments["access_token"] = None  # a secret has no place in hyperparameters.yaml
    launch(
        Job(
            command="finetune",
            config=method.configure(given, arguments),
            data=data,
            tokenizer_dir=given,
            weights_dir=given,
            prompt_style=getattr(data, "prompt_style", Default()),
            arguments=arguments,
            adaptation=method,
        )
    )
