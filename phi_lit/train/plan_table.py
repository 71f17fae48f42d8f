"""A plan as the text that `phi-lit plan` prints."""

from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phi_lit.train.plan import Plan

ROOM = 0.9
"""Share of a GPU's memory that a step may use: context, communication and fragmentation are the
rest."""


def describe(run: "Plan") -> str:
    """Return a plan as the text that the command prints."""
    layout = run.layout
    nodes = f" on {run.num_nodes} nodes" if run.num_nodes > 1 else ""
    how = layout.strategy + (f" {layout.sharding}" if layout.ranks > 1 else "")
    offload = ", offloaded to the CPU" if layout.cpu_offload else ""
    active = (
        f", {run.active_parameters:,} per token" if run.active_parameters != run.parameters else ""
    )
    world = run.devices * run.num_nodes
    lines = {
        "parameters": f"{run.parameters:,}{active}",
        "FLOPs per token": f"{run.flops_per_token_6n / 1e9:.3g} G (6N), "
        f"{run.flops_per_token_6n_12ldt / 1e9:.3g} G (6N + 12LdT)",
        "step": f"{run.rows_per_step:,} rows x {layout.seq_length:,} tokens = "
        f"{run.rows_per_step * layout.seq_length:,} tokens: {world} x {layout.micro_batch} rows x "
        f"{run.accumulate} micro-batches",
        "run": f"{run.steps:,} steps = {run.tokens:,} tokens",
        "speed": f"{run.tokens_per_second_per_gpu:,.0f} tokens/s per GPU, "
        f"{world * run.tokens_per_second_per_gpu:,.0f} in all",
        "MFU": f"{run.mfu_6n_12ldt:.1%} (6N + 12LdT) of {run.peak_flops / 1e12:,.4g} TFLOP/s; "
        f"{run.mfu_source}",
        "time": f"{_clock(run.seconds)}, {_hours(run.gpu_hours)}",
    }
    if run.price is not None:
        lines["price"] = f"{run.price:,.0f}"
    for mark in run.milestones:
        share = mark.step / run.steps
        lines[mark.name] = (
            f"step {mark.step:,}, {mark.tokens:,} tokens: {_clock(run.seconds * share)}, "
            f"{_hours(mark.gpu_hours)}"
        )
    width = max(map(len, lines)) + 2
    head = f"{run.model} on {world} x {run.gpu}{nodes}, {layout.precision}, {how}{offload}"
    body = [f"{name:<{width}}{text}" for name, text in lines.items()]
    return "\n".join([head, "", *body, "", *_memory_lines(run)])


def _memory_lines(run: "Plan") -> list[str]:
    names = {
        "parameters": "parameters",
        "gradients": "gradients",
        "optimizer": f"optimizer state ({run.layout.optimizer.rpartition('.')[2]})",
        "weight_copies": "half-precision copies of the weights",
        "gathered": "gathered by sharding",
        "activations": f"activations (checkpointing: {run.layout.checkpointing})",
        "recomputed": "one block's backward pass",
        "loss": "head and loss",
        "teacher": "teacher",
    }
    lines = ["memory per GPU, GB (not all parts are there at the same time)"]
    for name, size in run.memory.parts().items():
        if size:
            lines.append(f"  {names[name]:<42}{size / 1e9:8.2f}")
    usable = ROOM * run.memory_of_gpu
    verdict = "fits" if run.fits else "DOES NOT FIT"
    lines.append(
        f"  {'peak of a step':<42}{run.memory.total / 1e9:8.2f}  {verdict}: usable are "
        f"{usable / 1e9:.1f} of {run.memory_of_gpu / 1e9:.1f}"
    )
    largest = run.largest_micro_batch
    lines.append(
        f"  {'largest micro-batch that fits':<42}{largest:8}  rows"
        if largest
        else "  not one row fits: try train.activation_checkpointing, strategy fsdp, or more GPUs"
    )
    return lines


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return str(timedelta(seconds=round(seconds)))


def _hours(hours: float) -> str:
    return f"{hours:,.0f} GPU-hours" if hours >= 100 else f"{hours:,.2g} GPU-hours"
