"""Real processes over gloo: the same order and the same training on any number of ranks."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import train_on_ranks
from runs import assert_same_to_the_bit, losses, quiet_environment, rows

LITGPT = str(Path(sys.executable).with_name("litgpt"))
NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}  # see test_loop


@pytest.fixture
def launch(recipe: Callable[..., dict[str, Any]], one_thread: None) -> Callable[..., Path]:
    """Trains on several processes; returns the output directory."""

    def run(out_dir: Path, *, devices: int, **changes: Any) -> Path:
        for code, said in train_on_ranks(recipe(out_dir, **changes), devices):
            assert code == 0, said[-4000:]
        return out_dir

    return run


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    first = torch.load(one / "final" / "lit_model.pth", weights_only=True)["model"]
    second = torch.load(other / "final" / "lit_model.pth", weights_only=True)["model"]
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=0, atol=tolerance), name


def test_the_command_starts_its_processes_itself(
    tmp_path: Path, train: Callable[..., Path], recipe: Callable[..., dict[str, Any]]
) -> None:
    plain = {"optimizer": SGD, "train": {**NO_DROPOUT, "micro_batch_size": 2}}
    one = train(tmp_path / "one", **plain)
    two = recipe(tmp_path / "two", strategy="ddp", devices=2, **plain)
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(two))
    done = subprocess.run(
        [LITGPT, "pretrain", "--config", str(config)],
        env=quiet_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(one), abs=1e-5)
    assert_close(tmp_path / "two", one, tolerance=2e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(
    tmp_path: Path, train: Callable[..., Path], launch: Callable[..., Path], strategy: str
) -> None:
    held_out = {"interval": 6, "max_iters": 3}  # two batches on one rank, one on the other
    one = train(
        tmp_path / "one", optimizer=SGD, eval=held_out,
        train={**NO_DROPOUT, "micro_batch_size": 2},
    )  # fmt: skip
    two = launch(
        tmp_path / "two",
        strategy=strategy,
        devices=2,
        optimizer=SGD,
        eval=held_out,
        train={**NO_DROPOUT, "micro_batch_size": 2, "activation_checkpointing": "full"},
    )
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    val = [[row["val_loss"] for row in rows(each) if "val_loss" in row] for each in (one, two)]
    assert len(val[0]) == 2
    assert val[1] == pytest.approx(val[0], abs=1e-5)
    assert_close(two, one, tolerance=2e-5)


def test_saved_on_two_ranks_resumed_on_one_and_the_other_way(
    tmp_path: Path, train: Callable[..., Path], launch: Callable[..., Path]
) -> None:
    half = {**NO_DROPOUT, "max_steps": 8, "lr_total_steps": 12}
    rest = {**NO_DROPOUT, "lr_total_steps": 12}
    whole = train(tmp_path / "whole", optimizer=SGD, train=NO_DROPOUT)
    two = launch(
        tmp_path / "two", strategy="fsdp", devices=2, optimizer=SGD,
        train={**half, "checkpoint_format": "sharded"},
    )  # fmt: skip
    half_way = torch.load(two / "final" / "lit_model.pth", weights_only=True)["model"]
    assert half_way["lm_head.weight"].shape == (512, 64), "final/ holds whole tensors"
    train(two, optimizer=SGD, train=rest, resume="auto")
    assert losses(two) == pytest.approx(losses(whole), abs=1e-5)
    assert_close(two, whole, tolerance=2e-5)
    one = train(tmp_path / "one", optimizer=SGD, train=half)
    launch(one, strategy="fsdp", devices=2, optimizer=SGD, train=rest, resume="auto")
    assert losses(one) == pytest.approx(losses(whole), abs=1e-5)
    assert_close(one, whole, tolerance=2e-5)


def test_two_sharded_ranks_resume_to_the_bit_with_dropout(
    tmp_path: Path, launch: Callable[..., Path]
) -> None:
    sharded = {"strategy": "fsdp", "devices": 2}
    whole = launch(tmp_path / "whole", **sharded)
    half = launch(tmp_path / "half", **sharded, train={"max_steps": 8, "lr_total_steps": 12})
    launch(half, **sharded, train={"lr_total_steps": 12}, resume="auto")
    assert losses(half) == losses(whole)
    assert_same_to_the_bit(half / "latest", whole / "latest")


def test_blocks_gathered_in_bf16_train_as_one_process_and_resume_to_the_bit(
    tmp_path: Path, train: Callable[..., Path], launch: Callable[..., Path]
) -> None:
    mixed = {"precision": "bf16-mixed", "optimizer": SGD}
    sharded = {**mixed, "strategy": "fsdp", "devices": 2}
    recipe = {**NO_DROPOUT, "micro_batch_size": 2}
    # One step differs by the last bit of the gradients' norm, which scales them; later on bf16
    # rounds weights that differ by so little to different numbers.
    one = train(tmp_path / "one", **mixed, train={**recipe, "max_steps": 1})
    first = launch(tmp_path / "first", **sharded, train={**recipe, "max_steps": 1})
    assert_close(first, one, tolerance=1e-8)
    two = launch(tmp_path / "two", **sharded, train=recipe)
    half = {**recipe, "max_steps": 8, "lr_total_steps": 12, "activation_checkpointing": "full"}
    part = launch(tmp_path / "part", **sharded, train=half)
    launch(part, **sharded, train={**recipe, "lr_total_steps": 12}, resume="auto")
    assert losses(part) == losses(two)
    assert_same_to_the_bit(part / "latest", two / "latest")


@pytest.mark.slow
def test_four_ranks_train_as_one(
    tmp_path: Path, train: Callable[..., Path], launch: Callable[..., Path]
) -> None:
    one = train(tmp_path / "one", optimizer=SGD, train={**NO_DROPOUT, "micro_batch_size": 2})
    four = launch(
        tmp_path / "four", strategy="fsdp", sharding="grad_op", devices=4, optimizer=SGD,
        train={**NO_DROPOUT, "micro_batch_size": 2},
    )  # fmt: skip
    assert losses(four) == pytest.approx(losses(one), abs=1e-5)


def test_a_stop_asked_of_one_rank_saves_and_ends_both(
    tmp_path: Path, recipe: Callable[..., dict[str, Any]]
) -> None:
    out = tmp_path / "out"
    arguments = recipe(
        out, strategy="ddp", devices=2, train={"max_steps": 2000, "save_interval": 5000}
    )
    config = tmp_path / "out.yaml"
    config.write_text(yaml.safe_dump(arguments))
    process = subprocess.Popen(
        [LITGPT, "pretrain", "--config", str(config)],
        env=quiet_environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (out / "metrics.jsonl").is_file() or len(losses(out)) < 3:
        assert process.poll() is None, "it ended too early"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # to the first rank only
    said = process.communicate()[1]
    assert process.returncode == 0, said[-3000:]
    assert "stopped by SIGTERM after step" in said
    assert (out / "latest" / "training_state.pth").is_file()
