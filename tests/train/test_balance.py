"""The losses of experts reach the optimizer exactly, biases move by the step's load, all is seen.

The slow double knows the formulas and nothing of how the layer attaches its losses: it hooks the
routers, writes the losses out, adds them to the cross-entropy and lets autograd do the rest. A step
of SGD with rate 1 from known weights leaves the gradient as the difference of two checkpoints, so
what is compared went through accumulation, recomputation, sharding, clipping's code and the disk.
"""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from litgpt import GPT, Config
from litgpt.prompts import Default
from litgpt.utils import save_config
from runs import assert_same_to_the_bit, losses, quiet_environment, rows
from torch.nn import functional as F

from phi_lit.errors import UserError
from phi_lit.train.args import TrainArgs
from phi_lit.train.experts import Experts, apply_expert_options, rebalance, summary
from phi_lit.train.model import LossModel, compile_blocks

BALANCE, Z, RATE = 0.5, 0.1, 0.01
"""Far above usual weights: the losses' gradients must not hide behind the cross-entropy's."""

ONE_STEP: dict[str, Any] = {
    "global_batch_size": 8, "micro_batch_size": 2, "max_steps": 1, "max_norm": None,
    "lr_schedule": "constant", "lr_warmup_steps": 0, "attention_dropout": 0.0,
    "residual_dropout": 0.0, "save_interval": 1, "balance_loss": BALANCE, "router_z_loss": Z,
    "balance_bias_rate": RATE,
}  # fmt: skip
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0}}
MODELS = ("phi1-test-moe", "phi1-test-moe-after")


def start(name: str) -> GPT:
    """Weights that route with opinions: logits of about 1, other experts in every layer."""
    torch.manual_seed(3)
    gpt = GPT(Config.from_name(name))
    with torch.no_grad():
        for parameter_name, parameter in gpt.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15 if "gate" in parameter_name else 0.05)
    return gpt


@pytest.fixture(scope="session")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The starting weights as checkpoints."""
    found = {}
    for name in MODELS:
        found[name] = tmp_path_factory.mktemp(name)
        torch.save(start(name).state_dict(), found[name] / "lit_model.pth")
        save_config(Config.from_name(name), found[name])
    return found


def micro_batches(corpus: Path) -> list[torch.Tensor]:
    """The first step's rows, two by two, as every number of ranks deals them."""
    from phi_lit.data.textbook import CodeTextbook

    data = CodeTextbook(
        sources=[str(corpus / "text")], data_dir=corpus / "tokens", num_workers=1, val_fraction=0.15
    )
    data.connect(batch_size=2, max_seq_length=64, tokenizer_dir=corpus / "tokenizer")
    data.prepare_data()
    data.setup()
    loader = iter(data.train_dataloader())
    return [next(loader).long() for _ in range(4)]


