"""The planner against the paper's own cost and against steps measured to the byte."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from litgpt.config import Config

from phi_lit.errors import UserError
from phi_lit.registry import MODELS
from phi_lit.train import memory
from phi_lit.train.args import TrainArgs
from phi_lit.train.layout import Layout
from phi_lit.train.plan import describe, find_model, plan, predict_run

ROOT = Path(__file__).parents[2]
PHI_1 = Config(**MODELS["phi-1"])
PAPER = dict(global_batch_size=1024, attention_dropout=0.1, residual_dropout=0.1)


def paper(**more) -> TrainArgs:
    return TrainArgs(**{**PAPER, "max_steps": 24_000, "micro_batch_size": "auto", **more})


# -------------------------------------------------------------------------------------- the paper


def test_the_papers_speed_and_cost_come_out():
    """51 B tokens in 770 A100-hours, 18.4 thousand tokens/s per GPU (2306.11644)."""
    run = predict_run(PHI_1, train=paper(), gpu="a100", devices=8, precision="16-mixed")
    assert run.tokens == 50_331_648_000
    assert run.tokens_per_second_per_gpu == pytest.approx(18_400, rel=0.01)
    assert run.gpu_hours * 51e9 / run.tokens == pytest.approx(770, rel=0.01)
    assert run.seconds * 8 == pytest.approx(run.gpu_hours * 3600)
    assert run.fits  # it did, on 8 A100


def test_the_packaged_phi1_is_planned_with_its_base_marked(capsys, tmp_path, monkeypatch):
    from phi_lit.__main__ import main

    figures = tmp_path / "plan.json"
    command = (
        f"phi-lit plan --config {ROOT / 'config_hub' / 'phi1.yaml'} --gpu a100 --out {figures}"
    )
    monkeypatch.setattr("sys.argv", command.split())
    assert main() == 0
    printed = capsys.readouterr().out
    assert "1,418,270,720" in printed
    assert "8.51 G (6N), 9.72 G (6N + 12LdT)" in printed
    run = json.loads(figures.read_text())
    assert run["steps"] == 36_000
    base = run["milestones"][0]
    assert (base["name"], base["step"], base["tokens"]) == ("phi-1-base", 24_000, 50_331_648_000)
    assert base["gpu_hours"] == pytest.approx(760, rel=0.01)


@pytest.mark.parametrize(
    "name", ["phi1-small", "phi1-nano", "phi1-exercises", "phi1-small-exercises"]
)
def test_every_packaged_config_can_be_planned(name, monkeypatch, capsys):
    from phi_lit.__main__ import main

    config = ROOT / "config_hub" / f"{name}.yaml"
    command = f"phi-lit plan --config {config} --model_name phi-1 --gpu H100 --devices 1"
    monkeypatch.setattr("sys.argv", command.split())
    assert main() == 0
    assert "GPU-hours" in capsys.readouterr().out


def test_a_given_mfu_and_price_are_used():
    run = predict_run(PHI_1, train=paper(), gpu="h100", mfu=0.5, price_per_gpu_hour=2.0)
    assert run.tokens_per_second_per_gpu == pytest.approx(
        0.5 * 989.4e12 / run.flops_per_token_6n_12ldt
    )
    assert run.price == pytest.approx(2 * run.gpu_hours)
    assert run.mfu_source == "given"


def test_checkpointing_costs_time_and_saves_memory():
    runs = {
        mode: predict_run(PHI_1, train=paper(micro_batch_size=8, activation_checkpointing=mode))
        for mode in ("none", "selective", "full")
    }
    assert runs["none"].seconds < runs["selective"].seconds < runs["full"].seconds
    peaks = [runs[mode].memory.total for mode in ("none", "selective", "full")]
    assert peaks == sorted(peaks, reverse=True)


def test_the_processor_can_be_planned_for():
    nano = Config(**MODELS["phi1-nano"])
    run = predict_run(
        nano, train=TrainArgs(global_batch_size=16, max_steps=10), gpu="cpu", devices=1
    )
    assert "this CPU" in run.gpu
    assert run.seconds > 0


def test_auto_takes_the_largest_share_that_fits():
    run = predict_run(PHI_1, train=paper(), gpu="h100")
    rows = 1024 // 8
    assert rows % run.layout.micro_batch == 0
    assert run.layout.micro_batch <= run.largest_micro_batch
    bigger = min(n for n in range(1, rows + 1) if rows % n == 0 and n > run.layout.micro_batch)
    assert bigger > run.largest_micro_batch


def test_what_does_not_fit_is_said():
    run = predict_run(PHI_1, train=paper(micro_batch_size=1), gpu="l4", devices=1)
    assert not run.fits
    assert run.largest_micro_batch == 0
    assert "DOES NOT FIT" in describe(run)
    assert "not one row fits" in describe(run)


# -------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(gpu="h1000"), r"unknown GPU 'h1000'.*Did you mean 'h100'"),
        (dict(gpu="t4", precision="bf16-true"), r"T4 16 GB cannot compute in bf16-true"),
        (
            dict(train=paper(micro_batch_size=3)),
            r"1024 is not a multiple of micro_batch_size 3 x 8",
        ),
        (dict(train=paper(max_steps=None)), r"nothing says how long the run is"),
        (dict(train=paper(max_seq_length=4096)), r"max_seq_length is 4096; phi-1 takes 1 to 2048"),
        (dict(devices=0), r"devices is 0"),
        (dict(mfu=50.0), r"mfu is 50; it is a share"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        predict_run(PHI_1, **{"train": paper(), **arguments})


def test_models_are_found_or_named(tmp_path):
    assert find_model("phi1-small", None, None).n_layer == 20
    assert find_model("pythia-14m", None, None).name == "pythia-14m"
    with pytest.raises(UserError, match=r"unknown model 'phi1-smal'.*Did you mean 'phi1-small'"):
        find_model("phi1-smal", None, None)
    with pytest.raises(UserError, match=r"which model\?.*--model_name phi-1"):
        find_model(None, None, tmp_path)


def test_finetuning_without_an_end_is_refused_rather_than_3_trillion_tokens(tmp_path):
    with pytest.raises(UserError, match="nothing says how long"):
        plan(model_name="phi-1", checkpoint_dir=tmp_path)


# ---------------------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def plan_check():
    spec = importlib.util.spec_from_file_location(
        "plan_check", ROOT / "benchmarks" / "plan_check.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["plan_check"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(accumulates=False),
        dict(precision="bf16-true"),
        dict(precision="bf16-mixed"),
        dict(residual_dropout=0.1, attention_dropout=0.1),
        dict(checkpointing="selective"),
        dict(checkpointing="full"),
        dict(precision="bf16-mixed", checkpointing="full"),
        dict(fused_loss=False),
        dict(optimizer="SGD"),
    ],
    ids=lambda changes: ", ".join(f"{k}={v}" for k, v in changes.items()) or "plain",
)
def test_predicted_memory_is_what_a_step_allocates(plan_check, changes, one_thread):
    config = Config(**dict(MODELS["phi1-nano"], n_layer=3))
    layout = replace(plan_check.BASE, micro_batch=2, seq_length=128, **changes)
    measured, predicted = plan_check.measure(config, layout), memory.predict(config, layout)
    assert predicted.parameters == measured.parameters
    assert predicted.optimizer == pytest.approx(measured.optimizer, rel=1e-4)  # + step counters
    assert predicted.kept == pytest.approx(measured.kept, rel=0.1)
    assert predicted.total == pytest.approx(measured.total, rel=0.1)


@pytest.mark.parametrize("name", ["phi1-nano-moe", "phi1-nano-moe-after"])
@pytest.mark.parametrize(
    "changes",
    [{}, dict(precision="bf16-mixed"), dict(checkpointing="selective"), dict(checkpointing="full")],
    ids=str,
)
def test_predicted_memory_of_experts(plan_check, name, changes, one_thread):
    config = Config(**dict(MODELS[name], n_layer=2))
    layout = replace(plan_check.BASE, micro_batch=2, seq_length=128, **changes)
    measured, predicted = plan_check.measure(config, layout), memory.predict(config, layout)
    assert predicted.parameters == measured.parameters
    assert predicted.kept == pytest.approx(measured.kept, rel=0.1)
    assert predicted.total == pytest.approx(measured.total, rel=0.1)


def test_sharding_divides_the_states():
    layout = Layout(micro_batch=1, seq_length=2048, accumulates=False)
    alone = memory.predict(PHI_1, layout)
    sharded = memory.predict(PHI_1, replace(layout, strategy="fsdp", ranks=8))
    for part in ("parameters", "gradients", "optimizer"):
        assert getattr(sharded, part) == getattr(alone, part) / 8
    assert sharded.activations == alone.activations
    offloaded = memory.predict(PHI_1, replace(layout, strategy="fsdp", ranks=8, cpu_offload=True))
    assert offloaded.parameters == offloaded.optimizer == 0


def test_fsdp_gathers_half_under_bf16_mixed_and_keeps_no_copies():
    layout = Layout(micro_batch=1, seq_length=2048, strategy="fsdp", ranks=8, precision="32-true")
    exact, half = (
        memory.predict(PHI_1, replace(layout, precision=name, accumulates=False))
        for name in ("32-true", "bf16-mixed")
    )
    assert half.weight_copies == 0
    assert half.parameters == exact.parameters
    assert 0.5 * exact.gathered < half.gathered < exact.gathered  # the head stays float32
    cut = replace(layout, precision="bf16-mixed", checkpointing="full")
    assert not cut.half_blocks  # a compiled, checkpointed block cannot be cut at its norm


def test_zero_keeps_weights_of_its_own_beside_the_moments():
    layout = Layout(micro_batch=1, seq_length=2048, strategy="deepspeed", ranks=8)
    n = memory.count_parameters(PHI_1).total
    two, three = (
        memory.predict(PHI_1, replace(layout, sharding=sharding))
        for sharding in ("grad_op", "full")
    )
    assert (two.parameters, three.parameters) == (4 * n, 4 * n / 8)
    assert two.optimizer == three.optimizer == 12 * n / 8
    assert two.gradients == three.gradients == 4 * n / 8
    half = memory.predict(PHI_1, replace(layout, sharding="full", precision="16-mixed"))
    assert (half.parameters, half.optimizer) == (2 * n / 8, 12 * n / 8)


def test_data_parallel_copies_the_gradients_into_buckets():
    layout = Layout(micro_batch=1, seq_length=2048)
    copies = memory.predict(PHI_1, replace(layout, strategy="ddp"))
    assert copies.gradients == 2 * memory.predict(PHI_1, layout).gradients


def test_eight_bit_moments_take_a_quarter():
    layout = Layout(micro_batch=1, seq_length=2048)
    small = memory.predict(PHI_1, replace(layout, optimizer="bitsandbytes.optim.PagedAdamW8bit"))
    assert small.optimizer == pytest.approx(memory.predict(PHI_1, layout).optimizer / 4, rel=0.02)


def test_the_loop_can_ask_for_a_job(tmp_path):
    from litgpt.data import TextFiles
    from litgpt.prompts import Default

    from phi_lit.train.job import Job, Machine

    train = TrainArgs(global_batch_size=8, micro_batch_size="auto", max_steps=1)
    job = Job(
        command="pretrain",
        config=Config(**MODELS["phi1-test"]),
        data=TextFiles(train_data_path=tmp_path),
        tokenizer_dir=None,
        weights_dir=None,
        prompt_style=Default(),
        arguments={"train": train, "optimizer": "AdamW", "strategy": None, "sharding": None},
    )
    machine = Machine(devices=1, num_nodes=1, precision="32-true", kind="cpu")
    one, two = (memory.predict_memory(job, machine, rows) for rows in (1, 2))
    assert 0 < one.total < two.total


def test_predictions_never_run_anything():
    """A model of hundreds of billions is predicted at once, without memory for it."""
    before = torch.get_rng_state()
    huge = Config(**dict(MODELS["phi-1"], n_layer=120, n_embd=16_384, n_head=128))
    assert memory.predict(huge, Layout(micro_batch=1, seq_length=2048)).parameters > 1e12
    assert torch.equal(before, torch.get_rng_state())
