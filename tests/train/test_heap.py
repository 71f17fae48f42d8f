"""Freed memory is kept, so that a step's tensors are not fresh pages again."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from phi_lit.train.heap import keep_freed_memory

torch.set_num_threads(1)
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.zeros(size << 18) for size in (1, 48, 7, 100)]
    del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words: str, **environment: str) -> tuple[str, list[int]]:
    """Return what the function said, and the page faults of each round over 156 MB."""
    command = [sys.executable, "-c", PROGRAM, *words]
    outer = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        command, env=outer | environment, capture_output=True, text=True, check=True
    )
    said, *counts = done.stdout.split()
    return said, [int(count) for count in counts]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is asked")
def test_freed_memory_is_kept_and_users_settings_stand():
    said, kept = faults("keep")
    if said == "False":
        pytest.skip("another C library")
    assert max(kept[-6:]) < 100
    assert min(faults("don't")[1][-6:]) > 10_000  # 4 KB pages of the two above 32 MB alone
    assert faults("keep", MALLOC_ARENA_MAX="4")[0] == "False"
