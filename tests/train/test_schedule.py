"""Learning rates against their closed forms, at every step of the published run."""

import math

import pytest

from phi_lit.train.schedule import SCHEDULES, learning_rate

PEAK, WARMUP, TOTAL = 1e-3, 750, 36_000


def test_linear_schedule_equals_closed_form_at_every_step() -> None:
    for step in range(TOTAL):
        if step < WARMUP:
            expected = PEAK * (step + 1) / WARMUP
        else:
            expected = PEAK * (TOTAL - step) / (TOTAL - WARMUP)
        found = learning_rate(step, "linear", peak=PEAK, warmup=WARMUP, total=TOTAL)
        assert found == pytest.approx(expected, rel=1e-12)


def test_cosine_schedule_equals_closed_form_at_every_step() -> None:
    floor = 4e-5
    for step in range(WARMUP, TOTAL):
        wave = math.cos(math.pi * (step - WARMUP) / (TOTAL - WARMUP))
        expected = floor + (PEAK - floor) * (1 + wave) / 2
        found = learning_rate(step, "cosine", peak=PEAK, floor=floor, warmup=WARMUP, total=TOTAL)
        assert found == pytest.approx(expected, rel=1e-12)


def test_wsd_schedule_equals_closed_form_at_every_step() -> None:
    decay = 3600
    for step in range(WARMUP, TOTAL):
        expected = PEAK * min(1.0, (TOTAL - step) / decay)
        found = learning_rate(step, "wsd", peak=PEAK, warmup=WARMUP, total=TOTAL, decay=decay)
        assert found == pytest.approx(expected, rel=1e-12)


def test_phi_1_base_is_saved_at_a_third_of_the_peak() -> None:
    rate = learning_rate(24_000, "linear", peak=PEAK, warmup=WARMUP, total=TOTAL)
    assert rate / PEAK == pytest.approx(0.3404, abs=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_climbs_to_its_peak_and_ends_no_lower_than_its_floor(name: str) -> None:
    rates = [
        learning_rate(step, name, peak=1.0, floor=0.1, warmup=10, total=100, decay=20)
        for step in range(101)
    ]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == 1.0
    assert min(rates[10:]) >= 0.1
    if name != "constant":
        assert rates[100] == pytest.approx(0.1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_warm_up_starts_at_the_peak(name: str) -> None:
    assert learning_rate(0, name, peak=2.0, warmup=0, total=10, decay=2) == 2.0
