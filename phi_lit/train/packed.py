"""Examples packed into rows as the loop takes them: any SFT data set that can be indexed.

`phi_lit/data/packing.py` says which examples lie together; here they are fetched and laid side by
side. The place is one number, counted in rows, and what lies there is a pure function of (seed,
epoch), as in every feed.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from phi_lit.data.packing import Packing
from phi_lit.data.rows import RowOrder
from phi_lit.errors import UserError
from phi_lit.progress import progress
from phi_lit.train.feed import IGNORE, Batch


class Measured(NamedTuple):
    """What a data set holds that can be learned from."""

    items: np.ndarray
    """The examples with a target, by their number in the data set."""
    positions: np.ndarray
    """How many positions each takes: one less than its ids, the last of which is a target only."""
    targets: int
    """Positions to learn, all examples together."""
    cut: int
    """Examples that are longer than a row and lose their end."""


def measure(dataset: Any, row_length: int) -> Measured:
    """Look at every example of a data set once; one that knows its `lengths` is not read."""
    if hasattr(dataset, "lengths") and hasattr(dataset, "n_targets"):
        positions, targets = np.asarray(dataset.lengths) - 1, dataset.n_targets
    else:
        found = np.zeros((len(dataset), 2), np.int64)
        with progress(len(dataset), "measuring", "examples") as bar:
            for number in range(len(dataset)):
                labels = dataset[number]["labels"]
                found[number] = len(labels) - 1, (labels[1 : row_length + 1] != IGNORE).sum()
                bar.update()
        positions, targets = np.where(found[:, 1] > 0, found[:, 0], 0), int(found[:, 1].sum())
    items = np.flatnonzero(positions > 0)
    positions = positions[items]
    over = int((positions > row_length).sum())
    return Measured(items, np.minimum(positions, row_length), targets, over)


class PackedFeed:
    """Rows of several examples each, padded to full length.

    Args:
        loader: a data module's loader, of which only the data set is used.
        micro_batch: rows that a rank takes at a time.
        rank, world: this rank and the number of ranks.
        seed: decides the order.
        row_length: T.
        masked: whether the examples in a row are kept from seeing each other.
        measured: what `measure` found, where that was done before.

    Raises:
        UserError: no example has a target.
    """

    def __init__(
        self, loader: DataLoader, *, micro_batch: int, rank: int, world: int, seed: int,
        row_length: int, masked: bool, measured: Measured | None = None,
    ) -> None:  # fmt: skip
        self._dataset, self._masked, self._row_length = loader.dataset, masked, row_length
        self._micro_batch, self._rank, self._world = micro_batch, rank, world
        self.measured = measured or measure(self._dataset, row_length)
        if not len(self.measured.items):
            raise UserError(
                f"none of {len(self._dataset):,} examples has a target within a row of "  # type: ignore[arg-type]
                f"{row_length:,}; raise train.max_seq_length, or look at the answers"
            )
        self._packing = Packing(self.measured.positions, row_length, seed)
        self._order = RowOrder(seed, self._packing.n_rows)
        self.rows_per_epoch: int | None = self._packing.n_rows
        self.position = 0

    def take(self) -> Batch:
        """Return this rank's next rows."""
        first = self.position + self._rank * self._micro_batch
        self.position += self._micro_batch * self._world
        rows = self._order.rows(first, self._micro_batch).tolist()
        laid = [
            self._lay(self._packing.row(row, (first + number) // self._packing.n_rows))
            for number, row in enumerate(rows)
        ]
        inputs, targets, documents = (torch.stack(column) for column in zip(*laid, strict=True))
        return Batch(inputs, targets, documents if self._masked else None)

    def seek(self, position: int) -> None:
        """Go to a place, in constant time."""
        self.position = position

    def report(self) -> str:
        """Return how well the examples fit, in one line."""
        measured, rows = self.measured, self._packing.n_rows
        places = rows * self._row_length
        lost = len(self._dataset) - len(measured.items)  # type: ignore[arg-type]
        return (
            f"packed {len(measured.items):,} examples into {rows:,} rows of {self._row_length:,}: "
            f"{len(measured.items) / rows:.2f} to a row, {self._packing.useful:.1%} of the "
            f"positions useful, {measured.targets / places:.1%} learned"
            + (f"; {measured.cut:,} cut to a row" if measured.cut else "")
            + (f"; {lost:,} without a target left out" if lost else "")
        )

    def _lay(self, examples: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Lay examples side by side; what is left of the row is a document of its own."""
        inputs = torch.zeros(self._row_length, dtype=torch.int64)
        targets = torch.full((self._row_length,), IGNORE)
        documents = torch.full((self._row_length,), len(examples), dtype=torch.int32)
        start = 0
        for number, example in enumerate(examples):
            item = self._dataset[int(self.measured.items[example])]
            place = slice(start, start + int(self.measured.positions[example]))
            length = place.stop - place.start
            inputs[place] = item["input_ids"][:length]
            targets[place] = item["labels"][1 : length + 1]
            documents[place] = number
            start = place.stop
        return inputs, targets, documents
