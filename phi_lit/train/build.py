"""Making a run out of a job: data connected, model built and placed, state taken up again.

The order matters and is told here once: dropout, activation checkpointing, compilation of the
blocks, then Fabric's wrapper (which shards), then the optimizer over the parameters as they are by
then.
"""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Fabric
from litgpt.model import GPT
from litgpt.prompts import save_prompt_style
from litgpt.tokenizer import Tokenizer
from litgpt.utils import save_config, select_sft_generate_example
from torch.optim import Optimizer

from phi_lit.data.tokenizer import load_tokenizer
from phi_lit.errors import UserError
from phi_lit.train import checkpoint, foreign, state
from phi_lit.train import teacher as teachers
from phi_lit.train.adaptation import trained_parameters
from phi_lit.train.args import masks_documents
from phi_lit.train.checkpoint import Place
from phi_lit.train.checkpoint_dir import TOKENIZER_FILES
from phi_lit.train.checkpointing import apply_activation_checkpointing
from phi_lit.train.course import Course, plan_course
from phi_lit.train.deepspeed import ZeroStrategy
from phi_lit.train.devices import peak_for
from phi_lit.train.documents import apply_document_mask
from phi_lit.train.dropout import apply_dropout
from phi_lit.train.experts import Experts, apply_expert_options, architecture, expert_settings
from phi_lit.train.flops import count_parameters, flops_per_token_6n_12ldt
from phi_lit.train.init import initialize
from phi_lit.train.job import Job, Machine, plain
from phi_lit.train.job_feed import held_out, make_job_feed
from phi_lit.train.loop import Run, unwrapped
from phi_lit.train.microbatch import largest_micro_batch, refuse_what_cannot_fit
from phi_lit.train.model import LossModel, compile_blocks
from phi_lit.train.monitor import Monitor
from phi_lit.train.optim import build_optimizer, parse_optimizer

COMPILE_PAYS_AFTER = 900.0
"""Seconds that a run must be expected to last before `compile: auto` compiles on a CPU: it starts
half a minute later and is some 5 % faster (benchmarks/train_step.py)."""

USUAL_MFU = 0.3
"""Share of the peak that such an expectation counts with."""


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
        held_out=held_out(job), course=course, train=job.train, place=place,
        monitor=monitor, out_dir=out_dir, seed=job.arguments["seed"], identity=identity,
        write_side_files=side_files(job), weights_file=weights_file(job),
        uniform_loss=teachers.loss_of_a_guess(job, math.log(job.config.padded_vocab_size or 2)),
        experts=Experts.of(model.gpt, job.train.balance_bias_rate),
        sample=sampler(job, fabric, model),
    )  # fmt: skip


