"""Choosing tokens: against PyTorch's functions, LitGPT's filters, closed-form frequencies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from litgpt.generate.base import sample_top_p

from phi_lit.generate.sampling import (
    Sampling,
    argmax,
    choose,
    gumbel,
    largest,
    position_keys,
    sample_key,
)

DRAWS = 10_000


def keys(n: int, seed: int = 0) -> np.ndarray:
    return position_keys([sample_key(seed, 0, i) for i in range(n)], [0] * n)


def draw(logits_V: torch.Tensor, sampling: Sampling) -> np.ndarray:
    """Return the frequencies of many choices from one row of logits."""
    counts = np.zeros(len(logits_V))
    for part in keys(DRAWS).reshape(10, -1):
        chosen = choose(logits_V.expand(len(part), -1), sampling, part)
        counts += np.bincount(chosen.numpy(), minlength=len(logits_V))
    return counts


def assert_frequencies(counts: np.ndarray, p: torch.Tensor) -> None:
    """Chi-square at 5 standard deviations; nothing outside the support is ever chosen."""
    p = p.double().numpy()
    assert counts[p == 0].sum() == 0
    expected = p * counts.sum()
    many = expected >= 5
    chi = ((counts[many] - expected[many]) ** 2 / expected[many]).sum()
    assert chi < many.sum() + 5 * math.sqrt(2 * many.sum())


def litgpts_distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What LitGPT's `sample` draws from: top-k, temperature, top-p, one row, in its own words."""
    if sampling.top_k is not None:
        v, i = torch.topk(logits, min(sampling.top_k, logits.size(-1)))
        logits = torch.full_like(logits, float("-inf")).scatter_(-1, i, v)
    logits = logits / sampling.temperature
    if sampling.top_p < 1.0:
        logits = sample_top_p(logits, sampling.top_p)
    return logits.softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(1.0, top_k=7),
        Sampling(1.3, top_k=40, top_p=0.8),
        Sampling(0.7, top_p=0.6),
        Sampling(2.0, top_p=0.97),
        Sampling(1.0, top_p=1e-9),
        Sampling(1.0, top_k=10**6),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [1000])
def test_tokens_come_as_often_as_from_litgpts_distribution(one_thread, sampling, vocabulary):
    torch.manual_seed(1)
    logits = torch.randn(vocabulary) * 2
    assert_frequencies(draw(logits, sampling), litgpts_distribution(logits, sampling))


def test_a_nucleus_wider_than_the_first_try_is_still_exact(one_thread):
    logits = torch.randn(1400, generator=torch.Generator().manual_seed(0)) / 4
    sampling = Sampling(1.0, top_p=0.9)
    expected = litgpts_distribution(logits, sampling)
    assert (expected > 0).sum() > 512
    assert_frequencies(draw(logits, sampling), expected)


@pytest.mark.parametrize(
    ("thres", "vocabulary", "kept"),
    [(0.9, 51_200, 5120), (0.7, 10, 3), (0.0, 50, 50), (0.999, 257, 1), (0.5, 257, 129)],
)
def test_filter_thres_keeps_that_share_of_the_vocabulary(thres, vocabulary, kept):
    assert Sampling(filter_thres=thres).kept(vocabulary) == kept


@pytest.mark.parametrize("thres", [0.9, 0.5])
def test_filter_thres_is_top_k_in_other_words(one_thread, thres):
    logits = torch.randn(2600, generator=torch.Generator().manual_seed(3))
    k = Sampling(filter_thres=thres).kept(2600)
    expected = litgpts_distribution(logits, Sampling(1.0, top_k=k))
    assert_frequencies(draw(logits, Sampling(1.0, filter_thres=thres)), expected)


@given(
    st.integers(1, 700), st.integers(1, 5), st.integers(0, 2**31), st.sampled_from([1, 3, 50, 400])
)
@settings(max_examples=40, deadline=None)
def test_argmax_and_largest_are_pytorchs(vocabulary, rows, seed, k):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 50, (rows, vocabulary), generator=generator).float()  # with equals
    assert torch.equal(argmax(logits), logits.argmax(-1))
    logits = torch.randn(rows, vocabulary, generator=generator)
    k = min(k, vocabulary)
    for ours, theirs in zip(largest(logits, k), logits.topk(k), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0), Sampling(1.0), Sampling(top_k=20), Sampling(top_p=0.9), Sampling(1, None, 0.99)],
    ids=str,
)
def test_a_row_is_chosen_the_same_in_any_company(one_thread, sampling):
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(0)) * 2
    together = choose(logits, sampling, keys(40))
    alone = [choose(logits[i : i + 1], sampling, keys(40)[i : i + 1]) for i in range(40)]
    assert together.tolist() == [int(one) for one in alone]
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = choose(logits[order], sampling, keys(40)[order.numpy()])
    assert shuffled.tolist() == together[order].tolist()


def test_noise_is_standard_gumbel_and_differs_in_every_coordinate(one_thread):
    tokens = np.arange(50)
    noise = gumbel(keys(2000), np.broadcast_to(tokens, (2000, 50)))
    ordered = np.sort(noise.ravel())
    rank = np.arange(1, len(ordered) + 1) / len(ordered)
    assert np.abs(np.exp(-np.exp(-ordered)) - rank).max() * math.sqrt(len(ordered)) < 2.2  # 1e-4
    assert abs(np.corrcoef(noise[:, 0], noise[:, 1])[0, 1]) < 0.1
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.02
    places = {
        sample_key(seed, prompt, sample)
        for seed in range(-2, 10)
        for prompt in range(20)
        for sample in range(20)
    }
    assert len(places) == 12 * 20 * 20


def test_rounding_errors_of_the_logits_hardly_ever_turn_a_choice(one_thread):
    logits = torch.randn(4000, 500, generator=torch.Generator().manual_seed(0))
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=50), Sampling(1.0, top_p=0.9)):
        before = choose(logits, sampling, keys(4000))
        after = choose(logits * (1 + 1e-6), sampling, keys(4000))
        assert (before != after).sum() <= 4


def test_impossible_settings_are_all_told():
    faults = Sampling(-1, top_k=0, top_p=1.5, filter_thres=1.0).faults()
    assert len(faults) == 5
    assert not Sampling(0, top_k=1, top_p=1.0).faults()
    assert Sampling(float("nan")).faults()
    assert Sampling(top_p=0.0).faults()
