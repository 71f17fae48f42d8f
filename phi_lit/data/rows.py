"""Rows of a token array, in an order that is a pure function of numbers.

Row i of a split is `tokens[i * T : i * T + T + 1]`: the paper's slicing of one flat array into
sequences of T, each with the one token more that is the last target. The order of rows in an epoch
is computed, never stored: the place in training is one number, resuming costs nothing, and any
number of ranks deal the same rows to the same steps.

Letters: T tokens in a row (the model's context), M rows in a micro-batch, W ranks.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from phi_lit.data.tokens import TokenArray
from phi_lit.scramble import MASK, mix, mix_array

_ROUNDS = 8
VAL_SEED = 0
"""The validation rows are always dealt in this order: the first ones come from all sources."""


class RowOrder:
    """A permutation of `range(n_rows)` for every epoch, computed place by place.

    A Feistel network of keyed hashes permutes the smallest domain of 4^h places that holds all
    rows; places that fall outside walk on until they are inside. Only 64-bit integer arithmetic of
    this file is involved, so the order never changes with a library's version.
    """

    def __init__(self, seed: int, n_rows: int) -> None:
        if n_rows < 1:
            raise ValueError("an order needs at least one row")
        self.seed, self.n_rows = seed, n_rows
        # A few rows cost as much to compute as many, so they come in blocks (of few epochs).
        self._block_rows = min(1024, 4 * n_rows)
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self._half_bits = max(1, (max(n_rows - 1, 1).bit_length() + 1) // 2)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Return the rows at places `first` to `first + count`, counted through all epochs."""
        size = self._block_rows
        blocks = range(first // size, (first + count - 1) // size + 1)
        dealt = np.concatenate([self._in_block(number) for number in blocks])
        start = first % size
        return dealt[start : start + count]

    def _in_block(self, number: int) -> np.ndarray:
        if self._block[0] != number:
            first = number * self._block_rows
            places = np.arange(first, first + self._block_rows, dtype=np.uint64)
            self._block = number, self._compute(places)
        return self._block[1]

    def _compute(self, places: np.ndarray) -> np.ndarray:
        epochs = places // np.uint64(self.n_rows)
        places = places % np.uint64(self.n_rows)
        out = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            out[mine] = self.in_epoch(epoch, places[mine])
        return out

    def in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Return the rows at these places (below `n_rows`) of an epoch."""
        keys = _round_keys(self.seed, epoch)
        found = np.asarray(places, np.uint64).copy()
        walking = np.arange(len(found))
        while len(walking):  # each step leaves at most 3/4 outside, on average
            found[walking] = self._permute(found[walking], keys)
            walking = walking[found[walking] >= self.n_rows]
        return found.astype(np.int64)

    def _permute(self, places: np.ndarray, keys: list[np.uint64]) -> np.ndarray:
        bits, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        left, right = places >> bits, places & mask
        for key in keys:
            left, right = right, left ^ (mix_array(right ^ key) & mask)
        return (left << bits) | right


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    state = mix(mix(seed & MASK) ^ epoch)
    keys = []
    for _ in range(_ROUNDS):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        keys.append(np.uint64(mix(state)))
    return keys


class _NoLength(IterableDataset):  # type: ignore[misc]
    """What Fabric looks for in a loader that shards by itself: it puts no sampler around it."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        raise TypeError("rows are dealt by RowLoader")


class RowLoader(DataLoader):  # type: ignore[misc]
    """Deals micro-batches of rows to one rank; its whole state is `position`.

    Rows p to p + M * W of the endless sequence go to the ranks in blocks of M. A training loader
    never ends and goes on where it was left. A validation loader (`endless=False`) starts over each
    time and stops after the last whole slice of M * W rows (repeating rows if there is no whole
    one, so that every rank has a batch).

    Being a `DataLoader` with a `state_dict` is what makes Fabric, and LitGPT's own pretraining
    loop, take it as it is and save a number instead of pickling the data.

    Args:
        tokens: the split.
        row_length: T; rows have one token more.
        micro_batch: M.
        seed: decides the order.
        endless: epoch after epoch, or a single pass each time.
        rank, world: this rank and the number of ranks; by default what torch.distributed says.
    """

    def __init__(
        self,
        tokens: TokenArray,
        *,
        row_length: int,
        micro_batch: int,
        seed: int,
        endless: bool = True,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        super().__init__(_NoLength(), batch_size=None)
        self.n_rows = count_rows(len(tokens), row_length)
        self.order = RowOrder(seed, self.n_rows)
        self.row_length, self.micro_batch, self.endless = row_length, micro_batch, endless
        self.rank = _distributed("get_rank", 0) if rank is None else rank
        self.world = _distributed("get_world_size", 1) if world is None else world
        self.position = 0
        """Rows of the endless sequence that all ranks together have been dealt."""
        self._tokens = tokens

    def __len__(self) -> int:
        """Return the micro-batches that a rank gets in an epoch."""
        return max(1, self.n_rows // (self.micro_batch * self.world))

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self.endless:
            while True:
                # The position moves on before the batch is out: whoever saves it after having
                # trained on the batch saves the place of the next one.
                first = self.position
                self.position += self.micro_batch * self.world
                yield self.rows(first + self.rank * self.micro_batch, self.micro_batch)
        for number in range(len(self)):
            yield self.rows((number * self.world + self.rank) * self.micro_batch, self.micro_batch)

    def rows(self, first: int, count: int) -> torch.Tensor:
        """Return rows `first` to `first + count` of the endless sequence: int64, (count, T + 1)."""
        out = np.empty((count, self.row_length + 1), np.int64)
        for row, at in zip(self.order.rows(first, count).tolist(), out, strict=True):
            self._tokens.read(row * self.row_length, at)
        return torch.from_numpy(out)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the endless sequence."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place: the next batch is the one that would have come."""
        self.position = int(state["position"])


def count_rows(tokens: int, row_length: int) -> int:
    """Return how many rows of `row_length` + 1 overlapping by one token fit into `tokens`."""
    return max(tokens - 1, 0) // row_length


def _distributed(question: str, alone: int) -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return int(getattr(torch.distributed, question)())
    return alone
