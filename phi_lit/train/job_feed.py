"""Which feed a job's data get: rows of a flat array, single examples, or examples packed.

Also what the loop validates on. What a feed is and how it keeps its place is told in `feed.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from lightning import Fabric

from phi_lit.data.rows import RowLoader
from phi_lit.errors import UserError
from phi_lit.train.feed import IGNORE, Batch, Feed, held_out_batches, is_stream, make_feed
from phi_lit.train.job import Job
from phi_lit.train.packed import PackedFeed


def make_job_feed(job: Job, fabric: Fabric, micro_batch: int, planned: Feed | None = None) -> Feed:
    """Return the feed of the training split for this rank.

    Args:
        job: names the data.
        fabric: the processes.
        micro_batch: rows that a rank takes at a time.
        planned: a feed of the same data, whose examples need not be measured again.
    """
    loader = job.data.train_dataloader()
    shared: dict[str, Any] = dict(
        micro_batch=micro_batch,
        rank=fabric.global_rank,
        world=fabric.world_size,
        seed=job.arguments["seed"],
    )
    if not job.train.pack:
        return make_feed(loader, max_seq_length=job.length, begin_id=begin_id(job), **shared)
    if is_stream(loader):
        raise UserError(
            f"train.pack puts examples together, and the rows of {type(job.data).__name__} come as "
            "they are; leave it out (train.document_mask separates the documents of a flat array)"
        )
    feed = PackedFeed(
        loader,
        row_length=job.length,
        masked=job.train.document_mask is not False,
        measured=planned.measured if isinstance(planned, PackedFeed) else None,
        **shared,
    )
    if planned is None:
        fabric.print(feed.report())
    return feed


def held_out(job: Job, fabric: Fabric) -> Callable[[], Iterable[Batch]]:
    """Return what makes one pass over this rank's validation batches, as many on every rank."""

    def batches() -> Iterable[Batch]:
        loader = job.data.val_dataloader()
        found = held_out_batches(loader, begin_id(job))
        if isinstance(loader, RowLoader) or is_stream(loader):  # which know the ranks themselves
            return found
        return deal(found, fabric.global_rank, fabric.world_size)

    return batches


def deal(batches: Iterator[Batch], rank: int, world: int) -> Iterator[Batch]:
    """Yield every `world`-th batch; in the last round, ranks that get none have one without
    targets."""
    while taken := list(islice(batches, world)):
        if rank < len(taken):
            yield taken[rank]
        else:
            last = taken[-1]
            yield last._replace(targets=torch.full_like(last.targets, IGNORE))


def begin_id(job: Job) -> int | None:
    """Return the id that begins a document in a flat array, where documents are to be masked.

    Raises:
        UserError: the data are no flat array.
    """
    if not job.train.document_mask or job.train.pack:
        return None
    found = getattr(job.data, "eot_id", None)
    if found is None:
        raise UserError(
            "train.document_mask separates the documents in the rows of CodeTextbook and of "
            f"CodeExercises in paper mode; {type(job.data).__name__} gives rows of one text each: "
            "leave it out, or set train.pack to put several into a row"
        )
    return found
