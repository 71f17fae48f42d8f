"""Making a run out of a job: data connected, model built and placed, state taken up again.

The order matters and is told here once: dropout, activation checkpointing, compilation of the
blocks, then Fabric's wrapper (which shards), then the optimizer over the parameters as they are by
then.
"""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from torch.optim import Optimizer

from phi_lit.errors import UserError
from phi_lit.train import checkpoint, saved_steps, state
from phi_lit.train import teacher as teachers
from phi_lit.train.adaptation import trained_parameters
from phi_lit.train.args import masks_documents
from phi_lit.train.checkpoint import Place
from phi_lit.train.checkpointing import apply_activation_checkpointing
from phi_lit.train.compiling import compile_options, decide_compile
from phi_lit.train.course import plan_course
from phi_lit.train.deepspeed import ZeroStrategy
from phi_lit.train.devices import arithmetic_of, peak_for
from phi_lit.train.documents import apply_document_mask
from phi_lit.train.dropout import apply_dropout
from phi_lit.train.experts import Experts, apply_expert_options
from phi_lit.train.flops import count_parameters, flops_per_token_6n_12ldt
from phi_lit.train.identity import describe, refuse_changes
from phi_lit.train.init import initialize
from phi_lit.train.job import Job, Machine
from phi_lit.train.job_feed import held_out, make_job_feed
from phi_lit.train.loop import Run, unwrapped
from phi_lit.train.microbatch import largest_micro_batch, refuse_what_cannot_fit
from phi_lit.train.model import LossModel, compile_blocks
from phi_lit.train.monitor import Monitor
from phi_lit.train.optim import build_optimizer
from phi_lit.train.sample import sampler
from phi_lit.train.side_files import side_files, weights_file


