"""Attention within documents: what shares a row does not see each other.

A row holds several documents: packed examples, or texts with `<|endoftext|>` between them. With a
document mask a token sees only what stands before it in its own document, and positions begin anew
there, so that the loss of a row is that of its documents alone. The mask goes to LitGPT's blocks as
the argument that they have for one; nothing is set on a module between forward and backward, so
recomputation, compilation and sharding see an ordinary input.

On a GPU the work is done by flash-attn's kernel for rows of several lengths, where it is installed,
else by FlexAttention; on a CPU documents are attended one by one, which is faster than a whole row.
Letters in tensor names: B rows, T positions, H heads, D head size.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from types import MethodType
from typing import Any, Literal, NamedTuple

import litgpt.lora
import torch
from litgpt.model import GPT, CausalSelfAttention, MultiheadLatentAttention, do_softcapping
from torch import Tensor
from torch.nn import functional as F

from phi_lit.errors import UserError
from phi_lit.train.segments import segment_attention

Kernel = Literal["segments", "flash", "flex", "mask"]
"""Who attends: documents one by one (CPU), flash-attn, FlexAttention, or PyTorch's own attention
with a whole T x T mask (what the others cannot do, such as soft-capped scores)."""


class DocumentMask(NamedTuple):
    """Which positions see each other, as the kernel wants it; made once per forward pass."""

    kernel: Kernel
    documents_BT: Tensor
    """int32: the document that a position belongs to; those of one document lie side by side."""
    starts: Tensor | None = None
    """flash: where documents begin among all B x T positions, and their end (int32)."""
    blocks: Any = None
    """flex: its BlockMask."""


def apply_document_mask(gpt: GPT) -> None:
    """Let the attention of `gpt` take a `DocumentMask`, in place; without one it is as before.

    Order: dropout first, then this, then activation checkpointing, compilation and sharding.

    Raises:
        UserError: the model attends in a way that a document mask does not know.
    """
    if type(gpt) not in (GPT, litgpt.lora.GPT):
        raise UserError(f"a document mask does not know models of the kind {type(gpt).__name__}")
    for block in gpt.transformer.h:
        attn = block.attn
        if not isinstance(attn, (CausalSelfAttention, MultiheadLatentAttention)):
            raise UserError(f"a document mask does not know {type(attn).__name__}")
        if getattr(attn, "apply_sliding_window_attention", False):
            raise UserError(
                f"{gpt.config.name} attends within sliding windows, which a document mask does not "
                "know; leave out train.document_mask and train.pack"
            )
        if not hasattr(attn, "attend_whole_rows"):
            attn.attend_whole_rows = attn.scaled_dot_product_attention
            attn.scaled_dot_product_attention = MethodType(_attend, attn)


def forward_within_documents(
    gpt: GPT, idx: Tensor, documents_BT: Tensor, kernel: Kernel | None = None
) -> Tensor:
    """Do what `gpt(idx)` does, every document by itself, from position 0 on.

    Args:
        gpt: a model that `apply_document_mask` has prepared.
        idx: ids (B, T).
        documents_BT: int32, rising along each row.
        kernel: who attends; None chooses.

    Scores depend on the difference of two rotary positions only, so beginning anew changes no
    result but rounding; it keeps a document's positions those it would have alone.
    """
    mask = make_mask(gpt, documents_BT, kernel or choose_kernel(gpt, idx.device.type))
    positions = restarted_positions(documents_BT)
    cos, sin = gpt.cos[positions], gpt.sin[positions]
    x = gpt.transformer.wte(idx)
    if gpt.config.scale_embeddings:
        x = x * torch.tensor(gpt.config.n_embd**0.5, dtype=x.dtype)
    for number, block in enumerate(gpt.transformer.h):
        if gpt.config.rope_indices is None:
            x = block(x, cos, sin, mask)
        else:
            which = gpt.config.rope_indices[number]
            x = block(x, cos[..., which], sin[..., which], mask)
    logits = gpt.lm_head(gpt.transformer.ln_f(x))
    if gpt.config.final_logit_softcapping is not None:
        logits = do_softcapping(logits, gpt.config.final_logit_softcapping)
    return logits


def restarted_positions(documents_BT: Tensor) -> Tensor:
    """Return each position counted from where its document begins (B, T), int64."""
    here = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    return here - torch.where(_begins(documents_BT), here, 0).cummax(dim=1).values


def make_mask(gpt: GPT, documents_BT: Tensor, kernel: Kernel) -> DocumentMask:
    """Return the mask in the form that a kernel takes."""
    if kernel == "flash":
        begins = _begins(documents_BT).flatten().nonzero().squeeze(1)
        starts = F.pad(begins, (0, 1), value=documents_BT.numel()).int()
        return DocumentMask(kernel, documents_BT, starts)
    if kernel == "flex":
        return DocumentMask(kernel, documents_BT, blocks=_block_mask(documents_BT))
    return DocumentMask(kernel, documents_BT)


def choose_kernel(gpt: GPT, device_type: str) -> Kernel:
    """Return the fastest kernel that can do what a model's attention asks."""
    config = gpt.config
    if config.attention_logit_softcapping is not None or config.latent_attention:
        return "mask"
    if device_type == "cpu":
        return "segments"
    if device_type != "cuda":
        return "mask"
    half = gpt.transformer.h[0].attn.qkv.weight.dtype in (torch.float16, torch.bfloat16)
    if (half or torch.is_autocast_enabled("cuda")) and has_flash():
        return "flash"
    drops = gpt.training and getattr(gpt.transformer.h[0].attn, "attention_dropout", 0)
    return "mask" if drops else "flex"  # FlexAttention has no dropout


