import io

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric

from phi_lit.data.rows import RowLoader, RowOrder, count_rows
from phi_lit.data.tokens import TokenArray


@pytest.fixture
def tokens(tmp_path):
    """40 ids, 0..39, in shards of 13, 1, 0 and 26."""
    ids = np.arange(40, dtype="<u2")
    paths, start = [], 0
    for i, length in enumerate((13, 1, 0, 26)):
        paths.append(tmp_path / f"{i}.bin")
        ids[start : start + length].tofile(paths[-1])
        start += length
    return TokenArray(paths, [13, 1, 0, 26], np.dtype("<u2"))


def loader(tokens, **kwargs) -> RowLoader:
    return RowLoader(tokens, **{"row_length": 4, "micro_batch": 2, "seed": 1, **kwargs})


def take(loader, n) -> list[list[list[int]]]:
    batches = iter(loader)
    return [next(batches).tolist() for _ in range(n)]


# ----------------------------------------------------------------------------------------- array


def test_slices_span_shards(tokens):
    assert len(tokens) == 40
    for start in range(40):
        for stop in range(start, 41):
            assert tokens[start:stop].tolist() == list(range(start, stop))
    assert tokens[-3:].tolist() == [37, 38, 39]


# ----------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_every_epoch_deals_every_row_once(n):
    order = RowOrder(3, n)
    dealt = order.rows(0, 3 * n).reshape(3, n)
    assert (np.sort(dealt, axis=1) == np.arange(n)).all()


def test_the_order_is_what_it_was_in_every_version():
    """Golden: another order would make every old run impossible to resume."""
    assert RowOrder(42, 10).rows(0, 20).tolist() == GOLDEN_10
    assert RowOrder(1, 1_000_003).rows(1_000_000, 5).tolist() == GOLDEN_MILLION
    assert RowOrder(-7, 2**33).rows(2**33 - 2, 4).tolist() == GOLDEN_LARGE


GOLDEN_10 = [8, 5, 0, 3, 6, 4, 9, 2, 7, 1, 8, 5, 1, 6, 7, 3, 4, 0, 9, 2]
GOLDEN_MILLION = [645704, 296470, 921145, 286210, 3574]
GOLDEN_LARGE = [1621376813, 6405115064, 4113610198, 7209625214]


def slow_place(seed: int, n: int, epoch: int, place: int) -> int:
    """The same permutation, one place at a time in Python's own integers."""
    full = (1 << 64) - 1
    step = 0x9E3779B97F4A7C15

    def mix(x):
        x = (x + step) & full
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & full
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & full
        return x ^ (x >> 31)

    half = 1
    while 4**half < n:
        half += 1
    state = mix(mix(seed & full) ^ epoch)
    keys = [mix((state + i * step) & full) for i in range(1, 9)]
    while True:
        left, right = place >> half, place % 2**half
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) % 2**half)
        place = left * 2**half + right
        if place < n:
            return place


