"""LitGPT's own model with the loss attached: tokens and targets in, one number out.

The head's matrix product belongs to the loss (see `loss.py`), so here LitGPT's forward runs with
its head stepping aside. Parameters, their names and the model's own use for generation are
untouched. Also here: compiling it block by block.
"""

from typing import Any

from litgpt.model import GPT
from torch import Tensor, nn

from phi_lit.train.documents import forward_within_documents
from phi_lit.train.loss import Backend, HeadLoss, linear_cross_entropy, plain_loss


class SteppingAsideHead(nn.Linear):
    """An `nn.Linear` that hands its input through while `aside` is set."""

    aside = False

    def forward(self, input: Tensor) -> Tensor:
        """Return logits, or the hidden states themselves while `aside`."""
        return input if self.aside else super().forward(input)


class LossModel(nn.Module):
    """A GPT and its training loss.

    Args:
        gpt: LitGPT's model. Its head changes class (`SteppingAsideHead`), nothing else changes.
        z_loss: coefficient of the mean squared logsumexp.
        ignore_index: targets that count for nothing.
        chunk: rows of logits held at a time; None chooses.
        backend: see `linear_cross_entropy`.

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
    ) -> None:
        super().__init__()
        self.gpt = gpt
        self.z_loss, self.ignore_index = z_loss, ignore_index
        self.chunk, self.backend = chunk, backend
        self.figures: HeadLoss | None = None
        """The last forward's figures, detached."""
        if type(gpt.lm_head) is nn.Linear and gpt.config.final_logit_softcapping is None:
            gpt.lm_head.__class__ = SteppingAsideHead

    @property
    def fused(self) -> bool:
        """Whether the whole logits are never made."""
        return isinstance(self.gpt.lm_head, SteppingAsideHead)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor,
        denominator: Tensor | float | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of predicting `targets` (B, T) from `idx` (B, T), both int64 ids.

        In evaluation it is the cross-entropy alone, without the z-loss.

        `denominator` replaces the number of counted targets; see `linear_cross_entropy`. With
        `documents` (B, T) of int32 a token sees its own document only (`documents.py`). Details
        of the loss are left in `figures`.
        """
        options: Any = dict(
            ignore_index=self.ignore_index, z_loss=self.z_loss, denominator=denominator
        )
        if self.fused:
            head = self.gpt.lm_head
            hidden = self._hidden(idx, documents).flatten(0, 1)
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
            logits = run_model(self.gpt, idx, documents)
            result = plain_loss(logits.flatten(0, 1), targets.reshape(-1), **options)
        self.figures = HeadLoss(*(figure.detach() for figure in result))
        return result.loss if self.training else result.cross_entropy

    def _hidden(self, idx: Tensor, documents: Tensor | None) -> Tensor:
        """Run the model up to and without its head: (B, T, D)."""
        self.gpt.lm_head.aside = True
        try:
            return run_model(self.gpt, idx, documents)
        finally:
            self.gpt.lm_head.aside = False


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
