"""What the loop eats: micro-batches of (inputs, targets) at a place that is one number.

The place is counted in rows (examples) consumed by all ranks together since the start, so it means
the same on any number of ranks: a global slice of rows p .. p + m W gives rank r the rows from
p + r m on. Rows of the next epoch follow without a gap. Loaders that come from LitGPT's own data
modules are fed the same way where their dataset can be indexed, and as a stream elsewhere.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from phi_lit.data.rows import RowLoader, RowOrder
from phi_lit.errors import UserError
from phi_lit.train.init import seeded

IGNORE = -100
"""Targets with this id never enter the loss."""


class Batch(NamedTuple):
    """Rows to train on; the target of a position is what comes after it."""

    inputs: Tensor
    """int64 (B, T)."""
    targets: Tensor
    """int64 (B, T), `IGNORE` where nothing is to be learned."""
    documents: Tensor | None = None
    """int32 (B, T), which document of its row a position belongs to; None where a row is one."""

    @property
    def n_targets(self) -> int:
        """How many positions are learned."""
        return int((self.targets != IGNORE).sum())

    @property
    def n_rows_without_target(self) -> int:
        """How many rows teach nothing."""
        return int((self.targets == IGNORE).all(dim=1).sum())


class Feed(Protocol):
    """A place in an endless stream of rows, from which micro-batches are taken."""

    rows_per_epoch: int | None
    """Rows in one pass, or None where unknown (a stream)."""

    @property
    def position(self) -> int:
        """Rows consumed by all ranks together since the start."""
        ...

    def take(self) -> Batch:
        """Return this rank's next micro-batch and move on."""
        ...

    def seek(self, position: int) -> None:
        """Go to a place, counted in rows of all ranks."""
        ...


def pair(batch: Any, max_seq_length: int | None = None, begin_id: int | None = None) -> Batch:
    """Split a loader's batch into inputs and targets, the target of a token being the one after it.

    A tensor is rows of T + 1 ids; a mapping has `input_ids` and `labels` of equal shape, labels
    being `IGNORE` where nothing is to be learned (LitGPT's finetuning batches). With `begin_id`
    every such id begins a document: in a flat array it is what stands between two of them, whose
    target is the first token of the next.
    """
    inputs, labels = (
        (batch["input_ids"], batch["labels"]) if isinstance(batch, dict) else (batch, batch)
    )
    if max_seq_length is not None:
        inputs, labels = inputs[:, : max_seq_length + 1], labels[:, : max_seq_length + 1]
    inputs = inputs[:, :-1].contiguous().long()
    documents = None if begin_id is None else (inputs == begin_id).cumsum(1, dtype=torch.int32)
    return Batch(inputs, labels[:, 1:].contiguous().long(), documents)


class RowFeed:
    """Rows of a token store: the loader already keeps its place as a number."""

    def __init__(self, loader: RowLoader, begin_id: int | None = None) -> None:
        self._loader, self._begin_id = loader, begin_id
        self._rows: Iterator[Tensor] = iter(loader)
        self.rows_per_epoch: int | None = loader.n_rows

    @property
    def position(self) -> int:
        """Rows consumed by all ranks together since the start."""
        return self._loader.position

    def take(self) -> Batch:
        """Return this rank's next rows."""
        return pair(next(self._rows), begin_id=self._begin_id)

    def seek(self, position: int) -> None:
        """Go to a place, in constant time."""
        self._loader.load_state_dict({"position": position})
        self._rows = iter(self._loader)


class ExampleFeed:
    """Examples of any indexable dataset, in an order that is a pure function of (seed, epoch)."""

    def __init__(
        self, loader: DataLoader, *, micro_batch: int, rank: int, world: int, seed: int,
        max_seq_length: int | None,
    ) -> None:  # fmt: skip
        self._dataset, self._collate = loader.dataset, loader.collate_fn
        self._micro_batch, self._rank, self._world = micro_batch, rank, world
        self._max_seq_length = max_seq_length
        self.rows_per_epoch: int | None = len(self._dataset)  # type: ignore[arg-type]
        self._order = RowOrder(seed=seed, n_rows=self.rows_per_epoch)
        self.position = 0

    def take(self) -> Batch:
        """Return this rank's next examples, padded by the dataset's own collation."""
        first = self.position + self._rank * self._micro_batch
        rows = self._order.rows(first, self._micro_batch)
        self.position += self._micro_batch * self._world
        batch = self._collate([self._dataset[int(row)] for row in rows])
        return pair(batch, self._max_seq_length)

    def seek(self, position: int) -> None:
        """Go to a place, in constant time."""
        self.position = position


class StreamFeed:
    """Batches of a loader that can only be read forward; resuming reads up to the place again."""

    def __init__(
        self, loader: DataLoader, *, micro_batch: int, world: int, seed: int,
        max_seq_length: int | None,
    ) -> None:  # fmt: skip
        self._loader, self._seed, self._max_seq_length = loader, seed, max_seq_length
        self._rows_per_take = micro_batch * world
        self.rows_per_epoch: int | None = None
        self.seek(0)

    def take(self) -> Batch:
        """Return this rank's next rows."""
        batch = next(self._stream)
        self.position += self._rows_per_take
        return pair(batch, self._max_seq_length)

    def seek(self, position: int) -> None:
        """Read the stream from its start up to a place."""
        self.position = 0
        self._stream = self._batches()
        while self.position < position:
            self.take()

    def _batches(self) -> Iterator[Any]:
        epoch = 0
        while True:
            # A shuffling sampler draws its order from torch's generator when iteration starts.
            torch.manual_seed(seeded(self._seed, epoch, 0, 0))
            empty = True
            for batch in self._loader:
                empty = False
                yield batch
            if empty:
                raise RuntimeError(f"{type(self._loader).__name__} yields no batch at all")
            epoch += 1


def make_feed(
    loader: Any, *, micro_batch: int, rank: int, world: int, seed: int, max_seq_length: int | None,
    begin_id: int | None = None,
) -> Feed:  # fmt: skip
    """Return the feed that fits a data module's loader.

    Args:
        loader: what the data module gave.
        micro_batch: rows that a rank takes at a time.
        rank, world: this rank and the number of ranks.
        seed: decides the order, where the loader does not.
        max_seq_length: T.
        begin_id: what begins a document in rows of a flat array, where documents are masked.
    """
    if isinstance(loader, RowLoader):
        return RowFeed(loader, begin_id)
    if is_stream(loader):
        if world > 1 and not type(loader).__module__.startswith("litdata"):
            raise UserError(
                f"{type(loader).__name__} deals every one of {world} ranks the same rows, "
                "because its data set can only be read forward; use one device, CodeTextbook, or a "
                "data set with a length"
            )
        return StreamFeed(
            loader, micro_batch=micro_batch, world=world, seed=seed, max_seq_length=max_seq_length
        )
    return ExampleFeed(
        loader,
        micro_batch=micro_batch,
        rank=rank,
        world=world,
        seed=seed,
        max_seq_length=max_seq_length,
    )


def is_stream(loader: Any) -> bool:
    """Tell whether a loader can only be read forward."""
    dataset = getattr(loader, "dataset", None)
    return (
        dataset is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")
    )


def held_out_batches(loader: Iterable[Any], begin_id: int | None = None) -> Iterator[Batch]:
    """Yield the batches of one pass over a validation loader."""
    for batch in loader:
        yield pair(batch, begin_id=begin_id)