@pytest.mark.parametrize("n", [1, 2, 5, 16, 17, 1000, 70_001, 2**40 + 5])
def test_the_order_equals_its_slow_double(n):
    for seed, epoch in ((0, 0), (42, 3), (-1, 7)):
        places = [place % n for place in (0, 1, 2, n // 2, n - 1)]
        expected = [slow_place(seed, n, epoch, place) for place in places]
        assert RowOrder(seed, n).in_epoch(epoch, np.array(places)).tolist() == expected


def test_the_order_is_a_pure_function_of_seed_epoch_and_place():
    straight = RowOrder(5, 777).rows(0, 5000)
    order = RowOrder(5, 777)
    for first in np.random.default_rng(0).integers(0, 4900, 200).tolist():
        assert (order.rows(first, 100) == straight[first : first + 100]).all()
    assert (RowOrder(6, 777).rows(0, 777) != straight[:777]).any()
    assert (straight[777:1554] != straight[:777]).any()


@pytest.mark.parametrize(("n", "seeds"), [(10, 1000), (100, 500)])
def test_every_row_is_equally_likely_at_every_place(n, seeds):
    """Chi-squared over many seeds: its mean is 1 per degree of freedom for a fair shuffle."""
    seen = np.zeros((n, n))
    for seed in range(seeds):
        seen[np.arange(n), RowOrder(seed, n).in_epoch(0, np.arange(n))] += 1
    expected = seeds / n
    assert ((seen - expected) ** 2 / expected).sum() / (n - 1) ** 2 < 1.5


def test_neighbours_are_torn_apart():
    """A fair shuffle leaves 1 pair of neighbours and 1 fixed row on average, whatever the size."""
    pairs = fixed = 0
    for seed in range(200):
        dealt = RowOrder(seed, 1000).in_epoch(0, np.arange(1000))
        pairs += int((np.diff(dealt) == 1).sum())
        fixed += int((dealt == np.arange(1000)).sum())
    assert 140 < pairs < 260
    assert 140 < fixed < 260


# ---------------------------------------------------------------------------------------- loader


def test_rows_overlap_by_the_one_token_that_is_the_last_target(tokens):
    rows = loader(tokens)
    assert rows.n_rows == count_rows(40, 4) == 9
    dealt = rows.rows(0, 9)
    assert dealt.dtype == torch.int64
    starts = sorted(dealt[:, 0].tolist())
    assert starts == [0, 4, 8, 12, 16, 20, 24, 28, 32]
    assert (dealt == dealt[:, :1] + torch.arange(5)).all()


@pytest.mark.parametrize(("length", "rows"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_only_whole_rows_count(length, rows):
    assert count_rows(length, 4) == rows


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_sees_the_same_rows_at_the_same_time(tokens, world):
    """Global slices of 8 rows: 4 micro-batches of 2 on one rank, 2 each on two, 1 each on four."""
    alone = take(loader(tokens), 12)
    ranks = [take(loader(tokens, rank=rank, world=world), 12 // world) for rank in range(world)]
    together = [ranks[rank][step] for step in range(12 // world) for rank in range(world)]
    assert together == alone


def test_batches_straddle_epochs_without_losing_a_row(tokens):
    dealt = torch.tensor(take(loader(tokens), 9)).reshape(18, 5)[:, 0] // 4
    assert sorted(dealt[:9].tolist()) == list(range(9))
    assert sorted(dealt[9:].tolist()) == list(range(9))
    assert dealt.tolist() == RowOrder(1, 9).rows(0, 18).tolist()


@pytest.mark.parametrize("taken", [0, 1, 4, 5, 13])
def test_a_loader_goes_on_where_its_state_was_saved(tokens, taken):
    whole = take(loader(tokens), 20)
    first = loader(tokens)
    assert take(first, taken) == whole[:taken]
    second = loader(tokens)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == {"position": 2 * taken}
    assert take(second, 20 - taken) == whole[taken:]


def test_ranks_may_change_between_runs(tokens):
    alone = take(loader(tokens), 8)
    pair = [loader(tokens, rank=rank, world=2) for rank in range(2)]
    before = [take(each, 2) for each in pair]
    assert [before[rank][step] for step in range(2) for rank in range(2)] == alone[:4]
    resumed = loader(tokens)
    resumed.load_state_dict(pair[0].state_dict())
    assert take(resumed, 4) == alone[4:]


def test_validation_is_one_pass_that_starts_over(tokens):
    rows = loader(tokens, endless=False)
    first, second = list(rows), list(rows)
    assert len(first) == len(rows) == 4  # 9 rows: the one left over makes no whole batch
    assert all(map(torch.equal, first, second))
    starts = torch.cat(first)[:, 0].tolist()
    assert len(set(starts)) == 8
    assert rows.state_dict() == {"position": 0}


def test_validation_of_fewer_rows_than_ranks_gives_every_rank_a_batch(tokens):
    for rank in range(8):
        (batch,) = loader(tokens, endless=False, rank=rank, world=8)
        assert batch.shape == (2, 5)


def test_fabric_takes_it_as_it_is_and_saves_a_number(tokens, tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    mine = loader(tokens)
    wrapped = fabric.setup_dataloaders(mine)
    batches = iter(wrapped)
    expected = take(loader(tokens), 3)
    assert [next(batches).tolist() for _ in range(2)] == expected[:2]
    fabric.save(tmp_path / "state.pt", {"train_dataloader": wrapped})
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert saved == {"train_dataloader": {"position": 4}}
    assert (tmp_path / "state.pt").stat().st_size < 2000
    again = fabric.setup_dataloaders(loader(tokens))
    fabric.load(tmp_path / "state.pt", {"train_dataloader": again})
    assert next(iter(again)).tolist() == expected[2]


def test_pickling_the_state_touches_no_data(tokens):
    buffer = io.BytesIO()
    torch.save(loader(tokens).state_dict(), buffer)
    assert buffer.tell() < 2000
