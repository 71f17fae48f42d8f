"""The optimizer from its YAML, over the parameter groups that weight decay is meant for.

Any torch or bitsandbytes optimizer is named by class path, as in LitGPT. Groups are made by name
and module, never by a tensor's rank: sharded parameters may all be flat. An optimizer that takes
matrices only (Muon) gets the linear layers inside the blocks, and AdamW the rest.
"""

import importlib
import inspect
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from phi_lit.errors import UserError, did_you_mean

MATRICES_ONLY = {"Muon"}
"""Optimizers that orthogonalise two-dimensional updates and refuse any other tensor."""

FUSED_WHEN_SHARDED = {"Adam", "AdamW"}
"""Optimizers whose one-kernel step also takes sharded parameters (on a CPU it is 3.5 x faster)."""


def split_parameters(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of (linear layers' weights, everything else) that train.

    Everything else is biases, norms and embeddings; the head's weight is a linear layer's.
    Parameters stacked by expert are matrices too: their module says so with `matrices = (names)`.
    """
    matrices: list[str] = []
    others: list[str] = []
    seen: set[int] = set()  # a tied weight counts once, where it is met first
    for prefix, module in model.named_modules():
        stacked = getattr(module, "matrices", ())
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{prefix}.{name}" if prefix else name
            is_matrix = name in stacked or (isinstance(module, nn.Linear) and name == "weight")
            (matrices if is_matrix else others).append(full)
    return matrices, others


def parse_optimizer(optimizer: str | dict[str, Any]) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return the class and its arguments from `AdamW`, `pkg.mod.Class` or a class_path mapping.

    Raises:
        UserError: there is no such class, package, or argument.
    """
    if isinstance(optimizer, str):
        path, init_args = optimizer, {}
    elif "class_path" in optimizer:
        path, init_args = optimizer["class_path"], dict(optimizer.get("init_args") or {})
    else:
        raise UserError(f"optimizer has no class_path, only {', '.join(optimizer) or 'nothing'}")
    module_name, _, class_name = path.rpartition(".")
    module_name = module_name or "torch.optim"
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        extra = "; pip install 'phi-lit[quantize]'" if "bitsandbytes" in module_name else ""
        raise UserError(
            f"optimizer {path!r}: cannot import {module_name} ({error}){extra}"
        ) from None
    except AttributeError:
        members = vars(importlib.import_module(module_name))
        names = [name for name, value in members.items() if isinstance(value, type)]
        raise UserError(
            f"optimizer {path!r}: {module_name} has no {class_name!r}."
            f"{did_you_mean(class_name, names)}"
        ) from None
    if not (isinstance(found, type) and hasattr(found, "step")):
        raise UserError(f"optimizer {path!r} is not a class of optimizers")
    known = inspect.signature(found).parameters
    unknown = [name for name in init_args if name not in known]
    if unknown:
        raise UserError(
            f"optimizer {path}: unknown argument {unknown[0]!r}.{did_you_mean(unknown[0], known)}"
        )
    for name, value in init_args.items():
        if isinstance(value, list):
            init_args[name] = tuple(value)  # YAML has no tuples; betas must compare equal later
        elif isinstance(value, str) and name not in ("adjust_lr_fn", "mode"):
            try:
                init_args[name] = float(value)  # YAML 1.1 reads 1e-4 as text
            except ValueError:
                raise UserError(f"optimizer {path}: {name} is {value!r}, not a number") from None
    return found, init_args


def build_optimizer(
    model: nn.Module,
    optimizer: str | dict[str, Any],
    weight_decay_on: str = "all",
    *,
    scaled: bool = False,
) -> list[Optimizer]:
    """Build the optimizer over the model's decay groups; Muon comes with an AdamW for the rest.

    Args:
        model: what trains, after sharding (the groups hold its parameters).
        optimizer: a name in torch.optim, a class path, or {class_path, init_args}.
        weight_decay_on: "all", or "matrices" to spare biases, norms and embeddings.
        scaled: there is a loss scale. A fused optimizer would divide by it on its own, after the
            clipping, so none is.
    """
    cls, init_args = parse_optimizer(optimizer)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices, others = split_parameters(model)
    if cls.__name__ in MATRICES_ONLY:
        hidden = [name for name in matrices if ".h." in name and parameters[name].ndim == 2]
        rest = [name for name in parameters if name not in set(hidden)]
        adam_args = {key: init_args[key] for key in ("lr", "weight_decay") if key in init_args}
        adam = torch.optim.AdamW(
            _groups(parameters, *_divide(rest, matrices), weight_decay_on), **adam_args
        )
        return [cls([parameters[name] for name in hidden], **init_args), adam]
    if cls.__name__ in FUSED_WHEN_SHARDED and "fused" not in init_args:
        kinds = {parameter.device.type for parameter in parameters.values()}
        init_args["fused"] = kinds <= {"cpu", "cuda"} and not scaled
    if scaled and init_args.get("fused"):
        raise UserError(f"optimizer {cls.__name__}: fused does not go with a loss scale (16-mixed)")
    groups = _groups(parameters, matrices, others, weight_decay_on)
    try:
        return [cls(groups, **init_args)]
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer {cls.__name__}: {str(error).splitlines()[0]}") from error


def _divide(names: list[str], matrices: list[str]) -> tuple[list[str], list[str]]:
    chosen = set(matrices)
    return [n for n in names if n in chosen], [n for n in names if n not in chosen]


def _groups(
    parameters: dict[str, nn.Parameter],
    matrices: list[str],
    others: list[str],
    weight_decay_on: str,
) -> list[dict[str, Any]]:
    if weight_decay_on == "all":
        return [{"params": [parameters[name] for name in [*matrices, *others]]}]
    groups: list[dict[str, Any]] = [{"params": [parameters[name] for name in matrices]}]
    groups.append({"params": [parameters[name] for name in others], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
