"""What a run is: that which the next session of it must have in common with the one before."""

import json
from typing import Any

from phi_lit.data.tokenizer import load_tokenizer
from phi_lit.errors import UserError
from phi_lit.train import checkpoint, foreign
from phi_lit.train import teacher as teachers
from phi_lit.train.args import masks_documents
from phi_lit.train.course import Course
from phi_lit.train.experts import architecture, expert_settings
from phi_lit.train.job import Job, Machine, plain
from phi_lit.train.optim import parse_optimizer


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
