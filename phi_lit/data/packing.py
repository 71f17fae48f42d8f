"""Packing: several examples into one row, so that few positions are padding.

Best-fit decreasing: examples from long to short, each into the fullest row that still has room for
it. Examples of one length are alike, so lengths are counted and whole groups of rows filled at
once: the work depends on the number of different lengths, not of examples. What is fixed are the
lengths in each row; which example of a length lies where is drawn anew in every epoch.

Letters: T positions in a row. An example of n ids takes n - 1 positions: its last id is a target
only.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from phi_lit.scramble import MASK, mix, mix_array


class Rows(NamedTuple):
    """Rows that hold the same lengths."""

    n: int
    """How many there are."""
    lengths: tuple[int, ...]
    """What lies in each, in falling order."""


def best_fit(histogram: dict[int, int], row_length: int) -> list[Rows]:
    """Pack by best-fit decreasing: each length into the fullest row with room for it.

    Args:
        histogram: how many examples there are of each length, in positions.
        row_length: T.

    Returns:
        The rows, grouped by what they hold, in the order in which they were filled up.

    Raises:
        ValueError: a length is below 1 or above T.
    """
    wrong = [length for length in histogram if not 1 <= length <= row_length]
    if wrong:
        raise ValueError(f"a length of {wrong[0]} does not fit in a row of {row_length}")
    groups: dict[int, list[Rows]] = {}
    """By the room left."""
    rooms: list[int] = []
    """The rooms of which there are groups, sorted."""

    def put(room: int, rows: Rows) -> None:
        if room not in groups:
            groups[room] = []
            insort(rooms, room)
        groups[room].append(rows)

    for length in sorted(histogram, reverse=True):
        left = histogram[length]
        while left:
            place = bisect_left(rooms, length)
            if place == len(rooms):  # nowhere: open as many new rows as all that are left take
                room, rows = row_length, Rows(left, ())
            else:
                room = rooms[place]
                rows = groups[room].pop()
                if not groups[room]:
                    del groups[room], rooms[place]
            # The fullest row stays the fullest while it takes more of the same length.
            each = room // length
            full, rest = divmod(min(left, rows.n * each), each)
            left -= full * each + rest
            if full:
                put(room - each * length, Rows(full, rows.lengths + (length,) * each))
            if rest:
                put(room - rest * length, Rows(1, rows.lengths + (length,) * rest))
            untouched = rows.n - full - bool(rest)
            if untouched and rows.lengths:
                put(room, rows._replace(n=untouched))
    return [rows for room in rooms for rows in groups[room]]


class Packing:
    """Which examples lie together in a row, for every epoch.

    Args:
        lengths: the positions that each example takes (int64).
        row_length: T.
        seed: decides which examples of one length change places in an epoch.

    Attributes:
        n_rows: rows in an epoch, the same in each.
        lengths: as given.
    """

    def __init__(self, lengths: np.ndarray, row_length: int, seed: int) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.row_length, self._seed = row_length, seed
        values, counts = np.unique(self.lengths, return_counts=True)
        histogram = dict(zip(values.tolist(), counts.tolist(), strict=True))
        rows = best_fit(histogram, row_length)
        self.n_rows = sum(each.n for each in rows)
        sizes = np.repeat([len(each.lengths) for each in rows], [each.n for each in rows])
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._slots = np.concatenate(list(_slots(rows, histogram)))
        self._orders: dict[int, np.ndarray] = {}

    def row(self, number: int, epoch: int) -> list[int]:
        """Return the examples in a row, from long to short."""
        slots = self._slots[self._starts[number] : self._starts[number + 1]]
        return self._order(epoch)[slots].tolist()

    @property
    def useful(self) -> float:
        """The share of positions that are not padding."""
        return float(self.lengths.sum() / (self.n_rows * self.row_length))

    def _order(self, epoch: int) -> np.ndarray:
        """Return the examples from long to short, those of one length in an order of the epoch."""
        if epoch not in self._orders:
            key = np.uint64(mix(mix(self._seed & MASK) ^ epoch))
            drawn = mix_array(np.arange(len(self.lengths), dtype=np.uint64) ^ key)
            # A micro-batch may lie across the border of two epochs: two are kept.
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.lexsort((drawn, -self.lengths))
        return self._orders[epoch]


def _slots(rows: list[Rows], histogram: dict[int, int]) -> Iterator[np.ndarray]:
    """Yield the places of each row's examples among all, sorted from long to short."""
    free, start = {}, 0
    for length in sorted(histogram, reverse=True):
        free[length] = start
        start += histogram[length]
    for each in rows:
        columns = []
        for length in sorted(set(each.lengths), reverse=True):
            times = each.lengths.count(length)
            places = np.arange(free[length], free[length] + each.n * times)
            columns.append(places.reshape(each.n, times))
            free[length] += each.n * times
        yield np.concatenate(columns, axis=1).ravel()
