"""Dropout as in the paper: on attention weights and on what each branch adds to the residual.

LitGPT's blocks have none. It is put in from outside and for training only: no parameter, no key of
the state dict and no field of the config knows of it, so a checkpoint is the same with or without.
Masks depend on nothing but PyTorch's random state, which the training loop sets before every
micro-batch. Recipe: section 2.3 of the paper (0.1 and 0.1); phi's own code drops no embeddings.
"""

import math
from types import MethodType
from typing import Any

import torch
from litgpt.model import GPT, CausalSelfAttention, MultiheadLatentAttention, do_softcapping
from torch import Tensor, nn
from torch.nn import functional as F

from phi_lit.errors import UserError
from phi_lit.train.attention import dropout_attention


def apply_dropout(gpt: GPT, *, attention: float = 0.0, residual: float = 0.0) -> None:
    """Add dropout to every block of `gpt`, in place.

    Active in training mode only; in evaluation and generation each block runs the code it had.
    Call it before activation checkpointing, compilation and sharding.

    Args:
        gpt: LitGPT's model, of any architecture it knows.
        attention: share of the attention weights that is dropped.
        residual: share of the attention's, the MLP's and (where they follow it) the experts'
            outputs that is dropped before each is added to the residual stream.

    Raises:
        UserError: a share outside of [0, 1).
    """
    faults = [
        f"{name} dropout is {share}"
        for name, share in (("attention", attention), ("residual", residual))
        if not 0 <= share < 1
    ]
    if faults:
        raise UserError(f"{' and '.join(faults)}; it must be at least 0 and below 1 (phi-1: 0.1)")
    for block in gpt.transformer.h:
        if attention:
            _drop_attention_weights(block.attn, attention)
        if residual:
            for branch_end in ("post_attention_norm", "post_mlp_norm", "post_moe_norm"):
                if hasattr(block, branch_end):
                    _drop_output(block, branch_end, residual)


def _drop_output(block: nn.Module, branch_end: str, share: float) -> None:
    """Drop from what a branch adds to the residual; `branch_end` is the branch's last module.

    In phi and LLaMA it is an `nn.Identity`, whose place the dropout takes. A norm there keeps its
    place (and its names in the state dict) and is followed by the dropout.
    """
    last = getattr(block, branch_end)
    if isinstance(last, (nn.Identity, nn.Dropout)):
        setattr(block, branch_end, nn.Dropout(share).train(last.training))
        return
    last.residual_dropout = share
    last.forward = MethodType(_forward_then_drop, last)


def _forward_then_drop(self: Any, *args: Tensor, **kwargs: Any) -> Tensor:
    return F.dropout(
        type(self).forward(self, *args, **kwargs), self.residual_dropout, self.training
    )


def _drop_attention_weights(attn: nn.Module, share: float) -> None:
    if not isinstance(attn, (CausalSelfAttention, MultiheadLatentAttention)):
        raise UserError(
            f"attention dropout does not know {type(attn).__name__}; set the attention dropout to 0"
        )
    attn.attention_dropout = share
    attn.scaled_dot_product_attention = MethodType(_attention_with_dropout, attn)


def _attention_with_dropout(
    self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Take the place of `CausalSelfAttention.scaled_dot_product_attention`; same layout."""
    share = self.attention_dropout
    if not self.training or not share:
        return type(self).scaled_dot_product_attention(self, q, k, v, mask)
    scale = 1.0 / math.sqrt(self.config.attention_scores_scalar or _score_size(self))
    scale = scale * self.mscale * self.mscale
    if self.config.attention_logit_softcapping is not None:
        y = _softcapped(q, k, v, mask, scale, self.config.attention_logit_softcapping, share)
    elif mask is None and q.device.type == "cpu":
        # The seed comes from the random state, so whoever restores that gets the same mask.
        seed = torch.randint(2**62, (1,), dtype=torch.int64)
        y = dropout_attention(q, k, v, seed, share, scale)
    else:
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=share, scale=scale, is_causal=mask is None
        )
    return y.transpose(1, 2)


def _score_size(attn: nn.Module) -> int:
    """Return the size of a query, whose root divides the scores."""
    if isinstance(attn, MultiheadLatentAttention):
        return attn.config.qk_head_dim
    return attn.config.head_size


def _softcapped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    cap: float,
    share: float,
) -> Tensor:
    """Attend with soft-capped scores (Gemma 2), which no fused kernel knows."""
    scores = do_softcapping(q @ k.mT * scale, cap)
    if mask is None:
        size = q.size(2)
        mask = torch.full((size, size), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device)
        mask = mask.triu_(diagonal=1)
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float).to(q.dtype)
    return F.dropout(weights, share) @ v
