"""A run that was killed and resumed equals the uninterrupted run to the bit."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import assert_same_to_the_bit, losses, quiet_environment, rows

KILLING = Path(__file__).with_name("killing.py")


def killed_run(arguments: dict[str, Any], *, seed: int, kills: int) -> list[dict[str, Any]]:
    """Run a training through many SIGKILLs; returns where they hit."""
    config = Path(arguments["out_dir"]).with_suffix(".yaml")
    config.write_text(yaml.safe_dump({**arguments, "resume": "auto"}))
    finished = subprocess.run(
        [sys.executable, str(KILLING), str(config), str(seed), str(kills)],
        env=quiet_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    told = finished.stdout.splitlines()
    return [json.loads(line) for line in told if line.startswith('{"steps"')]


@pytest.mark.parametrize(
    ("precision", "kills"),
    [("32-true", 10), pytest.param("bf16-true", 5, marks=pytest.mark.slow), ("bf16-mixed", 5)],
)
def test_killed_and_resumed_run_equals_uninterrupted_run(
    tmp_path: Path,
    train: Callable[..., Path],
    recipe: Callable[..., dict[str, Any]],
    precision: str,
    kills: int,
) -> None:
    """Weights, optimizer state, losses, order; with dropout, over three epoch boundaries."""
    changes: dict[str, Any] = {
        "precision": precision,
        "train": {"max_steps": 96, "save_interval": 3, "keep_last": 3},
        "eval": {"interval": 32},
    }
    whole = train(tmp_path / "whole", **changes)
    assert rows(whole)[-2]["epoch"] > 3.2  # three boundaries were crossed
    hits = killed_run(recipe(tmp_path / "killed", **changes), seed=kills, kills=kills)
    assert len(hits) == kills, "the run ended before all kills were dealt: make it longer"
    assert any(hit["in_a_save"] for hit in hits)
    assert losses(tmp_path / "killed") == losses(whole)
    assert_same_to_the_bit(tmp_path / "killed" / "latest", whole / "latest")


@pytest.mark.slow
def test_many_kills_while_saving_in_the_background(
    tmp_path: Path, train: Callable[..., Path], recipe: Callable[..., dict[str, Any]]
) -> None:
    changes: dict[str, Any] = {
        "train": {"max_steps": 300, "save_interval": 3, "keep_last": 2, "async_save": True},
        "eval": {"interval": 50},
    }
    whole = train(tmp_path / "whole", **changes)
    hits = killed_run(recipe(tmp_path / "killed", **changes), seed=1, kills=60)
    assert len(hits) > 30
    assert losses(tmp_path / "killed") == losses(whole)
    assert_same_to_the_bit(tmp_path / "killed" / "latest", whole / "latest")


def test_sigterm_saves_and_exits_cleanly_and_a_second_resume_works_as_the_first(
    tmp_path: Path, train: Callable[..., Path], recipe: Callable[..., dict[str, Any]]
) -> None:
    changes: dict[str, Any] = {"train": {"max_steps": 60, "save_interval": 1000}}
    whole = train(tmp_path / "whole", **changes)
    arguments = recipe(tmp_path / "stopped", **changes)
    config = tmp_path / "stopped.yaml"
    config.write_text(yaml.safe_dump({**arguments, "resume": "auto"}))
    command = [str(Path(sys.executable).with_name("litgpt")), "pretrain", "--config", str(config)]
    record = tmp_path / "stopped" / "metrics.jsonl"
    for stop_at in (10, 30):
        process = subprocess.Popen(
            command, env=quiet_environment(), stderr=subprocess.PIPE, text=True
        )
        while not record.is_file() or record.read_text().count("loss") < stop_at:
            assert process.poll() is None, "it ended too early"
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
        assert process.returncode == 0, said
        assert "stopped by SIGTERM after step" in said
        assert not (tmp_path / "stopped" / "final").exists()
    subprocess.run(command, env=quiet_environment(), check=True, capture_output=True)
    assert losses(tmp_path / "stopped") == losses(whole)
    assert_same_to_the_bit(tmp_path / "stopped" / "latest", whole / "latest")


def test_a_run_can_be_stopped_by_time_and_go_on(tmp_path: Path, train: Callable[..., Path]) -> None:
    whole = train(tmp_path / "whole")
    stopped = train(tmp_path / "stopped", train={"max_time": 1e-6})
    assert len(losses(stopped)) == 1
    train(stopped, resume="auto")
    assert_same_to_the_bit(stopped / "latest", whole / "latest")


def test_a_newest_checkpoint_cut_short_is_passed_over_by_name(
    tmp_path: Path, train: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = train(tmp_path / "run")
    expected = losses(whole)
    state = whole / "step-00000012" / "training_state.pth"
    state.write_bytes(state.read_bytes()[:1000])
    train(whole, resume="auto")
    said = capsys.readouterr().out
    assert "passing over a checkpoint" in said
    assert "training_state.pth has 1000 bytes" in said
    assert "resuming after step 8" in said
    assert losses(whole) == expected


def test_a_finished_run_resumed_does_nothing(tmp_path: Path, train: Callable[..., Path]) -> None:
    done = train(tmp_path / "run")
    before = (done / "latest" / "lit_model.pth").stat().st_mtime_ns
    train(done, resume="auto")
    assert (done / "latest" / "lit_model.pth").stat().st_mtime_ns == before
