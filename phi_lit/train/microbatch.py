"""`micro_batch_size: auto`: the most rows per forward pass that fit in memory.

On a GPU a real forward and backward pass is tried at growing sizes until memory runs out. On a CPU
running out of memory kills the process, so there the prediction of `memory.py` decides.
"""

import gc

import psutil
import torch
from lightning import Fabric

from phi_lit.errors import UserError
from phi_lit.train.job import Job, Machine
from phi_lit.train.memory import predict_memory
from phi_lit.train.model import LossModel

ROOM = 0.9
"""Share of the memory that is used: fragmentation and the data take the rest."""

CERTAIN = 1.2
"""A step is refused where its predicted memory is this many times what is there: predictions are
within 10 % for phi's kind of model, and estimates for others."""


def refuse_what_cannot_fit(job: Job, machine: Machine, rows: int) -> None:
    """Raise a `UserError` if a step of `rows` rows per forward pass is certain not to fit."""
    if machine.kind == "cuda":
        room: float = torch.cuda.get_device_properties(0).total_memory
    else:
        room = psutil.virtual_memory().available / machine.devices
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


def largest_micro_batch(job: Job, machine: Machine, fabric: Fabric, model: LossModel) -> int:
    """Return the largest number of rows that divides this rank's share of a step and fits.

    Raises:
        UserError: not even one row fits.
    """
    share = job.train.global_batch_size // machine.world
    sizes = [size for size in range(1, share + 1) if share % size == 0]
    fitting = 0
    for size in sizes:
        if not fits(job, machine, fabric, model, size):
            break
        fitting = size
    if fabric.world_size > 1:
        lowest = -fabric.all_reduce(torch.tensor(-float(fitting)), reduce_op="max")
        fitting = int(lowest)
    if not fitting:
        raise UserError(
            f"not even one row of {job.length} tokens of {job.config.name} fits in memory; try "
            "train.activation_checkpointing: full, strategy: fsdp, or a shorter max_seq_length"
        )
    return fitting


def fits(job: Job, machine: Machine, fabric: Fabric, model: LossModel, rows: int) -> bool:
    """Tell whether a step of `rows` rows per forward pass fits in memory."""
    if machine.kind == "cpu":
        available = psutil.virtual_memory().available / machine.devices
        return predict_memory(job, machine, rows).total <= ROOM * available
    ids = torch.zeros(rows, job.length, dtype=torch.long, device=fabric.device)
    try:
        model.to(fabric.device)
        if model.teacher is not None:
            model.teacher.place(fabric)
        with fabric.autocast():
            model(ids, ids).backward()
        # The optimizer's two moments are not there yet.
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        free, _ = torch.cuda.mem_get_info(fabric.device)
        return (
            2 * weights <= free + torch.cuda.memory_reserved() - torch.cuda.max_memory_allocated()
        )
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
