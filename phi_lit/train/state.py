"""The state of a training, by parameter name: gathered from its ranks, and put back into them.

Whole tensors mean the same on any number of ranks. Where they are too large to gather, each rank's
part is kept with the shape of the whole, and the parts are joined when they are read. Names are
LitGPT's: what the training wrapper puts before them never reaches a file.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from phi_lit.train import deepspeed

WRAPPER = "gpt."
"""What `LossModel` puts before LitGPT's parameter names."""

UNTOUCHED: dict[str, Any] = {"state": {}, "param_groups": []}
"""The state of optimizers before their first step."""


def is_untouched(optimizers: list[Optimizer]) -> bool:
    """Tell whether no optimizer has stepped yet.

    PyTorch would make such a state by a step with zero gradients, which counts as one ever after.
    """
    return not any(optimizer.state for optimizer in optimizers)


def gather(
    module: nn.Module, optimizers: list[Optimizer], *, whole: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (model state, optimizer state) by parameter name; every rank must call it.

    Args:
        module: the module in its distributed wrapper.
        optimizers: those that step its parameters.
        whole: gather whole tensors in host memory (on rank 0), else leave each rank its shard.
    """
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    if deepspeed.is_engine(module):
        model_state, optimizer_state = deepspeed.gather(module)
    else:
        options = StateDictOptions(
            full_state_dict=whole, cpu_offload=whole, ignore_frozen_params=True
        )
        model_state = get_model_state_dict(module, options=options)
        optimizer_state = dict(UNTOUCHED)
        if not is_untouched(optimizers):
            optimizer_state = get_optimizer_state_dict(module, optimizers, options=options)
    if _some_frozen(module):  # quantized layers would add what their weights are scaled by
        inner = module.module if deepspeed.is_engine(module) else module
        trained = {name for name, parameter in inner.named_parameters() if parameter.requires_grad}
        model_state = {name: value for name, value in model_state.items() if name in trained}
    return _renamed(model_state, optimizer_state, lambda name: name.removeprefix(WRAPPER))


def scatter(
    module: nn.Module,
    optimizers: list[Optimizer],
    model_state: dict[str, Tensor],
    optimizer_state: dict[str, Any],
) -> None:
    """Put whole tensors back into the module and its optimizers, each rank taking its part."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    model_state, optimizer_state = _renamed(
        model_state, optimizer_state, lambda name: WRAPPER + name
    )
    if deepspeed.is_engine(module):
        deepspeed.scatter(module, model_state, optimizer_state)
        return
    frozen = _some_frozen(module)
    options = StateDictOptions(full_state_dict=True, strict=not frozen, ignore_frozen_params=frozen)
    if frozen:
        _fill_trained(module, model_state)
    else:
        set_model_state_dict(module, model_state, options=options)
    if optimizer_state["state"]:
        set_optimizer_state_dict(module, optimizers, optimizer_state, options=options)


@torch.no_grad()
def _fill_trained(module: nn.Module, model_state: dict[str, Tensor]) -> None:
    """Fill the parameters that train, each rank its part; the frozen ones are there already."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = model_state[name].to(parameter.device)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
        parameter.copy_(whole)


def _some_frozen(module: nn.Module) -> bool:
    return any(not parameter.requires_grad for parameter in module.parameters())


def _renamed(
    model_state: dict[str, Tensor], optimizer_state: dict[str, Any], rename: Callable[[str], str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return both states with every parameter's name changed."""
    if not optimizer_state:  # gathered whole: only rank 0 has it
        return {}, {}
    groups = [
        {**group, "params": [rename(name) for name in group["params"]]}
        for group in optimizer_state["param_groups"]
    ]
    return {rename(name): tensor for name, tensor in model_state.items()}, {
        "state": {rename(name): values for name, values in optimizer_state["state"].items()},
        "param_groups": groups,
    }


def to_host(state: Any) -> Any:
    """Copy every tensor of a nested state into host memory of its own."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: to_host(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(to_host(value) for value in state)
    return state


def parts_of(state: Any) -> Any:
    """Replace every sharded tensor by this rank's part of it, marked as a part."""
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        return {"part": state.to_local().detach().cpu(), "shape": list(state.shape)}
    if isinstance(state, Tensor):
        return state.detach().cpu()
    if isinstance(state, dict):
        return {key: parts_of(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(parts_of(value) for value in state)
    return state


def joined(parts: list[Any]) -> Any:
    """Undo `parts_of`: join the ranks' parts along the first dimension, where FSDP2 cuts."""
    first = parts[0]
    if isinstance(first, dict) and first.keys() == {"part", "shape"}:
        tensors = [part["part"] for part in parts if part["part"].numel()]
        whole = torch.cat(tensors) if tensors else first["part"]
        # Under hybrid sharding every node has a copy of all parts: the first copy is enough.
        return whole[: first["shape"][0]] if first["shape"] else whole.reshape(())
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(joined(list(items)) for items in zip(*parts, strict=True))
    return first