def double(gpt: GPT, batches: list[torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Return gradients and the loads of each layer, by the formulas written out.

    Balance: E sum_e f_e P_e, f_e the share of visits and P_e the mean score (arXiv 2101.03961,
    equation 4, with k choices); z: the mean squared logsumexp (arXiv 2202.08906, equation 5); both
    are means over the micro-batches, each weighted by its tokens.
    """
    seen: list[torch.Tensor] = []
    gates = [module for name, module in gpt.named_modules() if name.endswith(".gate")]
    hooks = [gate.register_forward_hook(lambda *args: seen.append(args[2])) for gate in gates]
    total = sum(batch[:, 1:].numel() for batch in batches)
    loads = [torch.zeros(gpt.config.n_expert) for _ in gates]
    for batch in batches:
        seen.clear()
        logits = gpt(batch[:, :-1])
        targets = batch[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / total
        for layer, router in enumerate(seen):
            chosen = router.softmax(-1).topk(gpt.config.n_expert_per_token).indices
            visits = F.one_hot(chosen, gpt.config.n_expert).sum((0, 1)).float()
            loads[layer] += visits
            share, score = visits / visits.sum(), router.softmax(-1).mean(0)
            share_of_step = targets.numel() / total
            loss = loss + share_of_step * BALANCE * gpt.config.n_expert * (share * score).sum()
            loss = loss + share_of_step * Z * router.exp().sum(-1).log().square().mean()
        loss.backward()
    for hook in hooks:
        hook.remove()
    grads = {name: parameter.grad for name, parameter in gpt.named_parameters()}
    return {"grads": grads, "loads": loads}  # type: ignore[dict-item]


def assert_step_equals_the_double(out: Path, expected: dict[str, Any], before: GPT) -> None:
    after = torch.load(out / "final" / "lit_model.pth", weights_only=True)["model"]
    old = before.state_dict()
    biases = {name for name in old if name.endswith("selection_bias")}
    assert after.keys() == old.keys()
    for name, grad in expected["grads"].items():
        torch.testing.assert_close(old[name] - after[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    assert len(biases) == 2
    for name, load in zip(sorted(biases), expected["loads"], strict=True):
        assert torch.equal(after[name], RATE * torch.sign(load.mean() - load)), name


@pytest.mark.parametrize(
    ("name", "mode"),
    [(MODELS[0], "none"), (MODELS[0], "selective"), (MODELS[0], "full"), (MODELS[1], "full")],
)
def test_a_steps_gradient_and_biases_are_those_of_the_written_out_losses(
    tmp_path: Path, train: Callable[..., Path], corpus: Path, starts: dict[str, Path], name: str,
    mode: str,
) -> None:  # fmt: skip
    out = train(
        tmp_path / "out", model_name=name, initial_checkpoint_dir=str(starts[name]), optimizer=SGD,
        train={**ONE_STEP, "activation_checkpointing": mode},
    )  # fmt: skip
    expected = double(start(name), micro_batches(corpus))
    assert_step_equals_the_double(out, expected, start(name))
    row = rows(out)[0]
    assert row["dropped"] == 0
    share = [load / load.sum() for load in expected["loads"]]
    assert row["experts"]["load"] == [[round(1000 * float(s)) for s in each] for each in share]
    assert row["max_load"] == pytest.approx(4 * max(float(each.max()) for each in share))


@pytest.mark.parametrize(("strategy", "mode"), [("ddp", "none"), ("fsdp", "full")])
def test_two_ranks_give_the_same_gradient_and_biases(
    tmp_path: Path, recipe: Callable[..., dict[str, Any]], corpus: Path, starts: dict[str, Path],
    strategy: str, mode: str,
) -> None:  # fmt: skip
    name, out = MODELS[0], tmp_path / "out"
    arguments = recipe(
        out, model_name=name, initial_checkpoint_dir=str(starts[name]), optimizer=SGD,
        strategy=strategy, devices=2, train={**ONE_STEP, "activation_checkpointing": mode},
    )  # fmt: skip
    config = tmp_path / "out.yaml"
    config.write_text(yaml.safe_dump(arguments))
    done = subprocess.run(
        [Path(sys.executable).with_name("litgpt"), "pretrain", "--config", config],
        env=quiet_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert_step_equals_the_double(out, double(start(name), micro_batches(corpus)), start(name))
    assert (out / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert "expert load" in done.stdout


class OneProcess:
    """The two things of Fabric's that `Experts` asks for."""

    world_size, device = 1, torch.device("cpu")


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_uneven_micro_batches_count_by_their_tokens_and_a_loss_scale_multiplies_all(
    one_thread: None, loss_scale: float
) -> None:
    gpt = start(MODELS[0])
    generator = torch.Generator().manual_seed(1)
    sizes = [(1, 20), (3, 64), (2, 7)]
    batches = [torch.randint(0, 512, (n, t + 1), generator=generator) for n, t in sizes]
    apply_expert_options(gpt, TrainArgs(balance_loss=BALANCE, router_z_loss=Z))
    model, experts = LossModel(gpt), Experts.of(gpt)
    tokens = [n * t for n, t in sizes]
    experts.begin(OneProcess(), tokens)  # type: ignore[arg-type]
    for micro, batch in enumerate(batches):
        experts.weigh(micro, loss_scale)
        loss = model(batch[:, :-1], batch[:, 1:], denominator=float(sum(tokens)))
        (loss_scale * loss).backward()
        experts.note(micro)
    expected = double(start(MODELS[0]), batches)
    for name, parameter in gpt.named_parameters():
        torch.testing.assert_close(
            parameter.grad / loss_scale, expected["grads"][name], rtol=1e-4, atol=1e-6, msg=name
        )
    figures = experts.finish(OneProcess(), move_biases=False)  # type: ignore[arg-type]
    assert figures["dropped"] == 0
    assert not any(layer.gate.selection_bias.any() for layer in experts.layers)


@pytest.mark.slow
def test_compiled_blocks_take_a_new_weight_without_compiling_anew(one_thread: None) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    gpt = start(MODELS[0])
    apply_expert_options(gpt, TrainArgs(balance_loss=BALANCE, router_z_loss=Z))
    compile_blocks(gpt)
    model, experts = LossModel(gpt), Experts.of(gpt)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 512, (2, 65), generator=generator) for _ in range(4)]
    graphs = []
    experts.begin(OneProcess(), [128] * 4)  # type: ignore[arg-type]
    for micro, batch in enumerate(batches):
        experts.weigh(micro, loss_scale=1.0 + micro)
        model(batch[:, :-1], batch[:, 1:], denominator=512.0).mul(1.0 + micro).backward()
        for parameter in gpt.parameters():
            parameter.grad /= 1.0 + micro  # every micro-batch under a scale of its own
            parameter.total = getattr(parameter, "total", 0) + parameter.grad
            parameter.grad = None
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0
    expected = double(start(MODELS[0]), batches)
    for name, parameter in gpt.named_parameters():
        wanted = expected["grads"][name.replace("_orig_mod.", "")]
        torch.testing.assert_close(parameter.total, wanted, rtol=1e-3, atol=1e-5, msg=name)


