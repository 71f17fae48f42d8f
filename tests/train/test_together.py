"""Ranks that fail alone end together, and one line says why."""

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import train_on_ranks


@pytest.fixture
def small_files_only() -> Any:
    """A file size limit, which the forked ranks inherit: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    "saving",
    [
        {"checkpoint_format": "sharded"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"async_save": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_full_disk_ends_all_ranks_with_one_line(
    tmp_path: Path,
    recipe: Callable[..., dict[str, Any]],
    one_thread: None,
    small_files_only: None,
    saving: dict[str, Any],
) -> None:
    arguments = recipe(tmp_path / "out", strategy="fsdp", train={**saving, "max_steps": 4})
    [(first, said), (second, said_by_other)] = train_on_ranks(arguments)
    assert (first, second) == (1, 0), said + said_by_other
    told = [line for line in said.splitlines() if "phi_lit: error:" in line]
    assert len(told) == 1, said
    assert "cannot write" in told[0]
    assert "error" not in said_by_other
    assert not list((tmp_path / "out").glob("step-*"))