def build(job: Job, machine: Machine, fabric: Fabric, out_dir: Path) -> Run:
    """Prepare the data, build and place the model, and take up a saved state if asked."""
    given = job.train.micro_batch_size
    refuse_what_cannot_fit(job, machine, 1 if given == "auto" else given)
    prepare_data(job, fabric)
    planned = make_job_feed(job, fabric, 1)
    course = plan_course(job, planned.rows_per_epoch)
    resume_dir = find_checkpoint(job, fabric, out_dir)
    manifest = checkpoint.read_manifest(resume_dir) if resume_dir else None
    identity = describe(job, machine, course)
    if manifest is not None:
        refuse_changes(str(resume_dir), manifest["run"], identity, job.train.resume_changed)

    model = build_model(job, fabric, first_weights=resume_dir is None)
    model.teacher = teachers.open_teacher(job, machine)
    compiled = decide_compile(job, machine, fabric, course, resume_dir)
    if compiled:
        options = compile_options(machine)
        compile_blocks(model.gpt, **options)
        if model.teacher is not None:
            compile_blocks(model.teacher.gpt, **options)
    module, optimizers = place_model(job, fabric, model)
    micro_batch = choose_micro_batch(job, machine, fabric, module, resume_dir)
    course = plan_course(job, course.rows_per_epoch, micro_batch * fabric.world_size)
    peaks = [[group["lr"] for group in each.param_groups] for each in optimizers]
    place = Place()
    if resume_dir is not None and manifest is not None:
        place = take_up(resume_dir, manifest, fabric, module, optimizers)
    place.micro_batch_size, place.compiled = micro_batch, compiled

    connect_data(job, micro_batch)
    feed = make_job_feed(job, fabric, micro_batch, planned)
    feed.seek(place.rows)
    peak = peak_for(fabric.device, arithmetic_of(machine.precision))
    monitor = Monitor(
        fabric, out_dir, total=course.steps, done=place.step,
        tokens_per_step=job.train.global_batch_size * job.length,
        flops_per_token=flops_per_token_6n_12ldt(job.config, job.length),
        peak_flops=peak * fabric.world_size,
    )  # fmt: skip
    return Run(
        fabric=fabric, module=module, optimizers=optimizers, peaks=peaks, feed=feed,
        held_out=held_out(job, fabric), course=course, train=job.train, place=place,
        monitor=monitor, out_dir=out_dir, seed=job.arguments["seed"], identity=identity,
        write_side_files=side_files(job), weights_file=weights_file(job),
        uniform_loss=teachers.loss_of_a_guess(job, math.log(job.config.padded_vocab_size or 2)),
        experts=Experts.of(model.gpt, job.train.balance_bias_rate),
        sample=sampler(job, fabric, model),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------- data


def prepare_data(job: Job, fabric: Fabric) -> None:
    """Let the data module prepare itself, on rank 0 first, and hold its ids against the model."""
    tell_data(job, 1)
    with fabric.rank_zero_first():
        job.data.prepare_data()
    job.data.setup()
    room, ids = job.config.padded_vocab_size or 0, getattr(job.data, "vocab_size", 0)
    if ids > room:
        raise UserError(
            f"the data have {ids:,} ids, {job.config.name} has room for {room:,}; choose another "
            "tokenizer_dir or model"
        )


def connect_data(job: Job, micro_batch: int) -> None:
    """Let prepared data know how many rows are taken at a time."""
    tell_data(job, micro_batch)
    job.data.setup()


def tell_data(job: Job, micro_batch: int) -> None:
    """Tell the data module the tokenizer and the shapes."""
    tokenizer = Tokenizer(job.tokenizer_dir) if job.tokenizer_dir else None
    extra = {"tokenizer_dir": job.tokenizer_dir} if hasattr(job.data, "tokenizer_dir") else {}
    job.data.connect(
        tokenizer=tokenizer, batch_size=micro_batch, max_seq_length=job.length, **extra
    )


# ------------------------------------------------------------------------------------------ resume


def find_checkpoint(job: Job, fabric: Fabric, out_dir: Path) -> Path | None:
    """Return the checkpoint to resume from, the same on every rank, or None."""
    found = saved_steps.find_resume(job.arguments["resume"], out_dir, fabric.print)
    if fabric.world_size > 1:
        found = fabric.broadcast(found)
    step = checkpoint.read_manifest(found)["step"] if found else 0
    if fabric.global_rank == 0:
        saved_steps.refuse_later_steps(out_dir, step)
    return found


# ------------------------------------------------------------------------------------------- model


def build_model(job: Job, fabric: Fabric, *, first_weights: bool) -> LossModel:
    """Build the model in float32 on the CPU, the same on every rank.

    Args:
        job: names the model, its first weights and what is done to its blocks.
        fabric: knows how weights are quantized, if they are.
        first_weights: fill it (a resumed run's weights come from its checkpoint instead).
    """
    train = job.train
    torch.manual_seed(job.arguments["seed"])
    gpt = _adapted_gpt(job, fabric) if job.adaptation else _gpt(job, first_weights)
    gpt.max_seq_length = job.length
    apply_expert_options(gpt, train)
    apply_dropout(
        gpt, attention=train.attention_dropout or 0.0, residual=train.residual_dropout or 0.0
    )
    if masks_documents(train):
        apply_document_mask(gpt)
    apply_activation_checkpointing(gpt, train.activation_checkpointing or "none")
    return LossModel(gpt, z_loss=train.z_loss or 0.0)


def _gpt(job: Job, first_weights: bool) -> GPT:
    train = job.train
    gpt = GPT(job.config)
    if first_weights and job.weights_dir is None:
        initialize(gpt, train.init or "litgpt")
    if train.tie_embeddings:
        gpt.transformer.wte.weight = gpt.lm_head.weight
    if first_weights and job.weights_dir is not None:
        checkpoint.load_weights(gpt, job.weights_dir)
    return gpt


def _adapted_gpt(job: Job, fabric: Fabric) -> GPT:
    """Build a model of which few parameters train; a resumed run's checkpoint has only these."""
    assert job.adaptation is not None
    assert job.weights_dir is not None
    with fabric.init_module() if job.quantize else nullcontext():
        return job.adaptation.build(job.config, job.weights_dir)


def choose_micro_batch(
    job: Job, machine: Machine, fabric: Fabric, module: torch.nn.Module, resume_dir: Path | None
) -> int:
    """Return the rows per forward pass: as given, as in the resumed run, or as many as fit."""
    given = job.train.micro_batch_size
    if given != "auto":
        return given
    if resume_dir is not None:
        saved = checkpoint.load_file(resume_dir / checkpoint.STATE_FILE)["micro_batch_size"]
        if job.train.global_batch_size % (saved * fabric.world_size) == 0:
            return saved
    chosen = largest_micro_batch(job, machine, fabric, module)
    fabric.print(f"micro_batch_size: {chosen} rows per forward pass and rank")
    return chosen


def place_model(job: Job, fabric: Fabric, model: LossModel) -> tuple[torch.nn.Module, list[Any]]:
    """Put the model where it trains and make its optimizers; returns both in Fabric's wrappers."""
    cosine, sine = model.gpt.cos, model.gpt.sin

    scaled = getattr(fabric._precision, "scaler", None) is not None

    def optimizers() -> list[Optimizer]:
        wanted, decay_on = job.arguments["optimizer"], job.train.weight_decay_on or "all"
        return build_optimizer(model, wanted, decay_on, scaled=scaled)

    if isinstance(fabric.strategy, ZeroStrategy):  # shards the two together
        module, *placed = fabric.setup(model, *optimizers())
    else:
        module = fabric.setup_module(model)
        placed = [fabric.setup_optimizers(optimizer) for optimizer in optimizers()]
    if model.teacher is not None:
        model.teacher.place(fabric, sharded=bool(job.train.teacher_sharded))
    # Rotary tables stay float32: rounded to bf16 they would blur the later positions.
    model.gpt.cos, model.gpt.sin = cosine.to(fabric.device), sine.to(fabric.device)
    total = count_parameters(job.config, tie_embeddings=bool(job.train.tie_embeddings)).total
    trained = f", {trained_parameters(model):,} of them trained" if job.adaptation else ""
    fabric.print(f"{job.config.name}: {total:,} parameters{trained}")
    return module, placed


def take_up(
    resume_dir: Path, manifest: dict[str, Any], fabric: Fabric, module: Any, optimizers: list[Any]
) -> Place:
    """Fill model, optimizers and loss scale from a checkpoint; returns its place."""
    model_state, optimizer_state, place = checkpoint.read_state(resume_dir, manifest)
    raw = [optimizer.optimizer for optimizer in optimizers]
    wanted = [
        [
            {key: value for key, value in group.items() if key != "params"}
            for group in each.param_groups
        ]
        for each in raw
    ]
    try:
        state.scatter(unwrapped(module), raw, model_state, optimizer_state)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"the state in {resume_dir} does not fit this model and optimizer "
            f"({str(error).splitlines()[0]})"
        ) from error
    for each, groups in zip(raw, wanted, strict=True):
        for group, settings in zip(each.param_groups, groups, strict=True):
            group.update(settings)  # the config's: they may have been changed on purpose
    scaler = getattr(fabric._precision, "scaler", None)
    if place.scaler and scaler is not None:
        scaler.load_state_dict(place.scaler)
    fabric.print(f"resuming after step {place.step} from {resume_dir}")
    return place