def arithmetic_of(precision: str) -> torch.dtype:
    """Return the dtype of the matrix products under a precision."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32


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
    found = checkpoint.find_resume(job.arguments["resume"], out_dir, fabric.print)
    if fabric.world_size > 1:
        found = fabric.broadcast(found)
    step = checkpoint.read_manifest(found)["step"] if found else 0
    if fabric.global_rank == 0:
        checkpoint.refuse_later_steps(out_dir, step)
    return found


def describe(job: Job, machine: Machine, course: Course) -> dict[str, Any]:
    """Return what a resumed run must match, as plain JSON: model, data, batch, recipe.

    Numbers of processes and rows per forward pass are left out: they may change.
    """
    train = job.train
    cls, init_args = parse_optimizer(job.arguments["optimizer"])
    tokenizer = load_tokenizer(job.tokenizer_dir).fingerprint if job.tokenizer_dir else None
    identity = getattr(job.data, "identity", None)
    description = {
        "model": {key: value for key, value in vars(job.config).items() if key != "hf_config"},
        "data": identity() if identity else plain(job.data),
        "tokenizer": tokenizer,
        "batch": {"global_batch_size": train.global_batch_size, "max_seq_length": job.length},
        "optimizer": {"class": f"{cls.__module__}.{cls.__qualname__}", **init_args},
        "schedule": {
            key: getattr(course, key)
            for key in ("schedule", "warmup", "schedule_steps", "decay", "floor")
        },
        "loss": {"z_loss": train.z_loss, "max_norm": train.max_norm},
        "distillation": teachers.identity_of(job),
        **_adaptation_identity(job),
        "weight_decay_on": train.weight_decay_on,
        "tie_embeddings": bool(train.tie_embeddings),
        "dropout": {"attention": train.attention_dropout, "residual": train.residual_dropout},
        "precision": machine.precision,
        "seed": job.arguments["seed"],
        **(
            {"experts": experts}
            if (experts := {**architecture(job.config), **expert_settings(train)})
            else {}
        ),
        **({"pack": True} if train.pack else {}),
        **({"document_mask": True} if masks_documents(train) else {}),
    }
    return json.loads(json.dumps(description, default=str))


def _adaptation_identity(job: Job) -> dict[str, Any]:
    """Return what is not in the checkpoints of a run that trains few parameters: the others."""
    if job.adaptation is None or job.weights_dir is None:
        return {}
    base = foreign.digest(job.weights_dir)
    return {"method": job.adaptation.command, "base": base, "quantize": job.quantize}


def refuse_changes(
    source: str, saved: dict[str, Any], now: dict[str, Any], allowed: bool | None
) -> None:
    """Raise if a run differs from the one that a checkpoint comes from, unless it may."""
    changes = checkpoint.differences(saved, now)
    if changes and not allowed:
        raise UserError(
            f"cannot resume from {source}, because {'; '.join(changes)}. Undo that, choose another "
            "out_dir, or set train.resume_changed: true to go on all the same"
        )


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


def decide_compile(
    job: Job, machine: Machine, fabric: Fabric, course: Course, resume_dir: Path | None
) -> bool:
    """Decide once for all ranks and all sessions of a run: compiled code rounds differently."""
    if (job.train.compile or "auto") == "auto" and resume_dir is not None:
        return bool(checkpoint.load_file(resume_dir / checkpoint.STATE_FILE)["compiled"])
    decided = should_compile(job, machine, course)
    return fabric.broadcast(decided) if fabric.world_size > 1 else decided


def should_compile(job: Job, machine: Machine, course: Course) -> bool:
    """Tell whether to compile the blocks: as asked, or where the run is long enough to pay.

    Raises:
        UserError: compilation is asked for, but there is no compiler for this device.
    """
    mode = job.train.compile or "auto"
    compiler = has_compiler(machine.kind)
    if mode == "on" and not compiler:
        need = "a C++ compiler (g++)" if machine.kind == "cpu" else "the package triton"
        raise UserError(f"train.compile is on, but torch.compile needs {need} here")
    if mode != "auto" or not compiler:
        return mode == "on"
    if machine.kind == "cuda":
        return True
    if machine.precision != "32-true":  # compiled bf16 blocks were slower than eager ones
        return False
    flops = flops_per_token_6n_12ldt(job.config, job.length)
    tokens = course.steps * course.global_batch_size * job.length
    peak = peak_for(torch.device("cpu"), arithmetic_of(machine.precision)) * machine.world
    return tokens * flops / (USUAL_MFU * peak) > COMPILE_PAYS_AFTER


def compile_options(machine: Machine) -> dict[str, Any]:
    """Return what `torch.compile` is to be told for this device and number format."""
    several = machine.precision == "bf16-mixed" and machine.world > 1  # FSDP2 gathers in bf16
    if machine.kind == "cpu" and (machine.precision == "bf16-true" or several):
        # Both branches of a parallel block get one gradient. Where one kernel sums it for both
        # biases in bf16, torch 2.13 gives two variables one name and the C++ does not build.
        return {"options": {"cpp.max_horizontal_fusion_size": 1}}
    return {}


def has_compiler(kind: str) -> bool:
    """Tell whether torch.compile has what it needs for a kind of device."""
    if kind == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    return shutil.which("g++") is not None or shutil.which("clang++") is not None


def place_model(job: Job, fabric: Fabric, model: LossModel) -> tuple[torch.nn.Module, list[Any]]:
    """Put the model where it trains and make its optimizers; returns both in Fabric's wrappers."""
    cosine, sine = model.gpt.cos, model.gpt.sin

    def optimizers() -> list[Optimizer]:
        wanted, decay_on = job.arguments["optimizer"], job.train.weight_decay_on or "all"
        return build_optimizer(model, wanted, decay_on)

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


