"""DeepSpeed's ZeRO on two gloo processes: the same training and the same checkpoints as without.

DeepSpeed's CPU backend runs the very code that shards on GPUs, offloading included.
"""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Fabric
from litgpt.config import Config
from litgpt.model import GPT
from ranks import on_ranks, train_on_ranks
from runs import assert_same_to_the_bit, losses, merged, rows, tensors

from phi_lit.errors import UserError
from phi_lit.registry import MODELS
from phi_lit.train.deepspeed import BUCKET, ELEMENTWISE, check_deepspeed, config_of
from phi_lit.train.layout import Layout
from phi_lit.train.memory import predict
from phi_lit.train.model import LossModel
from phi_lit.train.strategy import make_strategy

pytest.importorskip("deepspeed", reason="strategy deepspeed needs its package")

NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}  # see test_loop
PLAIN = {"optimizer": SGD, "train": {**NO_DROPOUT, "micro_batch_size": 2, "max_norm": 0.5}}
ZERO_2 = {"strategy": "deepspeed", "sharding": "grad_op"}
ZERO_3 = {"strategy": "deepspeed", "sharding": "full"}
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture
def on_two(recipe: Callable[..., dict[str, Any]], one_thread: None) -> Callable[..., Path]:
    """Trains on two processes; returns the output directory."""

    def run(out_dir: Path, *changes: dict[str, Any]) -> Path:
        arguments = recipe(out_dir)
        for change in changes:
            arguments = merged(arguments, change)
        for code, said in train_on_ranks(arguments):
            assert code == 0, said[-4000:]
        return out_dir

    return run


@pytest.fixture
def on_one(train: Callable[..., Path]) -> Callable[..., Path]:
    """Trains in this process; returns the output directory."""

    def run(out_dir: Path, *changes: dict[str, Any]) -> Path:
        together: dict[str, Any] = {}
        for change in changes:
            together = merged(together, change)
        return train(out_dir, **together)

    return run


def assert_near(one: Path, other: Path, tolerance: float) -> None:
    """Compare two checkpoints by parameter name: weights and the optimizer's state."""
    first, second = tensors(one), tensors(other)
    floats = {
        name: value
        for name, value in first.items()
        if isinstance(value, torch.Tensor) and value.ndim
    }
    assert len(floats) >= 50
    for name, value in floats.items():
        difference = (value.float() - second[name].float()).abs().max().item()
        assert difference <= tolerance, (name, difference)


@pytest.mark.parametrize("sharding", [ZERO_2, ZERO_3], ids=["zero-2", "zero-3"])
def test_two_ranks_train_as_one_with_clipping_and_accumulation(
    tmp_path: Path, on_one: Callable[..., Path], on_two: Callable[..., Path], sharding: dict
) -> None:
    more = {"train": {"activation_checkpointing": "selective"}}
    one = on_one(tmp_path / "one", PLAIN)
    two = on_two(tmp_path / "two", PLAIN, sharding, more)
    assert [row["grad_norm"] for row in rows(two) if "grad_norm" in row] == pytest.approx(
        [row["grad_norm"] for row in rows(one) if "grad_norm" in row], rel=1e-5
    )
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert_near(two / "latest", one / "latest", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [ZERO_2, ZERO_3], ids=["zero-2", "zero-3"])
def test_experts_train_as_in_one_process(
    tmp_path: Path, on_one: Callable[..., Path], on_two: Callable[..., Path], sharding: dict
) -> None:
    weights = {"router_z_loss": 0.01, "balance_bias_rate": 0.001}
    experts = {"model_name": "phi1-test-moe", "train": {**weights, "max_steps": 6}}
    one = on_one(tmp_path / "one", PLAIN, experts)
    two = on_two(tmp_path / "two", PLAIN, experts, sharding)
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert_near(two / "latest", one / "latest", 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [ZERO_2, ZERO_3], ids=["zero-2", "zero-3"])
def test_bf16_mixed_is_near_one_process(
    tmp_path: Path, on_one: Callable[..., Path], on_two: Callable[..., Path], sharding: dict
) -> None:
    half = {"precision": "bf16-mixed", "train": {"max_steps": 6}}
    one = on_one(tmp_path / "one", PLAIN, half)
    two = on_two(tmp_path / "two", PLAIN, half, sharding)
    # Stage 3 multiplies and adds the bias in two roundings where torch has one.
    assert losses(two) == pytest.approx(losses(one), abs=1e-3)
    assert_near(two / "latest", one / "latest", 1e-3)


@pytest.mark.parametrize("sharding", [slow(ZERO_2, id="zero-2"), pytest.param(ZERO_3, id="zero-3")])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(
    tmp_path: Path, on_two: Callable[..., Path], sharding: dict
) -> None:
    whole = on_two(tmp_path / "whole", sharding)
    half = on_two(tmp_path / "half", sharding, {"train": {"max_steps": 8, "lr_total_steps": 12}})
    on_two(half, sharding, {"train": {"lr_total_steps": 12}, "resume": "auto"})
    assert losses(half) == losses(whole)
    assert_same_to_the_bit(half / "latest", whole / "latest")


