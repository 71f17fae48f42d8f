"""Whether and how the blocks are compiled, decided once for all ranks and sessions of a run."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric

from phi_lit.errors import UserError
from phi_lit.train import checkpoint
from phi_lit.train.course import Course
from phi_lit.train.devices import arithmetic_of, peak_for
from phi_lit.train.flops import flops_per_token_6n_12ldt
from phi_lit.train.job import Job, Machine

COMPILE_PAYS_AFTER = 900.0
"""Seconds that a run must be expected to last before `compile: auto` compiles on a CPU: it starts
half a minute later and is some 5 % faster (benchmarks/train_step.py)."""

USUAL_MFU = 0.3
"""Share of the peak that such an expectation counts with."""


def decide_compile(
    job: Job, machine: Machine, fabric: Fabric, course: Course, resume_dir: Path | None
) -> bool:
    """Decide once for all ranks and all sessions of a run: compiled code rounds differently."""
    if (job.train.compile or "auto") == "auto" and resume_dir is not None:
        return bool(checkpoint.load_file(resume_dir / checkpoint.STATE_FILE)["compiled"])
    decided = should_compile(job, machine, course)
    return fabric.broadcast(decided) if fabric.world_size > 1 else decided


def should_compile(job: Job, machine: Machine, course: Course) -> bool:
    """Tell whether to compile the blocks: as asked, or where the run is long enough to pay.

    Raises:
        UserError: compilation is asked for, but there is no compiler for this device.
    """
    mode = job.train.compile or "auto"
    compiler = has_compiler(machine.kind)
    if mode == "on" and not compiler:
        need = "a C++ compiler (g++)" if machine.kind == "cpu" else "the package triton"
        raise UserError(f"train.compile is on, but torch.compile needs {need} here")
    if mode != "auto" or not compiler:
        return mode == "on"
    if machine.kind == "cuda":
        return True
    if machine.precision != "32-true":  # compiled bf16 blocks were slower than eager ones
        return False
    flops = flops_per_token_6n_12ldt(job.config, job.length)
    tokens = course.steps * course.global_batch_size * job.length
    peak = peak_for(torch.device("cpu"), arithmetic_of(machine.precision)) * machine.world
    return tokens * flops / (USUAL_MFU * peak) > COMPILE_PAYS_AFTER


def compile_options(machine: Machine) -> dict[str, Any]:
    """Return what `torch.compile` is to be told for this device and number format."""
    several = machine.precision == "bf16-mixed" and machine.world > 1  # FSDP2 gathers in bf16
    if machine.kind == "cpu" and (machine.precision == "bf16-true" or several):
        # Both branches of a parallel block get one gradient. Where one kernel sums it for both
        # biases in bf16, torch 2.13 gives two variables one name and the C++ does not build.
        return {"options": {"cpp.max_horizontal_fusion_size": 1}}
    return {}


def has_compiler(kind: str) -> bool:
    """Tell whether torch.compile has what it needs for a kind of device."""
    if kind == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    return shutil.which("g++") is not None or shutil.which("clang++") is not None