# --------------------------------------------------------------------------------- side by side


def weights_file(job: Job) -> str:
    """Return the name of the file with the weights that a run trains."""
    return job.adaptation.weights_file if job.adaptation else checkpoint.MODEL_FILE


def side_files(job: Job) -> Callable[[Path], None]:
    """Return what writes a checkpoint's other files, those that make it LitGPT's."""

    words = hub_config(job)

    def write(directory: Path) -> None:
        if job.adaptation is None:
            save_config(job.config, directory)
        else:  # the base model's: the method's own fields are in hyperparameters.yaml
            assert job.weights_dir is not None
            shutil.copyfile(job.weights_dir / "model_config.yaml", directory / "model_config.yaml")
        if words is not None:
            (directory / "config.json").write_text(words, encoding="utf-8")
        for name in TOKENIZER_FILES if job.tokenizer_dir else ():
            if (job.tokenizer_dir / name).is_file():  # type: ignore[operator]
                shutil.copyfile(job.tokenizer_dir / name, directory / name)  # type: ignore[operator]
        save_prompt_style(job.prompt_style, directory)
        with open(directory / "hyperparameters.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump(plain(job.arguments), file, sort_keys=False)

    return write


def hub_config(job: Job) -> str | None:
    """Return the config.json that transformers (and so `litgpt evaluate`) wants, or None for a
    model that transformers does not have."""
    from phi_lit.export.configuration import checkpoint_words

    try:
        words = checkpoint_words(job.config, job.weights_dir, job.tokenizer_dir)
    except UserError:  # such as a mixture of experts: LitGPT alone computes it
        return None
    return json.dumps(words, indent=2) + "\n"


def sampler(job: Job, fabric: Fabric, model: LossModel) -> Callable[[], str] | None:
    """Return what lets the model continue `train.sample_prompt` (in finetuning also a question of
    the data), where it can.

    One process only: a sharded model has no place to keep a cache of keys and values.
    """
    if job.tokenizer_dir is None or fabric.world_size > 1:
        return None
    tokenizer = Tokenizer(job.tokenizer_dir)
    given = job.train.sample_prompt
    prompt = given if given is not None else _example_of(job)
    if prompt is None:
        return None
    if len(tokenizer.encode(prompt)) >= job.length:
        if given is None:  # an example that leaves no room to answer
            return None
        raise UserError(f"train.sample_prompt is longer than a row of {job.length} tokens")
    new_tokens = job.eval.max_new_tokens or 100
    return lambda: sample_text(model.gpt, tokenizer, prompt, fabric.device, new_tokens)


def _example_of(job: Job) -> str | None:
    """Return a question of the data as LitGPT's finetuning chooses it, or None where there is none:
    a flat array, or a data set that does not show its texts."""
    examples = getattr(getattr(job.data, "test_dataset", None), "data", None)
    style = getattr(job.data, "prompt_style", None)
    if job.command != "finetune" or not examples or style is None:
        return None
    return style.apply(select_sft_generate_example(job.eval, job.data))


@torch.no_grad()
def sample_text(
    gpt: GPT, tokenizer: Tokenizer, prompt: str, device: torch.device, new_tokens: int = 100
) -> str:
    """Let `gpt` continue a prompt, and leave it in training mode without a cache."""
    from litgpt.generate.base import generate

    encoded = tokenizer.encode(prompt, device=device)
    gpt.eval()
    gpt.set_kv_cache(batch_size=1, device=device, dtype=gpt.transformer.wte.weight.dtype)
    try:
        # Every length would be compiled anew; for a few tokens that is the slow way.
        with torch.compiler.set_stance("force_eager"):
            written = generate(
                gpt,
                encoded,
                max_returned_tokens=min(len(encoded) + new_tokens, gpt.max_seq_length),
                temperature=0.8,
                top_k=50,
                eos_id=tokenizer.eos_id,
            )
    finally:
        gpt.clear_kv_cache()
        gpt.train()
    return tokenizer.decode(written)
