"""`phi-lit plan`: what a training run will need and cost, before anything is rented.

Reads the same YAML as `litgpt pretrain` or `litgpt finetune_full` and predicts parameters, FLOPs,
memory per GPU by part, time and GPU-hours. Memory comes from `memory.py`; speed from the GPU's
dense peak times an MFU that somebody published (or that is given), with its source.
"""

import inspect
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litgpt.args import EvalArgs, LogArgs
from litgpt.config import Config

from phi_lit.errors import UserError, did_you_mean
from phi_lit.files import write_atomic
from phi_lit.train.args import Sharding, Strategy, TrainArgs, raise_together
from phi_lit.train.flops import count_parameters, flops_per_token_6n, flops_per_token_6n_12ldt
from phi_lit.train.layout import Layout, has_momentum, optimizer_name, resolve_strategy
from phi_lit.train.memory import Memory, largest_fitting, predict
from phi_lit.train.plan_table import ROOM, describe
from phi_lit.train.pretrain import setup as pretrain_setup

if TYPE_CHECKING:
    from phi_lit.train.devices import Gpu

PUBLISHED_MFU = {
    "a100": (0.573, "phi-1, 1.4B, fp16, dropout: 51 B tokens in 770 A100-hours (2306.11644)"),
    "h100": (0.418, "llm-foundry, 1.3B, bf16: 45,455 tokens/s per H100"),
}
"""MFU counted as 6N + 12LdT and where it comes from, by the GPU's family."""

ASSUMED_MFU = (0.4, "assumed: no published figure for a model of this size on this device")

SLOWER = {"none": 1.0, "selective": 1.05, "full": 1.32}
"""Time of a step by activation checkpointing, relative to none (measured, 9 blocks of 512)."""

_PRETRAIN_TRAIN: TrainArgs = inspect.signature(pretrain_setup).parameters["train"].default


@dataclass(frozen=True)
class Milestone:
    """A step of the run that has a name."""

    name: str
    step: int
    tokens: int
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """Everything that is predicted about a run. Bytes are bytes, times are seconds."""

    model: str
    parameters: int
    active_parameters: int
    flops_per_token_6n: float
    flops_per_token_6n_12ldt: float
    gpu: str
    devices: int
    num_nodes: int
    layout: Layout
    accumulate: int
    """Micro-batches per step and device."""
    rows_per_step: int
    steps: int
    tokens: int
    memory: Memory
    memory_of_gpu: float
    fits: bool
    largest_micro_batch: int
    peak_flops: float
    """Of one device."""
    mfu_6n_12ldt: float
    mfu_source: str
    tokens_per_second_per_gpu: float
    seconds: float
    gpu_hours: float
    price: float | None
    milestones: tuple[Milestone, ...]


def plan(
    model_name: str | None = None,
    model_config: Config | None = None,
    gpu: str = "h100",
    devices: int | Literal["auto"] = 8,
    num_nodes: int = 1,
    mfu: float | None = None,
    price_per_gpu_hour: float | None = None,
    out: Path | None = None,
    precision: Literal["bf16-true", "bf16-mixed", "32-true", "16-mixed"] | None = None,
    strategy: Strategy | None = None,
    sharding: Sharding | None = None,
    cpu_offload: bool = False,
    train: TrainArgs = _PRETRAIN_TRAIN,
    optimizer: str | dict = "AdamW",
    checkpoint_dir: Path | None = None,
    out_dir: Path | None = None,
    initial_checkpoint_dir: Path | None = None,
    resume: bool | Literal["auto"] | Path = False,
    data: Any = None,
    eval: EvalArgs | None = None,
    log: LogArgs | None = None,
    tokenizer_dir: Path | None = None,
    logger_name: str | None = None,
    seed: int | None = None,
    access_token: str | None = None,
) -> None:
    """Predict parameters, FLOPs, memory per GPU, time and GPU-hours of a training config.

    `--config` takes the YAML that `litgpt pretrain` or `litgpt finetune_full` would be run with;
    every option of theirs can be given here as well.

    Args:
        model_name: The model to train.
        model_config: A whole model configuration instead of a name.
        gpu: The GPU to plan for, such as h100, a100, l4; cpu measures this machine.
        devices: GPUs per node.
        num_nodes: Nodes.
        mfu: Share of the peak reached, counted as 6N + 12LdT; default: a published figure.
        price_per_gpu_hour: What an hour of one GPU costs, to print what the run costs.
        out: JSON file to write the figures to.
        precision: As in training; default bf16-mixed.
        strategy: As in training.
        sharding: As in training.
        cpu_offload: As in training.
        train: As in training.
        optimizer: As in training.
        checkpoint_dir: The model to finetune: its model_config.yaml is read if it is there.
        out_dir: Not used here.
        initial_checkpoint_dir: Not used here.
        resume: Not used here.
        data: Not used here.
        eval: Not used here.
        log: Not used here.
        tokenizer_dir: Not used here.
        logger_name: Not used here.
        seed: Not used here.
        access_token: Not used here.
    """
    predicted = predict_run(
        find_model(model_name, model_config, checkpoint_dir),
        train=_without_default_length(train) if checkpoint_dir else train,
        gpu=gpu,
        devices=devices,
        num_nodes=num_nodes,
        mfu=mfu,
        price_per_gpu_hour=price_per_gpu_hour,
        precision=precision or "bf16-mixed",
        strategy=strategy,
        sharding=sharding,
        cpu_offload=cpu_offload,
        optimizer=optimizer,
    )
    print(describe(predicted))
    if out is not None:
        write_atomic(out, json.dumps(asdict(predicted), indent=1) + "\n")


