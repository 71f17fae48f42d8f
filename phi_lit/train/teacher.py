"""The teacher of a distillation: a trained model, opened, checked and run beside the student.

It is held outside of the student's modules, so its weights reach neither the optimizer nor a
checkpoint. It runs in evaluation, without gradients and in a number format of its own. What its
logits do to the loss is in `distillation.py`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from litgpt.config import Config
from litgpt.model import GPT
from torch import Tensor

from phi_lit.data.tokenizer import load_tokenizer
from phi_lit.errors import UserError
from phi_lit.train import checkpoint, foreign
from phi_lit.train.args import TrainArgs, masks_documents
from phi_lit.train.distillation import TeacherHead
from phi_lit.train.documents import apply_document_mask
from phi_lit.train.flops import count_parameters, flops_per_token_6n_12ldt
from phi_lit.train.model import hidden_states, let_head_step_aside, plain_head
from phi_lit.train.strategy import shard_blocks

if TYPE_CHECKING:
    from lightning import Fabric

    from phi_lit.train.job import Job, Machine

DTYPES = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
}
"""What `train.teacher_precision` can be."""

SHARE, TEMPERATURE = 0.5, 1.0
"""The defaults of `train.distill_weight` and `train.distill_temperature`."""


class Teacher:
    """A model whose distribution over the next token is to be learned.

    Args:
        gpt: LitGPT's model, of any architecture; its parameters are frozen.
        share: weight of the divergence in the loss, 0 to 1.
        temperature: softens both distributions.
    """

    def __init__(self, gpt: GPT, *, share: float = SHARE, temperature: float = TEMPERATURE) -> None:
        self.gpt = gpt.eval().requires_grad_(False)
        self.share, self.temperature = share, temperature
        let_head_step_aside(gpt)

    @torch.no_grad()
    def look_at(self, idx: Tensor, documents: Tensor | None = None) -> TeacherHead:
        """Run the teacher on the student's ids (B, T), up to its head; documents as the student's.

        A teacher whose logits are not one linear layer of its hidden states makes them whole.
        """
        with torch.autocast(idx.device.type, enabled=False):
            hidden = hidden_states(self.gpt, idx, documents).flatten(0, 1)
        head = plain_head(self.gpt)
        weight, bias = (None, None) if head is None else (head.weight, head.bias)
        return TeacherHead(hidden, weight, bias, self.share, self.temperature)

    def place(self, fabric: "Fabric", *, sharded: bool = False) -> None:
        """Put the weights where they are used: whole on every rank, or in FSDP2's shards."""
        cosine, sine = self.gpt.cos, self.gpt.sin
        self.gpt.to(fabric.device)
        if sharded:
            shard_blocks(
                self.gpt,
                fabric.strategy.device_mesh,  # type: ignore[attr-defined]
                sharding="full",
                cpu_offload=False,
                num_nodes=1,
            )
        # Rotary tables stay float32: rounded to bf16 they would blur the later positions.
        self.gpt.cos, self.gpt.sin = cosine.to(fabric.device), sine.to(fabric.device)


def open_teacher(job: "Job", machine: "Machine") -> Teacher | None:
    """Return the teacher that a job asks for, on the CPU, or None."""
    if job.train.teacher is None:
        return None
    # Its first weights are thrown away: they must not move the student's random state.
    with torch.random.fork_rng(devices=[]):
        gpt = GPT(Config.from_file(job.train.teacher / "model_config.yaml"))
    checkpoint.load_weights(gpt, job.train.teacher)
    gpt.max_seq_length = job.length
    cosine, sine = gpt.cos, gpt.sin
    if masks_documents(job.train):
        apply_document_mask(gpt)
    gpt.to(DTYPES[precision_of(job.train, machine.precision)])
    gpt.cos, gpt.sin = cosine, sine
    return Teacher(gpt, share=share_of(job), temperature=temperature_of(job))


def precision_of(train: TrainArgs, precision: str) -> str:
    """Return the teacher's number format: as asked, or that of the run's matrix products."""
    if train.teacher_precision is not None:
        return train.teacher_precision
    return f"{precision.partition('-')[0]}-true"


def share_of(job: "Job") -> float:
    """Return the weight of the divergence in the loss."""
    return SHARE if job.train.distill_weight is None else job.train.distill_weight


