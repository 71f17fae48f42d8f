"""LitGPT's own model with the loss attached: tokens and targets in, one number out.

The head's matrix product belongs to the loss (see `loss.py`), so here LitGPT's forward runs with
its head stepping aside. Parameters, their names and the model's own use for generation are
untouched. Also here: compiling it block by block.
"""

from typing import TYPE_CHECKING, Any

from litgpt.model import GPT
from torch import Tensor, nn

from phi_lit.train.documents import forward_within_documents
from phi_lit.train.loss import Backend, HeadLoss, linear_cross_entropy, plain_loss

if TYPE_CHECKING:
    from phi_lit.train.teacher import Teacher


class SteppingAsideHead(nn.Linear):
    """An `nn.Linear` that hands its input through while `aside` is set."""

    aside = False

    def forward(self, input: Tensor) -> Tensor:
        """Return logits, or the hidden states themselves while `aside`."""
        return input if self.aside else super().forward(input)


def plain_head(gpt: GPT) -> nn.Linear | None:
    """Return the one linear layer that makes the logits, or None where more is done to them.

    A LoRA model that leaves its head alone has one, inside of LitGPT's wrapper.
    """
    head = gpt.lm_head
    if getattr(head, "r", None) == 0:
        head = head.linear
    plain = type(head) in (nn.Linear, SteppingAsideHead)
    return head if plain and gpt.config.final_logit_softcapping is None else None


def let_head_step_aside(gpt: GPT) -> None:
    """Change the class of a plain head to `SteppingAsideHead`, nothing else."""
    if (head := plain_head(gpt)) is not None:
        head.__class__ = SteppingAsideHead


def hidden_states(gpt: GPT, idx: Tensor, documents: Tensor | None = None) -> Tensor:
    """Run a model whose head steps aside up to its head: (B, T, D); one whose head cannot, to its
    logits. `documents` is as in `LossModel.forward`."""
    head = plain_head(gpt)
    if not isinstance(head, SteppingAsideHead):
        return run_model(gpt, idx, documents)
    head.aside = True
    try:
        return run_model(gpt, idx, documents)
    finally:
        head.aside = False


class LossModel(nn.Module):
    """A GPT and its training loss.

    Args:
        gpt: LitGPT's model. Its head changes class (`SteppingAsideHead`), nothing else changes.
        z_loss: coefficient of the mean squared logsumexp.
        ignore_index: targets that count for nothing.
        chunk: rows of logits held at a time; None chooses.
        backend: see `linear_cross_entropy`.
        teacher: whose distribution is learned too, in training. It is no part of this module.

    Heads that are not one plain linear layer (LoRA, quantized, soft-capped logits) take the plain
    path through whole logits.
    """

    def __init__(
        self,
        gpt: GPT,
        *,
        z_loss: float = 0.0,
        ignore_index: int = -100,
        chunk: int | None = None,
        backend: Backend = "auto",
        teacher: "Teacher | None" = None,
    ) -> None:
        super().__init__()
        self.gpt = gpt
        self.z_loss, self.ignore_index = z_loss, ignore_index
        self.chunk, self.backend = chunk, backend
        self.teacher = teacher
        self.figures: HeadLoss | None = None
        """The last forward's figures, detached."""
        self.summed: dict[str, Tensor] = {}
        """With a teacher: what a step's loss is made of, added up over its micro-batches."""
        let_head_step_aside(gpt)

    @property
    def fused(self) -> bool:
        """Whether the whole logits are never made."""
        return isinstance(plain_head(self.gpt), SteppingAsideHead)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor,
        denominator: Tensor | float | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of predicting `targets` (B, T) from `idx` (B, T), both int64 ids.

        In evaluation it is the cross-entropy alone, without z-loss and teacher.

        `denominator` replaces the number of counted targets; see `linear_cross_entropy`. With
        `documents` (B, T) of int32 a token sees its own document only (`documents.py`). Details
        of the loss are left in `figures`.
        """
        teacher = self.teacher.look_at(idx, documents) if self.teacher and self.training else None
        options: Any = dict(
            ignore_index=self.ignore_index,
            z_loss=self.z_loss,
            denominator=denominator,
            teacher=teacher,
        )
        hidden = hidden_states(self.gpt, idx, documents).flatten(0, 1)
        head = plain_head(self.gpt)
        if head is not None:
            result = linear_cross_entropy(
                hidden,
                head.weight,
                head.bias,
                targets.reshape(-1),
                chunk=self.chunk,
                backend=self.backend,
                **options,
            )
        else:
            result = plain_loss(hidden, targets.reshape(-1), **options)
        self.figures = HeadLoss(*(figure.detach() for figure in result))
        if teacher is not None:
            self._add_up(result)
        return result.loss if self.training else result.cross_entropy

    def _add_up(self, result: HeadLoss) -> None:
        for name in ("cross_entropy", "divergence"):
            figure = getattr(result, name).detach().float()
            self.summed[name] = self.summed.get(name, 0) + figure


def run_model(gpt: GPT, idx: Tensor, documents: Tensor | None) -> Tensor:
    """Call a model on whole rows, or on each document in them by itself."""
    return gpt(idx) if documents is None else forward_within_documents(gpt, idx, documents)


def compile_blocks(gpt: GPT, **options: Any) -> None:
    """Compile every block of `gpt` by itself, in place.

    Blocks of one kind share their compiled code, so the start takes the time of one block at any
    depth, and names in the state dict stay as they are. Call it after dropout and activation
    checkpointing were applied and before `fully_shard`.

    Args:
        gpt: LitGPT's model.
        options: passed on to `torch.compile`.
    """
    for block in gpt.transformer.h:
        block.compile(**options)