def predict_run(
    config: Config,
    *,
    train: TrainArgs,
    gpu: str = "h100",
    devices: int | str = 8,
    num_nodes: int = 1,
    mfu: float | None = None,
    price_per_gpu_hour: float | None = None,
    precision: str = "bf16-mixed",
    strategy: str | None = None,
    sharding: Sharding | None = None,
    cpu_offload: bool = False,
    optimizer: str | dict[str, Any] = "AdamW",
) -> Plan:
    """Predict a run; the arguments are those of `plan`.

    Raises:
        UserError: an unknown GPU, a batch that cannot be divided, or no end of the run.
    """
    from phi_lit.train.teacher import flops_of

    on_cpu = gpu.lower() == "cpu"
    count = (1 if on_cpu else 8) if devices == "auto" else int(devices)
    card, peak = _measured_cpu(precision) if on_cpu else _listed(gpu, precision)
    _check(config, train, count, num_nodes, mfu)
    length = train.max_seq_length or config.block_size
    layout = _layout(
        config, train, precision=precision, strategy=strategy, sharding=sharding,
        cpu_offload=cpu_offload, optimizer=optimizer, devices=count, num_nodes=num_nodes,
        on_cpu=on_cpu,
    )  # fmt: skip
    memory_of_gpu = card.memory_gib * 2**30
    rows = train.global_batch_size // (count * num_nodes)
    largest = largest_fitting(config, layout, ROOM * memory_of_gpu, rows)
    layout = replace(layout, micro_batch=_micro_batch(train, rows, largest))
    layout = replace(layout, accumulates=rows > layout.micro_batch)
    memory = predict(config, layout)
    steps = _steps(train, length)
    per_step = train.global_batch_size * length
    share, source = _choose_mfu(mfu, gpu, layout)
    flops = flops_per_token_6n_12ldt(config, length, tie_embeddings=bool(train.tie_embeddings))
    speed = share * peak / (flops + flops_of(train, length))
    world = count * num_nodes

    def hours(n_steps: int) -> float:
        return n_steps * per_step / speed / 3600

    parameters = count_parameters(config, tie_embeddings=bool(train.tie_embeddings))
    return Plan(
        model=config.name,
        parameters=parameters.total,
        active_parameters=parameters.active,
        flops_per_token_6n=flops_per_token_6n(config, tie_embeddings=bool(train.tie_embeddings)),
        flops_per_token_6n_12ldt=flops,
        gpu=card.name,
        devices=count,
        num_nodes=num_nodes,
        layout=layout,
        accumulate=rows // layout.micro_batch,
        rows_per_step=train.global_batch_size,
        steps=steps,
        tokens=steps * per_step,
        memory=memory,
        memory_of_gpu=memory_of_gpu,
        fits=memory.total <= ROOM * memory_of_gpu,
        largest_micro_batch=largest,
        peak_flops=peak,
        mfu_6n_12ldt=share,
        mfu_source=source,
        tokens_per_second_per_gpu=speed,
        seconds=hours(steps) * 3600 / world,
        gpu_hours=hours(steps),
        price=None if price_per_gpu_hour is None else hours(steps) * price_per_gpu_hour,
        milestones=tuple(
            Milestone(name, step, step * per_step, hours(step))
            for step, name in sorted((train.name_steps or {}).items())
            if step <= steps
        ),
    )


def _layout(
    config: Config,
    train: TrainArgs,
    *,
    precision: str,
    strategy: str | None,
    sharding: Sharding | None,
    cpu_offload: bool,
    optimizer: str | dict[str, Any],
    devices: int,
    num_nodes: int,
    on_cpu: bool,
) -> Layout:
    """Return what decides a device's memory, with one row at a time for now."""
    from phi_lit.train.teacher import bytes_of

    kind, ranks = resolve_strategy(
        strategy, sharding, devices=devices, num_nodes=num_nodes, cpu_offload=cpu_offload
    )
    return Layout(
        micro_batch=1,
        seq_length=train.max_seq_length or config.block_size,
        precision=precision,
        checkpointing=train.activation_checkpointing or "none",
        attention_dropout=train.attention_dropout or 0.0,
        residual_dropout=train.residual_dropout or 0.0,
        compiled=train.compile == "on" or (train.compile != "off" and not on_cpu),
        optimizer=optimizer_name(optimizer),
        momentum=has_momentum(optimizer),
        strategy=kind,
        sharding=sharding or "full",
        ranks=ranks,
        cpu_offload=cpu_offload,
        tie_embeddings=bool(train.tie_embeddings),
        teacher_bytes=bytes_of(train, precision, devices * num_nodes),
        device="cpu" if on_cpu else "cuda",
    )