def temperature_of(job: "Job") -> float:
    """Return the temperature of both distributions."""
    given = job.train.distill_temperature
    return TEMPERATURE if given is None else given


def bytes_of(train: TrainArgs, precision: str, world: int) -> float:
    """Return what the teacher's weights take on each device."""
    if train.teacher is None:
        return 0.0
    itemsize = DTYPES[precision_of(train, precision)].itemsize
    size = count_parameters(_config_of(train)).total * itemsize
    return size / world if train.teacher_sharded else size


def flops_of(train: TrainArgs, length: int) -> float:
    """Return what the teacher's forward pass adds to the work for a token: a third of training."""
    if train.teacher is None:
        return 0.0
    return flops_per_token_6n_12ldt(_config_of(train), length) / 3


def _config_of(train: TrainArgs) -> Config:
    assert train.teacher is not None
    path = Path(train.teacher) / "model_config.yaml"
    if not path.is_file():
        raise UserError(f"train.teacher: there is no {path}")
    return Config.from_file(path)


def identity_of(job: "Job") -> dict[str, Any] | None:
    """Return what a resumed run must match: the teacher's weights, wherever they lie, and the
    mixture."""
    if job.train.teacher is None:
        return None
    return {
        "teacher": foreign.digest(job.train.teacher),
        "weight": share_of(job),
        "temperature": temperature_of(job),
        "precision": job.train.teacher_precision,
    }


def loss_of_a_guess(job: "Job", entropy: float) -> float:
    """Return the loss of a uniform guess: no divergence from it is above the vocabulary's
    entropy."""
    if job.train.teacher is None:
        return entropy
    share = share_of(job)
    return entropy * (1 - share + share * temperature_of(job) ** 2)


# ------------------------------------------------------------------------------------------ checks


def faults_of(job: "Job", machine: "Machine", strategy: str) -> list[str]:
    """Return what is wrong with a job's teacher, a sentence each; no weights are read."""
    train = job.train
    if train.teacher is None:
        return [
            f"train.{name} is set without a train.teacher"
            for name in (
                "distill_weight", "distill_temperature", "teacher_precision", "teacher_sharded"
            )
            if getattr(train, name) is not None
        ]  # fmt: skip
    faults = []
    if train.teacher_sharded and (strategy != "fsdp" or machine.precision == "16-mixed"):
        faults.append(
            "train.teacher_sharded needs strategy: fsdp on several devices, and not 16-mixed"
        )
    if machine.kind == "cpu" and train.teacher_precision == "16-true":
        faults.append("train.teacher_precision 16-true needs a GPU; use bf16-true or 32-true")
    return faults + foreign.faults(train.teacher, "train.teacher") or faults + _misfits(job)


def _misfits(job: "Job") -> list[str]:
    """Hold a teacher's vocabulary, tokenizer and context against the student's."""
    directory = job.train.teacher
    assert directory is not None
    config = Config.from_file(directory / "model_config.yaml")
    faults = []
    if config.padded_vocab_size != job.config.padded_vocab_size:
        faults.append(
            f"the teacher {config.name} gives {config.padded_vocab_size:,} logits, "
            f"{job.config.name} {job.config.padded_vocab_size:,}; a student needs its teacher's "
            "vocabulary (padded_vocab_size)"
        )
    if config.block_size < job.length:
        faults.append(
            f"the teacher {config.name} sees {config.block_size:,} tokens, a row has "
            f"{job.length:,}; set train.max_seq_length to {config.block_size} or less"
        )
    return faults + _tokenizer_faults(directory, job.tokenizer_dir)


def _tokenizer_faults(directory: Path, tokenizer_dir: Path | None) -> list[str]:
    if tokenizer_dir is None:
        return ["the teacher's tokenizer cannot be compared with the data's: give tokenizer_dir"]
    try:
        theirs, ours = load_tokenizer(directory), load_tokenizer(tokenizer_dir)
    except UserError as error:
        return [f"train.teacher: {error}"]
    if theirs.fingerprint == ours.fingerprint:
        return []
    return [
        f"the teacher {directory} has another tokenizer ({theirs.vocab_size:,} ids) than the data "
        f"({tokenizer_dir}, {ours.vocab_size:,} ids): the same number would mean another text; "
        "distil from a teacher with the data's tokenizer"
    ]
