"""Learning rates as pure functions of the optimizer step.

A rate depends on nothing but numbers, so that a resumed run needs no scheduler state and a test can
check every step against the closed form. Steps count from 0: the rate returned for `step` is the
one that optimizer step uses. Paper: section 2.3 (linear warm-up, linear decay).
"""

import math
from collections.abc import Callable


def warmed(step: int, *, peak: float, warmup: int) -> float:
    """The straight climb: `peak * (step + 1) / warmup`, reaching `peak` at step `warmup - 1`."""
    return peak * (step + 1) / warmup


def share_left(step: int, *, start: int, end: int) -> float:
    """How much of the way from `start` to `end` still lies ahead at `step`: from 1 down to 0."""
    if end <= start:
        return 0.0
    return min(1.0, max(0.0, (end - step) / (end - start)))


def linear(step: int, *, peak: float, floor: float, warmup: int, total: int, decay: int) -> float:
    """A straight climb, then a straight fall that would reach `floor` at step `total`."""
    return floor + (peak - floor) * share_left(step, start=warmup, end=total)


def cosine(step: int, *, peak: float, floor: float, warmup: int, total: int, decay: int) -> float:
    """A straight climb, then half a cosine wave down to `floor` at step `total`."""
    passed = 1 - share_left(step, start=warmup, end=total)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * passed))


def wsd(step: int, *, peak: float, floor: float, warmup: int, total: int, decay: int) -> float:
    """Warm-up, a stable plateau, and a straight fall over the last `decay` steps."""
    return floor + (peak - floor) * share_left(step, start=total - decay, end=total)


def constant(step: int, *, peak: float, floor: float, warmup: int, total: int, decay: int) -> float:
    """Warm-up, then `peak` for good."""
    return peak


SCHEDULES: dict[str, Callable[..., float]] = {
    "linear": linear,
    "cosine": cosine,
    "wsd": wsd,
    "constant": constant,
}


def learning_rate(
    step: int,
    name: str,
    *,
    peak: float,
    floor: float = 0.0,
    warmup: int,
    total: int,
    decay: int = 0,
) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    Args:
        step: the optimizer step, from 0 to `total - 1`.
        name: one of `SCHEDULES`.
        peak: the highest rate, reached at the end of the warm-up.
        floor: what the fall ends at.
        warmup: steps of the straight climb; 0 starts at the peak.
        total: steps that the schedule is aimed at (a run may stop earlier).
        decay: steps of the final fall, for wsd.
    """
    if step < warmup:
        return warmed(step, peak=peak, warmup=warmup)
    return SCHEDULES[name](step, peak=peak, floor=floor, warmup=warmup, total=total, decay=decay)
