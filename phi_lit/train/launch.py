"""From a command's arguments to a run: checked, built, started, finished.

Both `litgpt pretrain` and `litgpt finetune_full` come here with a `Job`. What can be wrong with the
arguments is gathered and raised in one line before data are prepared or a model is built.
"""

import pprint
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning import Fabric
from litgpt.utils import (
    choose_logger,
    extend_checkpoint_dir,
    get_default_supported_precision,
    init_out_dir,
    parse_devices,
)

from phi_lit.data.codegen import CODEGEN_FINGERPRINT
from phi_lit.data.tokenizer import load_tokenizer
from phi_lit.files import disk_errors
from phi_lit.registry import VOCABULARY
from phi_lit.train import checkpoint, saved_steps
from phi_lit.train.adaptation import quantizer
from phi_lit.train.args import TrainArgs, raise_together
from phi_lit.train.build import build
from phi_lit.train.deepspeed import check_deepspeed
from phi_lit.train.experts import expert_faults
from phi_lit.train.heap import keep_freed_memory
from phi_lit.train.job import Job, Machine, flat, plain
from phi_lit.train.loop import Run, Stopped, fit, is_due, validate
from phi_lit.train.microbatch import out_of_memory
from phi_lit.train.monitor import memory, read_record
from phi_lit.train.optim import MATRICES_ONLY, parse_optimizer
from phi_lit.train.strategy import check_precision, check_strategy, make_strategy
from phi_lit.train.teacher import faults_of as faults_of_teacher


