"""Scrambling 64 bits: splitmix64, the one source of seeds and orders.

Integer arithmetic of this file and nothing else, so that what follows from it (the order of rows,
the seeds of dropout masks) never changes with a library's version.
"""

import numpy as np

MASK = (1 << 64) - 1
"""Keeps a Python integer within 64 bits."""


def mix(x: int) -> int:
    """Scramble 64 bits: one step and the finalizer of splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def mix_array(x: np.ndarray) -> np.ndarray:
    """Do what `mix` does, for an array of uint64 (whose arithmetic wraps around by itself)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
