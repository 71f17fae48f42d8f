"""The course of a run in optimizer steps: where it ends, and what happens on the way.

`max_steps`, `max_tokens`, `epochs` and the warm-up come in different units; here they become steps,
once, and nothing later counts in anything else.
"""

import math
from dataclasses import dataclass

from phi_lit.errors import UserError
from phi_lit.train.job import Job
from phi_lit.train.schedule import learning_rate


@dataclass(frozen=True)
class Course:
    """The numbers that a run follows, all in optimizer steps."""

    steps: int
    """Where the run ends."""
    rows_per_epoch: int | None
    """Rows in one pass over the data, or None where unknown."""
    schedule: str
    warmup: int
    schedule_steps: int
    """What the schedule is aimed at; a run may end earlier."""
    decay: int
    floor: float
    """The lowest learning rate of the schedule."""
    accumulate: int
    """Micro-batches per step and rank."""
    global_batch_size: int
    """Rows per step, all ranks together."""
    validate_every: int
    validate_batches: int
    """Micro-batches per validation, all ranks together."""

    def rate(self, step: int, peak: float) -> float:
        """Return the learning rate of a step, counted from 0, for a peak rate."""
        return learning_rate(
            step,
            self.schedule,
            peak=peak,
            floor=min(self.floor, peak),
            warmup=self.warmup,
            total=self.schedule_steps,
            decay=self.decay,
        )


def plan_course(
    job: Job, rows_per_epoch: int | None, rows_per_micro_step: int | None = None
) -> Course:
    """Turn max_steps, max_tokens, epochs and warm-up into optimizer steps."""
    train = job.train
    rows = train.global_batch_size
    limits = []
    if train.max_steps is not None:
        limits.append(train.max_steps)
    if train.max_tokens is not None:
        limits.append(train.max_tokens // (rows * job.length))
    if train.epochs is not None and rows_per_epoch is not None:
        limits.append(train.epochs * rows_per_epoch // rows)
    if not limits:
        raise UserError("nothing says when to stop: set train.max_steps, max_tokens or epochs")
    steps = min(limits)
    if steps < 1:
        raise UserError(
            f"the run would end before its first step: a step takes {rows} rows of {job.length} "
            f"tokens = {rows * job.length:,} tokens; max_tokens is {train.max_tokens}, and the "
            f"data hold {rows_per_epoch} rows; lower train.global_batch_size or train longer"
        )
    total = train.lr_total_steps or steps
    if train.lr_warmup_fraction and rows_per_epoch:
        warmup = math.ceil(train.lr_warmup_fraction * rows_per_epoch / rows)
    else:
        warmup = train.lr_warmup_steps or 0
    return Course(
        steps=steps,
        rows_per_epoch=rows_per_epoch,
        schedule=train.lr_schedule or "cosine",
        warmup=min(warmup, total),
        schedule_steps=total,
        decay=train.lr_decay_steps or total // 10,
        floor=train.min_lr,
        accumulate=rows // (rows_per_micro_step or rows),
        global_batch_size=rows,
        validate_every=job.eval.interval,
        validate_batches=job.eval.max_iters,
    )