def launch(job: Job) -> None:
    """Check a job, build its run, train, and leave a checkpoint in `out_dir/final`."""
    arguments = job.arguments
    job.tokenizer_dir = _existing(job.tokenizer_dir)
    job.weights_dir = _existing(job.weights_dir)
    job.train.teacher = _existing(job.train.teacher)
    out_dir = init_out_dir(arguments["out_dir"])
    machine = Machine(
        devices=parse_devices(arguments["devices"]),
        num_nodes=arguments["num_nodes"],
        precision=arguments["precision"] or _default_precision(job),
        kind="cuda" if torch.cuda.is_available() else "cpu",
    )
    check(job, machine)
    if machine.kind == "cpu":
        keep_freed_memory()
    with disk_errors(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        logger = choose_logger(
            arguments["logger_name"], out_dir, name=f"{job.command}-{job.config.name}",
            resume=bool(arguments["resume"]), log_interval=job.train.log_interval,
            log_args=asdict(arguments["log"]),
        )  # fmt: skip
    fabric = Fabric(
        accelerator=machine.kind,
        devices=machine.devices,
        num_nodes=machine.num_nodes,
        precision=_fabric_precision(job, machine),  # type: ignore[arg-type]
        plugins=quantizer(job.quantize, machine.precision) if job.quantize else None,
        loggers=[logger],
        strategy=make_strategy(
            arguments["strategy"] or "auto",
            sharding=arguments["sharding"] or "full",
            cpu_offload=arguments["cpu_offload"],
            precision=machine.precision,
            devices=machine.devices,
            num_nodes=machine.num_nodes,
            checkpointing=job.train.activation_checkpointing or "none",
        ),
    )
    fabric.launch()
    fabric.print(pprint.pformat(plain(arguments), width=100))
    if fabric.global_rank == 0 and arguments["logger_name"] != "csv":  # which cannot
        fabric.logger.log_hyperparams(flat(plain(arguments)))
    with out_of_memory(job):
        run = build(job, machine, fabric, out_dir)
        try:
            _train(job, run)
        finally:
            run.monitor.close()


def _fabric_precision(job: Job, machine: Machine) -> str | None:
    """Return what Fabric is to know: DeepSpeed and quantized layers cast by themselves."""
    if job.quantize:
        return None
    return "32-true" if job.arguments["strategy"] == "deepspeed" else machine.precision


def _default_precision(job: Job) -> str:
    if job.quantize:
        return "bf16-true" if torch.cuda.is_available() else "32-true"
    return get_default_supported_precision(training=True)


def check(job: Job, machine: Machine) -> None:
    """Raise one `UserError` with everything that is wrong with a job's arguments."""
    arguments, train = job.arguments, job.train
    strategy = arguments["strategy"] or "auto"
    strategy = "fsdp" if strategy == "auto" and machine.world > 1 else strategy
    faults = train.check()
    faults += check_precision(machine.precision, device=machine.kind, strategy=strategy)
    faults += check_strategy(
        strategy,
        world=machine.world,
        device=machine.kind,
        precision=machine.precision,
        cpu_offload=arguments["cpu_offload"],
    )
    faults += _batch_faults(train, machine.world)
    faults += expert_faults(train, job.config)
    if arguments["resume"] not in (False, "auto") and arguments.get("initial_checkpoint_dir"):
        faults.append(
            "resume and initial_checkpoint_dir are both given; choose one, or resume: auto, which "
            "takes the first weights from initial_checkpoint_dir where no checkpoint is there yet"
        )
    length = train.max_seq_length
    if length is not None and not 1 <= length <= job.config.block_size:
        faults.append(
            f"train.max_seq_length is {length}; {job.config.name} takes 1 to "
            f"{job.config.block_size}"
        )
    if train.async_save and train.checkpoint_format == "sharded":
        faults.append("train.async_save writes whole tensors; leave out checkpoint_format: sharded")
    faults += _vocabulary_faults(job)
    logger = arguments["logger_name"]
    if logger in ("wandb", "mlflow") and find_spec(logger) is None:
        faults.append(f"logger_name {logger} needs its package: pip install {logger}")
    faults += faults_of_teacher(job, machine, strategy)
    if job.adaptation is not None:
        faults += job.adaptation.faults(job)
    if job.quantize and machine.world > 1:
        faults.append("quantize works on one device; set devices: 1")
    optimizer, _ = parse_optimizer(arguments["optimizer"])
    fp16 = machine.precision == "16-mixed"
    if fp16 and optimizer.__name__ in MATRICES_ONLY:
        faults.append(f"{optimizer.__name__} needs whole gradients of one scale; use bf16-mixed")
    if fp16 and machine.world > 1 and train.checkpoint_format == "sharded":
        faults.append("train.checkpoint_format: sharded needs FSDP2, which has no 16-mixed")
    if strategy == "deepspeed":
        faults += check_deepspeed(
            sharding=arguments["sharding"] or "full", precision=machine.precision,
            optimizer=optimizer,
        )  # fmt: skip
        if train.checkpoint_format == "sharded":
            faults.append("train.checkpoint_format: sharded needs strategy fsdp, not deepspeed")
    raise_together(faults)


def _vocabulary_faults(job: Job) -> list[str]:
    """Hold the tokenizer against the model: ids must fit, and phi-1 means codegen's."""
    if job.tokenizer_dir is None:
        job.tokenizer_dir = _existing(getattr(job.data, "tokenizer_dir", None))
    if job.tokenizer_dir is None:
        return []
    tokenizer = load_tokenizer(job.tokenizer_dir)
    name, room = job.config.name, job.config.padded_vocab_size or 0
    promised = VOCABULARY.get(name)
    promised_is_kept = promised is None or tokenizer.fingerprint == CODEGEN_FINGERPRINT
    if tokenizer.vocab_size > room:
        return [
            f"the tokenizer {job.tokenizer_dir} has {tokenizer.vocab_size:,} ids, {name} has room "
            f"for {room:,}; choose another tokenizer_dir or model"
        ]
    if not promised_is_kept:
        return [
            f"{name} means codegen's vocabulary of {promised:,} ids, the tokenizer "
            f"{job.tokenizer_dir} is another one, of {tokenizer.vocab_size:,}; make it with "
            "`phi-lit tokenizer codegen`, or choose a model with its own vocabulary (phi1-nano)"
        ]
    return []


def _batch_faults(train: TrainArgs, world: int) -> list[str]:
    micro = 1 if train.micro_batch_size == "auto" else train.micro_batch_size
    rows = train.global_batch_size
    if rows % (micro * world) == 0:
        return []
    fitting = [n for n in range(1, rows // world + 1) if rows % (n * world) == 0]
    allowed = f"allowed here: {', '.join(map(str, fitting))}" if fitting else "none fits"
    return [
        f"train.global_batch_size {rows} is not a multiple of micro_batch_size {micro} x {world} "
        f"devices; micro_batch_size {allowed}"
    ]


def _existing(directory: Path | None) -> Path | None:
    return None if directory is None else extend_checkpoint_dir(Path(directory))


# ---------------------------------------------------------------------------------------- training


def _train(job: Job, run: Run) -> None:
    """Train to the end and leave `final/`, the loss curve and a summary."""
    fabric, course = run.fabric, run.course
    last = run.out_dir / f"step-{course.steps:08d}"
    if run.place.step >= course.steps:
        fabric.print(f"nothing to do: this run already ended at step {run.place.step}")
        if not last.is_dir():  # resumed from a directory elsewhere
            return
    if job.eval.initial_validation and run.place.step == 0:
        validate(run)
    try:
        fit(run)
    except Stopped as stopped:
        run.monitor.say(
            f"stopped by {stopped} after step {run.place.step}; saved, go on with --resume auto"
        )
        return
    if job.eval.final_validation and not is_due(course.steps, course.validate_every):
        validate(run)
    if fabric.global_rank == 0:
        if checkpoint.read_manifest(last)["sharded"]:
            checkpoint.consolidate(last)
        saved_steps.copy_as_final(last, run.out_dir / "final")
        run.monitor.close()
        if job.arguments.get("lora_r") and job.adaptation is not None:
            _merge(job, run)
        _summarize(job, run)
    fabric.barrier()


def _merge(job: Job, run: Run) -> None:
    """Make ordinary checkpoints of the last and the best LoRA weights."""
    from phi_lit.merge import merge_into

    assert job.weights_dir is not None
    settings = {name: value for name, value in job.arguments.items() if name.startswith("lora_")}
    for name in ("final", "best") if run.train.keep_best else ("final",):
        merge_into(run.out_dir / name, job.weights_dir, settings)


def _summarize(job: Job, run: Run) -> None:
    """Draw the loss curve and print what a reader wants to know at the end."""
    from phi_lit.train.plot import plot_losses
    from phi_lit.train.plot_experts import plot_experts

    rows = read_record(run.out_dir)
    entropy = getattr(job.data, "unigram_entropy", lambda: None)()
    plot_losses(
        rows,
        run.out_dir / "losses.png",
        title=f"{job.command} {job.config.name}",
        reference={} if entropy is None else {"unigram entropy": entropy},
    )
    routed = any("experts" in row for row in rows)
    if routed:
        plot_experts(rows, run.out_dir / "experts.png", title=f"{job.command} {job.config.name}")
    held_out = [row["val_loss"] for row in rows if "val_loss" in row]
    lines = {"steps": f"{run.place.step:,}", "tokens": f"{rows[-1]['tokens']:,}" if rows else "0"}
    if held_out:
        lines["held-out loss"] = f"{held_out[-1]:.4f} nats per token"
    if entropy is not None:
        lines["unigram entropy"] = f"{entropy:.4f} nats per token (no context at all)"
    if run.monitor.steps:
        tokens = run.monitor.steps * run.monitor.tokens_per_step
        lines["training time"] = f"{run.monitor.seconds:,.1f} s in this process"
        speed = tokens / run.monitor.seconds
        lines["speed"] = f"{speed:,.0f} tokens/s, {run.monitor.mfu(speed):.1%} MFU (6N + 12LdT)"
    lines["memory"] = f"{memory(run.fabric)['memory_gb']:.2f} GB"
    if run.place.skipped:
        lines["skipped steps"] = f"{run.place.skipped:,}"
    lines["loss curve"] = str(run.out_dir / "losses.png")
    if routed:
        lines["expert load"] = str(run.out_dir / "experts.png")
    lines["checkpoint"] = str(run.out_dir / "final")
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
