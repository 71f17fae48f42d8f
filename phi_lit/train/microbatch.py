"""`micro_batch_size: auto`: the most rows per forward pass that fit in memory.

`memory.py` predicts it. On one GPU the run's own module, compiled or not, is then tried around that
number until memory runs out. On a CPU running out kills the process, and on several ranks one that
runs out leaves the others waiting, so there the prediction decides.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch
from lightning import Fabric
from lightning.fabric.strategies import SingleDeviceStrategy
from torch import nn

from phi_lit.errors import UserError
from phi_lit.train.job import Job, Machine
from phi_lit.train.memory import predict_memory

ROOM = 0.9
"""Share of the memory that is used: fragmentation and the data take the rest."""

CERTAIN = 1.2
"""A step is refused where its predicted memory is this many times what is there: predictions are
within 10 % for phi's kind of model, and estimates for others."""


def memory_there(machine: Machine) -> float:
    """Return the bytes that one process can use."""
    if machine.kind == "cuda":
        return float(torch.cuda.get_device_properties(0).total_memory)
    return psutil.virtual_memory().available / machine.devices


def refuse_what_cannot_fit(job: Job, machine: Machine, rows: int) -> None:
    """Raise a `UserError` if a step of `rows` rows per forward pass is certain not to fit."""
    room = memory_there(machine)
    memory = predict_memory(job, machine, rows)
    need = memory.total
    if need > CERTAIN * room:
        beside = f" beside its teacher's {memory.teacher / 1e9:,.1f} GB" if memory.teacher else ""
        raise UserError(
            f"a step of {rows} rows of {job.length} tokens of {job.config.name}{beside} needs "
            f"about {need / 1e9:,.1f} GB on each device, and {room / 1e9:,.1f} GB are there; lower "
            "train.micro_batch_size, set train.activation_checkpointing, or use strategy: fsdp on "
            "more devices (`phi-lit plan` shows the parts)"
        )


@contextmanager
def out_of_memory(job: Job) -> Iterator[None]:
    """Tell in one line that a GPU's memory ran out after all."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{job.config.name}: {str(error).splitlines()[0]} Lower train.micro_batch_size, or "
            "set train.activation_checkpointing; --resume auto goes on from the last checkpoint"
        ) from error


def largest_micro_batch(job: Job, machine: Machine, fabric: Fabric, module: nn.Module) -> int:
    """Return the largest number of rows that divides this rank's share of a step and fits.

    Args:
        job: names the model and the step.
        machine: where it runs.
        fabric: launched.
        module: the training module as it will run, in Fabric's wrapper.

    Raises:
        UserError: not even one row fits.
    """
    share = job.train.global_batch_size // machine.world
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    room = ROOM * memory_there(machine)
    predicted = [size for size in sizes if predict_memory(job, machine, size).total <= room]
    fitting = max(predicted, default=0)
    if machine.kind == "cuda" and isinstance(fabric.strategy, SingleDeviceStrategy):
        fitting = largest_that_works(
            sizes, max(fitting, 1), lambda rows: runs(job, machine, fabric, module, rows)
        )
    if fabric.world_size > 1:  # CPU processes may have seen different amounts of free memory
        counted = torch.tensor(-float(fitting), device=fabric.device)
        fitting = -int(fabric.all_reduce(counted, reduce_op="max"))
    if not fitting:
        raise UserError(
            f"not even one row of {job.length} tokens of {job.config.name} fits in memory; try "
            "train.activation_checkpointing: full, strategy: fsdp, or a shorter max_seq_length"
        )
    return fitting


def largest_that_works(sizes: list[int], guess: int, works: Callable[[int], bool]) -> int:
    """Return the largest of some growing sizes that works, trying from a guess; 0 if none does."""
    at = sizes.index(guess)
    if not works(sizes[at]):
        return next((size for size in reversed(sizes[:at]) if works(size)), 0)
    for size in sizes[at + 1 :]:
        if not works(size):
            break
        guess = size
    return guess


def runs(job: Job, machine: Machine, fabric: Fabric, module: nn.Module, rows: int) -> bool:
    """Try a forward and a backward pass, with room for the optimizer's state; leaves no trace."""
    cuda = fabric.device.type == "cuda"
    ids = torch.zeros(rows, job.length, dtype=torch.long, device=fabric.device)
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        fabric.backward(module(ids, ids))
        if not cuda:
            return True
        state = predict_memory(job, machine, rows).optimizer
        free, _ = torch.cuda.mem_get_info(fabric.device)
        kept = torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()
        return state <= free + kept
    except torch.OutOfMemoryError:
        return False
    finally:
        module.zero_grad(set_to_none=True)
        for buffer, before in buffers:  # of experts, which count their tokens
            buffer.copy_(before)
        torch._dynamo.reset()  # or the second size would be compiled for any size, and slower
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