def find_model(
    model_name: str | None, model_config: Config | None, checkpoint_dir: Path | None
) -> Config:
    """Return the model that a config names, whole, by name or by its checkpoint.

    Raises:
        UserError: there is no such model, or nothing names one.
    """
    if model_config is not None:
        return model_config
    saved = None if checkpoint_dir is None else checkpoint_dir / "model_config.yaml"
    if saved is not None and saved.is_file():
        return Config.from_file(saved)
    if model_name is None:
        where = f"there is no {saved}" if saved else "the config names no model"
        raise UserError(f"which model? {where}: add --model_name, such as --model_name phi-1.")
    from litgpt.config import name_to_config

    from phi_lit.registry import MODELS

    name = model_name.rpartition("/")[2]
    if name in MODELS:
        return Config(**MODELS[name])
    if name not in name_to_config:
        near = did_you_mean(name, [*MODELS, *name_to_config])
        raise UserError(f"unknown model {model_name!r}.{near} `litgpt pretrain list` lists all.")
    return Config.from_name(name)


def _without_default_length(train: TrainArgs) -> TrainArgs:
    """Forget pretraining's default of 3 trillion tokens, which finetuning does not have."""
    default = _PRETRAIN_TRAIN.max_tokens
    if train.max_tokens != default:
        return train
    return TrainArgs(**{**vars(train), "max_tokens": None})


def _listed(gpu: str, precision: str) -> "tuple[Gpu, float]":
    """Return a GPU of the table and its peak under a precision."""
    from phi_lit.train.devices import arithmetic_of, gpu_named

    card = gpu_named(gpu)
    peak = card.peak(arithmetic_of(precision))
    if peak is None:
        raise UserError(
            f"{card.name} cannot compute in {precision}; choose another precision, "
            "such as --precision 16-mixed."
        )
    return card, peak


def _measured_cpu(precision: str) -> "tuple[Gpu, float]":
    """Return this machine as if it were a GPU, with its measured peak."""
    import psutil
    import torch

    from phi_lit.train.devices import Gpu, arithmetic_of, measure_peak

    peak = measure_peak(arithmetic_of(precision))
    name = f"this CPU with {torch.get_num_threads()} threads"
    memory = psutil.virtual_memory().total / 2**30
    return Gpu(name, memory, None, 0, 0, None, None, "measured"), peak


def _check(
    config: Config, train: TrainArgs, devices: int, num_nodes: int, mfu: float | None
) -> None:
    faults = train.check()
    for name, value in (("devices", devices), ("num_nodes", num_nodes)):
        if value < 1:
            faults.append(f"{name} is {value}; it must be at least 1")
    if mfu is not None and not 0 < mfu <= 1:
        faults.append(f"mfu is {mfu:g}; it is a share, above 0 up to 1")
    length = train.max_seq_length
    if length is not None and not 1 <= length <= config.block_size:
        faults.append(
            f"train.max_seq_length is {length}; {config.name} takes 1 to {config.block_size}"
        )
    raise_together(faults)
    world = devices * num_nodes
    micro = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    if train.global_batch_size % (micro * world):
        faults.append(
            f"train.global_batch_size {train.global_batch_size} is not a multiple of "
            f"micro_batch_size {micro} x {world} devices"
        )
    if train.max_steps is None and train.max_tokens is None:
        faults.append(
            "nothing says how long the run is: set train.max_steps or train.max_tokens (epochs "
            "depend on the data, which are not read here)"
        )
    raise_together(faults)


def _steps(train: TrainArgs, length: int) -> int:
    limits = []
    if train.max_steps is not None:
        limits.append(train.max_steps)
    if train.max_tokens is not None:
        limits.append(train.max_tokens // (train.global_batch_size * length))
    return min(limits)


def _micro_batch(train: TrainArgs, rows: int, largest: int) -> int:
    """Return the rows per forward pass: as given, or the largest divisor that fits (at least 1)."""
    if train.micro_batch_size != "auto":
        return train.micro_batch_size
    return max((n for n in range(1, rows + 1) if rows % n == 0 and n <= largest), default=1)


def _choose_mfu(given: float | None, gpu: str, layout: Layout) -> tuple[float, str]:
    """Return the MFU to count with and where it comes from."""
    if given is not None:
        return given, "given"
    family = gpu.lower().partition("-")[0]
    share, source = PUBLISHED_MFU.get(family, ASSUMED_MFU)
    slower = SLOWER[layout.checkpointing]
    if slower != 1:
        source += f"; divided by {slower:g} for {layout.checkpointing} checkpointing"
    return share / slower, source