def test_without_the_keys_nothing_is_attached(one_thread: None) -> None:
    ids = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(1))
    grads = []
    for scale in (1.0, 100.0):
        gpt = start(MODELS[0])
        apply_expert_options(gpt, TrainArgs())
        for layer in Experts.of(gpt).layers:
            layer.auxiliary_scale = scale
        LossModel(gpt)(ids[:, :-1], ids[:, 1:]).backward()
        grads.append({name: p.grad.clone() for name, p in gpt.named_parameters()})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_a_validation_has_neither_losses_nor_jitter_nor_figures(one_thread: None) -> None:
    ids = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(1))
    gpt = start(MODELS[0])
    plain = LossModel(gpt).eval()(ids[:, :-1], ids[:, 1:])
    apply_expert_options(gpt, TrainArgs(balance_loss=5.0, router_z_loss=5.0, router_jitter=0.5))
    assert torch.equal(LossModel(gpt).eval()(ids[:, :-1], ids[:, 1:]), plain)


def test_biases_move_towards_an_even_load_and_stay_where_it_is_even() -> None:
    bias = torch.tensor([0.5, 0.5, 0.5, 0.5])
    rebalance(bias, torch.tensor([10.0, 30.0, 20.0, 20.0]), 0.25)
    assert bias.tolist() == [0.75, 0.25, 0.5, 0.5]


def test_biases_even_out_a_load_that_a_router_would_never(
    one_thread: None, train: Callable[..., Path], tmp_path: Path, starts: dict[str, Path]
) -> None:
    """Balancing without a loss, at a rate that shows within few steps."""
    out = train(
        tmp_path / "out", model_name=MODELS[0], initial_checkpoint_dir=str(starts[MODELS[0]]),
        train={"max_steps": 40, "save_interval": 40, "balance_bias_rate": 0.01},
        optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-4}},
    )  # fmt: skip
    load_SLE = torch.tensor([row["experts"]["load"] for row in rows(out) if "experts" in row]) / 250
    assert (load_SLE[:5].mean(0) - 1).abs().max() > 0.2  # in fair shares
    assert (load_SLE[-15:].mean(0) - 1).abs().max() < 0.05


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_resumed_run_with_jitter_and_biases_equals_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, train: Callable[..., Path], precision: str
) -> None:
    options = {"balance_loss": 0.01, "router_z_loss": 0.001, "balance_bias_rate": 0.003,
               "router_jitter": 0.1}  # fmt: skip
    changes: dict[str, Any] = {"model_name": MODELS[0], "precision": precision}
    whole = train(tmp_path / "whole", **changes, train=options)
    half = train(
        tmp_path / "half", **changes, train={**options, "max_steps": 8, "lr_total_steps": 12}
    )
    train(half, **changes, train={**options, "lr_total_steps": 12}, resume="auto")
    assert losses(half) == losses(whole)
    assert [row for row in rows(half) if "experts" in row] == [
        row for row in rows(whole) if "experts" in row
    ]
    assert_same_to_the_bit(half / "latest", whole / "latest")
    state = torch.load(whole / "latest" / "lit_model.pth", weights_only=True)["model"]
    bias = state["transformer.h.1.mlp.gate.selection_bias"]
    assert bias.dtype == torch.float32
    steps = bias / 0.003  # of a whole number of steps up and down, twelve in all
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert 0 < steps.round().abs().max() <= 12


