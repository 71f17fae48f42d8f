"""The training options: LitGPT's, with their names and meaning, and ours beside them.

Every field of ours defaults to null, which means "as stock LitGPT": that is how `asks_for_ours`
tells a config that is meant for LitGPT's own loop from one that is meant for ours. The docstring
under a field is its text in `--help`.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from litgpt.args import TrainArgs as LitGPTTrainArgs

from phi_lit.errors import UserError

Strategy = Literal["auto", "ddp", "fsdp", "deepspeed"]
Sharding = Literal["full", "grad_op", "hybrid"]


@dataclass
class TrainArgs(LitGPTTrainArgs):
    """Training-related arguments; those that LitGPT lacks are null by default"""

    micro_batch_size: int | Literal["auto"] = 4
    """Rows per forward pass and rank; "auto" finds the largest that fits in memory"""
    lr_schedule: Literal["linear", "cosine", "wsd", "constant"] | None = None
    """How the learning rate falls after its warm-up, counted in optimizer steps: linear (phi-1),
    cosine (LitGPT's, the default), wsd (constant, then linear over the last lr_decay_steps),
    constant"""
    lr_total_steps: int | None = None
    """Optimizer steps that the schedule is aimed at; default: where the run ends. phi-1-base is
    step 24,000 of a schedule aimed at 36,000"""
    lr_decay_steps: int | None = None
    """Steps of the final fall of the wsd schedule; default: a tenth of the total"""
    attention_dropout: float | None = None
    """Share of attention weights dropped in training (phi-1: 0.1); never stored in a checkpoint"""
    residual_dropout: float | None = None
    """Share of the attention's and MLP's outputs dropped in training (phi-1: 0.1)"""
    weight_decay_on: Literal["all", "matrices"] | None = None
    """Which parameters the optimizer's weight decay pulls: all of them (LitGPT), or only the
    weights of linear layers, leaving out biases, norms and embeddings"""
    pack: bool | None = None
    """Pack several examples into each row (finetuning): best-fit, drawn anew in every epoch, so
    that few positions are padding. They don't see each other unless document_mask is false"""
    document_mask: bool | None = None
    """Let a token see its own document only, positions beginning anew there: on for packed
    examples; for rows of a flat array (CodeTextbook) off as in the paper"""
    z_loss: float | None = None
    """Weight of the mean squared log-partition added to the loss (PaLM: 1e-4)"""
    balance_loss: float | None = None
    """Experts: weight of the loss that keeps their load even (Switch Transformer: 0.01)"""
    router_z_loss: float | None = None
    """Experts: weight of the router's mean squared log-partition (ST-MoE: 0.001)"""
    balance_bias_rate: float | None = None
    """Experts: how far each one's selection bias moves after a step, up where it had less than the
    mean load and down where more: balancing without a loss (DeepSeek-V3: 0.001)"""
    router_jitter: float | None = None
    """Experts: in training the router's input is multiplied by noise of 1 - this to 1 + this
    (Switch Transformer: 0.01)"""
    init: Literal["litgpt", "normal", "gpt2"] | None = None
    """Initial weights: litgpt (GPT-NeoX, std sqrt(0.4 / n_embd)), normal (std 0.02 and zero biases:
    what the released phi-1 config says), gpt2 (normal, residual projections divided by sqrt(2
    n_layer))"""
    activation_checkpointing: Literal["none", "selective", "full"] | None = None
    """What is recomputed in the backward pass, per block: nothing, all but matrix products and
    attention, or everything"""
    compile: Literal["auto", "on", "off"] | None = None
    """Compile the blocks one by one; auto: where the run is long enough to win back the start"""
    name_steps: dict[int, str] | None = None
    """Optimizer steps whose checkpoint is kept and linked under a name, such as {24000:
    phi-1-base}"""
    keep_last: int | None = None
    """How many of the newest checkpoints to keep; default: all. Named and best ones always stay"""
    keep_best: bool | None = None
    """Validate at every save and link the checkpoint with the lowest held-out loss as best/"""
    async_save: bool | None = None
    """Write checkpoints in the background, from a copy of the state in host memory"""
    checkpoint_format: Literal["full", "sharded"] | None = None
    """One file of whole tensors, or one file of shards per rank (`phi-lit consolidate` joins
    them)"""
    on_nonfinite: Literal["stop", "skip"] | None = None
    """What to do at a NaN, infinite or exploding loss: stop and name the last good checkpoint (the
    default), or skip that step and count it"""
    sample_prompt: str | None = None
    """Text that the model continues after each validation, to be read"""
    teacher: Path | None = None
    """Checkpoint directory of a model with the same tokenizer, whose distribution over the next
    token is learned besides the token itself (distillation)"""
    distill_weight: float | None = None
    """Share w of the teacher in the loss, above 0 and up to 1: (1 - w) cross-entropy + w T^2
    KL(teacher || student); default 0.5"""
    distill_temperature: float | None = None
    """Temperature T that softens both distributions in the KL term; default 1"""
    teacher_precision: Literal["32-true", "bf16-true", "16-true"] | None = None
    """Number format of the teacher's weights and arithmetic; default: that of the run's matrix
    products"""
    teacher_sharded: bool | None = None
    """Shard the teacher over the ranks as strategy fsdp does the student; default: each rank holds
    a copy"""
    resume_changed: bool | None = None
    """Resume even if model, data, batch, optimizer or schedule differ from the checkpoint's"""

    def check(self) -> list[str]:
        """Return what is wrong with the values themselves, a sentence each."""
        faults = []
        for name in ("attention_dropout", "residual_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                faults.append(f"train.{name} is {value}; it is a share, from 0 up to below 1")
        for name in (
            "global_batch_size", "micro_batch_size", "max_tokens", "max_steps", "max_time",
            "lr_total_steps", "lr_decay_steps", "keep_last", "save_interval", "log_interval",
            "distill_temperature",
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, int | float) and value <= 0:
                faults.append(f"train.{name} is {value}; it must be above zero")
        for step, name in (self.name_steps or {}).items():
            taken = name in ("latest", "best", "final", "logs") or name.startswith("step-")
            if taken or not re.fullmatch(r"\w[\w.-]*", name):
                faults.append(
                    f"train.name_steps calls step {step} {name!r}; a name is letters, digits, '.', "
                    "'_' and '-', and none of latest, best, final, logs or step-..."
                )
        for name in ("z_loss", "balance_loss", "router_z_loss", "balance_bias_rate"):
            if (getattr(self, name) or 0.0) < 0:
                faults.append(f"train.{name} is {getattr(self, name)}; it must not be negative")
        if self.router_jitter is not None and not 0 <= self.router_jitter < 1:
            faults.append(f"train.router_jitter is {self.router_jitter}; choose 0 to below 1")
        if self.distill_weight is not None and not 0 < self.distill_weight <= 1:
            faults.append(f"train.distill_weight is {self.distill_weight}; it is above 0, up to 1")
        return faults


OURS = tuple(
    field.name
    for field in fields(TrainArgs)
    if field.name not in {stock.name for stock in fields(LitGPTTrainArgs)}
)
"""The names of the fields that LitGPT's own TrainArgs lacks."""


def asks_for_ours(train: LitGPTTrainArgs) -> bool:
    """Tell whether any option that only our loop knows is set."""
    return train.micro_batch_size == "auto" or any(
        getattr(train, name, None) is not None for name in OURS
    )


def masks_documents(train: TrainArgs) -> bool:
    """Tell whether documents in one row are kept from seeing each other."""
    return train.document_mask if train.document_mask is not None else bool(train.pack)


def raise_together(faults: list[str]) -> None:
    """Raise one `UserError` that holds all faults, if there are any."""
    if faults:
        raise UserError("; ".join(faults) + ".")