@pytest.mark.slow
def test_other_strategies_go_on_where_it_stopped_and_it_where_they_did(
    tmp_path: Path, on_one: Callable[..., Path], on_two: Callable[..., Path]
) -> None:
    whole = on_one(tmp_path / "whole", PLAIN)
    half, rest = {"train": {"max_steps": 4, "lr_total_steps": 12}}, {"lr_total_steps": 12}
    there = on_two(tmp_path / "there", PLAIN, ZERO_3, half)
    on_one(there, PLAIN, {"train": {**rest, "max_steps": 8}, "resume": "auto"})
    on_two(there, PLAIN, ZERO_2, {"train": rest, "resume": "auto"})
    assert losses(there) == pytest.approx(losses(whole), abs=1e-5)
    assert_near(there / "latest", whole / "latest", 1e-6)


@pytest.mark.parametrize("sharding", [slow(ZERO_2, id="zero-2"), pytest.param(ZERO_3, id="zero-3")])
def test_a_bad_step_is_skipped_and_leaves_nothing_behind(
    tmp_path: Path, on_two: Callable[..., Path], sharding: dict
) -> None:
    # A rate that explodes at once: from some step on every loss is bad, and none is taken.
    wild = {
        "optimizer": {**SGD, "init_args": {"lr": 300.0, "momentum": 0.9}},
        "train": {**NO_DROPOUT, "on_nonfinite": "skip", "max_norm": None, "lr_warmup_steps": 1},
    }
    out = on_two(tmp_path / "wild", wild, sharding)
    skipped = [row.get("skipped", 0) for row in rows(out) if "loss" in row]
    assert skipped[-1] >= 3
    first_bad = skipped.index(1)
    weights = [
        torch.load(out / f"step-{step:08d}" / "lit_model.pth", weights_only=True)["model"]
        for step in (8, 12)
        if step >= first_bad
    ]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[-1][name]), name


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["grad_op", "full"])
def test_what_a_rank_holds_after_a_step_is_what_the_plan_predicts(
    tmp_path: Path, one_thread: None, sharding: str
) -> None:
    config = Config(**dict(MODELS["phi1-nano"], n_layer=4))
    strategy = make_strategy(
        "deepspeed", sharding=sharding, cpu_offload=False, precision="32-true", devices=2,
        num_nodes=1,
    )  # fmt: skip

    def one_step() -> None:
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        before = bytes_of_tensors()
        model = LossModel(GPT(config))
        module, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
        ids = torch.zeros((2, 64), dtype=torch.int64)
        with fabric.no_backward_sync(module, enabled=False):
            fabric.backward(module(ids, ids))
        fabric.clip_gradients(module, optimizer, max_norm=1.0, error_if_nonfinite=False)
        optimizer.step()
        (tmp_path / f"held-{fabric.global_rank}").write_text(str(bytes_of_tensors() - before))

    for code, said in on_ranks(one_step, tmp_path / "said"):
        assert code == 0, said[-3000:]
    layout = Layout(
        micro_batch=2, seq_length=64, precision="32-true", strategy="deepspeed",
        sharding=sharding, ranks=2, device="cpu",
    )  # fmt: skip
    predicted = predict(config, layout)
    expected = predicted.parameters + predicted.optimizer
    if sharding == "full":  # stage 3 lets go of neither gradients nor bucket
        expected += predicted.gradients + 4 * BUCKET
    held = int((tmp_path / "held-0").read_text())
    assert held == pytest.approx(expected, rel=0.01)


def bytes_of_tensors() -> int:
    """Return the bytes of all living tensors, each storage once.

    Fake ones of an earlier test's compilation, which a forked process inherits, have no memory.
    """
    gc.collect()
    real = (torch.Tensor, torch.nn.Parameter)
    tensors = [found for found in gc.get_objects() if type(found) in real]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_what_it_cannot_do_is_said_in_one_line() -> None:
    def faults(sharding="full", precision="bf16-mixed", optimizer=torch.optim.AdamW) -> str:
        return "; ".join(
            check_deepspeed(sharding=sharding, precision=precision, optimizer=optimizer)
        )

    assert not faults()
    assert not faults("grad_op", "16-mixed", torch.optim.SGD)
    assert "full (ZeRO 3) or grad_op (ZeRO 2)" in faults("hybrid")
    assert "use precision bf16-mixed" in faults(precision="bf16-true")
    assert f"Adafactor cannot step them; use torch.optim's {ELEMENTWISE[0]}" in faults(
        optimizer=torch.optim.Adafactor
    )


def test_sharded_files_are_refused_before_anything_starts(
    tmp_path: Path, train: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match="checkpoint_format: sharded needs strategy fsdp"):
        train(tmp_path / "x", **ZERO_3, train={"checkpoint_format": "sharded"})


def test_offloading_is_of_the_optimizer_and_in_stage_3_of_the_weights_too() -> None:
    def offloaded(sharding: str) -> set[str]:
        config = config_of(sharding=sharding, cpu_offload=True, precision="bf16-mixed")
        return {key for key in config["zero_optimization"] if key.startswith("offload")}

    assert offloaded("grad_op") == {"offload_optimizer"}
    assert offloaded("full") == {"offload_optimizer", "offload_param"}
