"""Held-out batches dealt to ranks: every batch once, and as many rounds on every rank."""

import pytest
import torch

from phi_lit.train.feed import IGNORE, Batch
from phi_lit.train.job_feed import deal


@pytest.mark.parametrize("batches", [1, 4, 5, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_batch_counts_once_on_any_number_of_ranks(batches, world):
    rows = [torch.full((2, 3), number) for number in range(batches)]
    dealt = [list(deal((Batch(r, r) for r in rows), rank, world)) for rank in range(world)]
    assert {len(each) for each in dealt} == {-(-batches // world)}
    counted = [b for each in dealt for b in each if b.n_targets]
    assert sorted(int(b.inputs[0, 0]) for b in counted) == list(range(batches))
    assert all((b.targets == IGNORE).all() for each in dealt for b in each if not b.n_targets)