def test_a_resume_with_other_expert_options_is_refused(
    tmp_path: Path, train: Callable[..., Path]
) -> None:
    options = {"balance_loss": 0.01, "max_steps": 4}
    train(tmp_path / "run", model_name=MODELS[0], train=options)
    with pytest.raises(UserError, match=r"experts.balance_loss was 0.01 and is 0.1"):
        train(
            tmp_path / "run", model_name=MODELS[0], train={**options, "balance_loss": 0.1},
            resume="auto",
        )  # fmt: skip


def test_options_that_a_model_cannot_follow_are_told_together(
    tmp_path: Path, train: Callable[..., Path]
) -> None:
    wanted = "train.balance_loss and train.router_jitter asked for, but experts of phi1-test do not"
    with pytest.raises(UserError, match=wanted):
        train(tmp_path / "run", train={"balance_loss": 0.01, "router_jitter": 0.1})
    with pytest.raises(UserError) as error:
        train(
            tmp_path / "run", model_name=MODELS[0],
            train={"balance_loss": -1.0, "router_jitter": 1.5},
        )  # fmt: skip
    assert "train.balance_loss is -1.0; it must not be negative" in str(error.value)
    assert "train.router_jitter is 1.5; choose 0 to below 1" in str(error.value)


def test_biases_are_not_moved_where_they_would_not_be_saved(starts: dict[str, Path]) -> None:
    from phi_lit.data.textbook import CodeTextbook
    from phi_lit.train.adaptation import LORA
    from phi_lit.train.job import Job

    config = LORA.configure(starts[MODELS[0]], {"lora_r": 2, "lora_query": True})
    options = {"train": TrainArgs(balance_bias_rate=0.001, balance_loss=0.01)}
    job = Job("finetune", config, CodeTextbook(), None, starts[MODELS[0]], Default(), options)
    (fault,) = LORA.faults(job)
    assert "balance_bias_rate moves what belongs to the base model" in fault
    job.arguments.update(train=TrainArgs(), strategy="deepspeed")
    (fault,) = LORA.faults(job)
    assert "strategy deepspeed is for whole models" in fault


def test_the_record_stays_small_and_the_logger_gets_every_layer(
    tmp_path: Path, train: Callable[..., Path]
) -> None:
    import csv

    out = train(tmp_path / "out", model_name=MODELS[0], train={"balance_loss": 0.01})
    recorded = [row for row in rows(out) if "loss" in row]
    assert all(len(str(row["experts"])) < 120 for row in recorded)
    (metrics,) = out.rglob("metrics.csv")
    logged = list(csv.DictReader(metrics.open()))
    first = next(row for row in logged if row["step"] == "1" and row["loss"])
    load = recorded[0]["experts"]["load"][1]
    assert float(first["experts/block_02_max_load"]) == pytest.approx(4 * max(load) / 1000)
    assert float(first["experts/block_02_min_load"]) == pytest.approx(4 * min(load) / 1000)
    assert float(first["experts/block_01_entropy"]) <= math.log(4)
    assert float(first["balance_loss"]) >= 1 - 1e-6
    assert float(first["dropped"]) == 0


def test_dropped_tokens_would_be_counted() -> None:
    load = torch.tensor([[3.0, 5.0], [4.0, 3.0]])
    figures = summary(load, torch.tensor([[0.6, 1.0], [0.5, 1.1]]), [2, 4], assignments=8)
    assert figures["experts"]["block"] == [2, 4]
    assert figures["dropped"] == 1
    assert figures["experts"]["load"] == [[375, 625], [571, 429]]
    assert figures["max_load"] == 1.25
