"""Causal attention document by document on a CPU, as one operation.

A row of documents that do not see each other costs what its documents cost: the squares of their
lengths, not of the row's. Where there is dropout the strips of `attention.py` do each document,
else PyTorch's flash kernel. Being one operation, it neither breaks a compiled graph nor lets
autograd build a whole row of zeros for every slice.
Letters in tensor names: B rows, T positions, H heads, D head size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from phi_lit.train.attention import dropout_attention, dropout_attention_backward

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Part = tuple[slice, slice, slice]
"""One document in a tensor (B, H, T, ...)."""


@torch.library.custom_op("phi_lit::segment_attention", mutates_args=())
def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, seed: Tensor, dropout: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend causally within each document, dropping weights with probability `dropout`.

    Args:
        q: queries (B, H, T, D).
        k: keys, of the same shape.
        v: values, of the same shape.
        documents: int32 (B, T); equal numbers side by side are one document.
        seed: one int64 that decides what is dropped.
        dropout: in [0, 1).
        scale: factor of the scores, usually 1 / sqrt(D).

    Returns:
        The output (B, H, T, D), the heads of one token side by side in memory; and, without
        dropout, the logarithm of each softmax's denominator (B, H, T), which backward needs.
    """
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)
    lse = _new_lse(q)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for number, part in enumerate(segments(documents)):
            inputs = [x[part] for x in (q, k, v)]
            if dropout:
                out[part] = dropout_attention(*inputs, seed + number, dropout, scale)
            else:
                out[part], lse[part] = _flash(*inputs, 0.0, True, scale=scale)
    return out, lse


@segment_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, seed: Tensor, dropout: float, scale: float
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3])).transpose(1, 2)
    return out, _new_lse(q)


@torch.library.custom_op("phi_lit::segment_attention_backward", mutates_args=())
def segment_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor,
    seed: Tensor,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; the arguments are those of `segment_attention`."""
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for number, part in enumerate(segments(documents)):
            inputs = [x[part] for x in (grad, q, k, v, out)]
            if dropout:
                found = dropout_attention_backward(*inputs, seed + number, dropout, scale)
            else:
                found = _flash_backward(*inputs, lse[part], 0.0, True, scale=scale)
            for whole, piece in zip(grads, found, strict=True):
                whole[part] = piece
    return grads


@segment_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Tensor,
    seed: Tensor,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents, seed, ctx.dropout, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, documents, seed)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = segment_attention_backward(grad, *ctx.saved_tensors, ctx.dropout, ctx.scale)
    return (*grads, None, None, None, None)


segment_attention.register_autograd(_backward, setup_context=_save)


def segments(documents: Tensor) -> Iterator[Part]:
    """Yield where every document of (B, T) lies in a tensor (B, H, T, ...), row by row."""
    for number, row in enumerate(documents):
        _, lengths = torch.unique_consecutive(row, return_counts=True)
        start = 0
        for length in lengths.tolist():
            yield slice(number, number + 1), slice(None), slice(start, start + length)
            start += length


def _new_lse(q: Tensor) -> Tensor:
    """Return room for (B, H, T) logarithms, in the type that the kernel gives."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_zeros(q.shape[:3], dtype=dtype)
