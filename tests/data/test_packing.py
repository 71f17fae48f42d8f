"""Packing: the rows as literal lists, the same as a slow packer's, and full enough."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phi_lit.data.packing import Packing, Rows, best_fit


def lengths_in_rows(lengths: list[int], row_length: int) -> list[list[int]]:
    """What `best_fit` makes of these lengths, row by row."""
    found = best_fit(Counter(lengths), row_length)
    return [list(rows.lengths) for rows in found for _ in range(rows.n)]


def slow_best_fit(lengths: list[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing as it is told: one example at a time, every row looked at."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= row_length]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def orca_lengths(n: int, mean: float = 2048 / 2.7, sigma: float = 0.9) -> np.ndarray:
    """Lengths like Orca's: lognormal, cut off at a row, scaled to 2.7 examples per 2,048."""
    drawn = np.random.default_rng(0).lognormal(0, sigma, 3 * n)
    low, high = 10.0, 5000.0
    for _ in range(50):
        scale = (low + high) / 2
        found = np.round(drawn * scale).astype(np.int64)
        found = found[(found >= 16) & (found <= 2048)]
        low, high = (scale, high) if found.mean() < mean else (low, scale)
    return found[:n]


def test_rows_as_literal_lists():
    assert lengths_in_rows([5, 4, 3, 2, 1], 6) == [[4, 2], [5, 1], [3]]
    assert lengths_in_rows([6], 6) == [[6]]
    assert lengths_in_rows([2, 2, 2, 2], 6) == [[2, 2, 2], [2]]
    assert lengths_in_rows([7, 6, 3, 3, 2, 2, 2], 10) == [[7, 3], [6, 3], [2, 2, 2]]
    assert best_fit({4: 1000, 2: 1000}, 6) == [Rows(1000, (4, 2))]


def test_the_fullest_row_is_chosen_where_first_fit_would_take_another():
    # First-fit would put the 3 beside the 5 and need a third row for the last 4.
    assert sorted(lengths_in_rows([6, 5, 4, 3], 9)) == [[5, 4], [6, 3]]


@given(st.integers(1, 40).flatmap(lambda t: st.tuples(st.just(t), st.lists(st.integers(1, t)))))
def test_rows_are_filled_as_by_a_slow_packer(case):
    row_length, lengths = case
    fast, slow = lengths_in_rows(lengths, row_length), slow_best_fit(lengths, row_length)
    assert sorted(map(sum, fast)) == sorted(map(sum, slow))
    assert Counter(length for row in fast for length in row) == Counter(lengths)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a length of 7 does not fit in a row of 6"):
        best_fit({7: 1}, 6)


def test_every_epoch_holds_every_example_once_in_full_rows():
    lengths = np.random.default_rng(1).integers(1, 60, 500)
    packing = Packing(lengths, 64, seed=3)
    rows = {epoch: [packing.row(row, epoch) for row in range(packing.n_rows)] for epoch in range(2)}
    for epoch in rows:
        assert sorted(example for row in rows[epoch] for example in row) == list(range(500))
        assert all(lengths[row].sum() <= 64 for row in rows[epoch])
    assert rows[0] != rows[1], "which examples share a row is drawn anew"
    for one, other in zip(*rows.values(), strict=True):
        assert lengths[one].tolist() == lengths[other].tolist(), "their lengths stay"


def test_rows_are_a_pure_function_of_seed_and_epoch():
    lengths = np.random.default_rng(2).integers(1, 30, 200)
    packing, again = Packing(lengths, 32, seed=7), Packing(lengths, 32, seed=7)
    there = [packing.row(row, 5) for row in range(packing.n_rows)]
    for epoch in (0, 6, 4):  # whatever was asked before
        again.row(0, epoch)
    assert [again.row(row, 5) for row in range(again.n_rows)] == there
    assert [Packing(lengths, 32, seed=8).row(row, 5) for row in range(packing.n_rows)] != there


def test_rows_as_literal_lists_of_examples():
    packing = Packing(np.array([2, 5, 4, 1, 3]), 6, seed=0)
    assert [packing.row(row, 0) for row in range(packing.n_rows)] == [[2, 0], [1, 3], [4]]
    assert packing.useful == 15 / 18


@pytest.mark.parametrize("n", [2_000, 200_000])
@pytest.mark.parametrize("sigma", [0.7, 0.9, 1.2])
def test_at_orcas_lengths_98_percent_of_the_positions_are_useful(n, sigma):
    lengths = orca_lengths(n, sigma=sigma)
    packing = Packing(lengths, 2048, seed=0)
    assert 2.5 < n / packing.n_rows < 2.9
    assert packing.useful >= 0.98