@cache
def has_flash() -> bool:
    """Tell whether flash-attn is installed."""
    return find_spec("flash_attn") is not None


def _begins(documents_BT: Tensor) -> Tensor:
    """Tell which positions are the first of their document (B, T)."""
    first = torch.ones_like(documents_BT[:, :1], dtype=torch.bool)
    return torch.cat([first, documents_BT[:, 1:] != documents_BT[:, :-1]], dim=1)


def _attend(
    self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | DocumentMask | None = None
) -> Tensor:
    """Take the place of `CausalSelfAttention.scaled_dot_product_attention`; same layout."""
    if not isinstance(mask, DocumentMask):
        return self.attend_whole_rows(q, k, v, mask)
    if mask.kernel == "mask":
        return self.attend_whole_rows(q, k, v, _whole_mask(mask.documents_BT, q.dtype))
    dropout = getattr(self, "attention_dropout", 0.0) if self.training else 0.0
    scale = 1.0 / math.sqrt(self.config.attention_scores_scalar or self.config.head_size)
    scale = scale * self.mscale * self.mscale
    if mask.kernel == "flash":
        assert mask.starts is not None
        return _flash(q, k, v, mask.starts, dropout, scale)
    if mask.kernel == "flex":
        y = _flex_attention(q.device.type)(q, k, v, block_mask=mask.blocks, scale=scale)
    else:
        # The seed comes from the random state, so whoever restores that drops the same weights.
        seed = torch.randint(2**62, (1,)) if dropout else torch.zeros(1, dtype=torch.int64)
        y, _ = segment_attention(q, k, v, mask.documents_BT, seed, dropout, scale)
    return y.transpose(1, 2)


def _whole_mask(documents_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what to add to the scores (B, 1, T, T): 0 where a position is seen, else -inf."""
    seen = (documents_BT[:, :, None] == documents_BT[:, None, :]).tril()
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -math.inf).unsqueeze(1)


def _flash(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, dropout: float, scale: float) -> Tensor:
    """Attend with flash-attn, all rows of the batch as one; returns (B, T, H, D)."""
    from flash_attn import flash_attn_varlen_func

    rows, length = q.shape[0], q.shape[2]
    y = flash_attn_varlen_func(
        *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)),
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=length,  # a bound: the longest document would have to be fetched from the GPU
        max_seqlen_k=length,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
    )
    return y.unflatten(0, (rows, length))


@cache
def _flex_attention(device_type: str) -> Callable[..., Tensor]:
    """Return FlexAttention, compiled where it would be slow otherwise."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


def _block_mask(documents_BT: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents_BT[b, query] == documents_BT[b, key])

    rows, length = documents_BT.shape
    make = torch.compile(create_block_mask) if documents_BT.is_cuda else create_block_mask
    return make(seen, rows, None, length, length, device=documents_BT.device)
