"""Causal attention with dropout on a CPU, at little more than the cost of attention without it.

PyTorch's CPU kernel takes no dropout: asked for it, `scaled_dot_product_attention` falls back to
whole T x T matrices and is 5 to 10 times slower. Here the scores exist for a strip of rows at a
time, nothing right of the diagonal is computed, and backward makes scores and mask again from the
seed rather than keeping them. On a GPU the fused kernels drop by themselves and this is not used.
Letters in tensor names: S sequences (batch x heads), T tokens, D head size.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 128
"""Rows of one strip: enough for matrix products at full speed, few enough to skip the triangle."""

_CACHED_BYTES = 4 << 20  # scores handled together: what stays in the caches between the passes


@torch.library.custom_op("phi_lit::dropout_attention", mutates_args=())
def dropout_attention(
    q: Tensor, k: Tensor, v: Tensor, seed: Tensor, dropout: float, scale: float
) -> Tensor:
    """Attend causally, dropping each attention weight with probability `dropout`.

    Args:
        q: queries (B, H, T, D).
        k: keys (B, H, T, D): as many heads as `q`.
        v: values (B, H, T, Dv).
        seed: one int64 that decides the mask, so that repeating the call repeats the mask.
        dropout: in [0, 1).
        scale: factor of the scores, usually 1 / sqrt(D).

    The probability is exact: weights are kept where a random byte reaches the threshold of its
    row, which is the whole number below or above 256 x dropout, drawn per row so that its mean is
    256 x dropout. Kept weights are divided by 1 - dropout. Everything is computed in float32
    (float64 for float64 input) whatever the type of the tensors.

    Returns:
        (B, H, T, Dv) in q's type; the heads of one token lie side by side in memory.
    """
    q_STD, k_STD, v_STD = _exact(q), _exact(k), _exact(v)
    out = v.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), dtype=q.dtype)
    out_STD = v_STD.new_empty(v_STD.shape)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for strip in _strips(q_STD, seed, dropout):
            p = strip.probabilities(q_STD, k_STD, scale)
            if dropout:
                p.mul_(strip.kept())
            here = out_STD[strip.sequences, strip.rows]
            torch.bmm(p, v_STD[strip.sequences, : strip.end], out=here)
        out_STD.mul_(1 / (1 - dropout))
    out.copy_(out_STD.view(*q.shape[:3], -1).transpose(1, 2))
    return out.transpose(1, 2)


@dropout_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, seed: Tensor, dropout: float, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


@torch.library.custom_op("phi_lit::dropout_attention_backward", mutates_args=())
def dropout_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    seed: Tensor,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; the arguments are those of `dropout_attention`."""
    q_STD, k_STD, v_STD, grad_STD = _exact(q), _exact(k), _exact(v), _exact(grad)
    # Contiguous, as a compiler is told: `zeros_like` of a single sequence's view would not be.
    q_grad, k_grad, v_grad = (x.new_zeros(x.shape) for x in (q_STD, k_STD, v_STD))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        # sum_j p_ij dp_ij, which softmax's backward subtracts, is the product of output and grad.
        inner_ST1 = (grad_STD * _exact(out)).sum(-1, keepdim=True)
        grad_STD = grad_STD * (1 / (1 - dropout))
        for strip in _strips(q_STD, seed, dropout):
            here, before = (strip.sequences, strip.rows), (strip.sequences, slice(strip.end))
            p = strip.probabilities(q_STD, k_STD, scale)
            dp = strip.other_buffer(p)
            if dropout:
                kept = strip.kept()
                v_grad[before].baddbmm_(torch.mul(p, kept, out=dp).mT, grad_STD[here])
                torch.bmm(grad_STD[here], v_STD[before].mT, out=dp)
                dp.mul_(kept)
            else:
                v_grad[before].baddbmm_(p.mT, grad_STD[here])
                torch.bmm(grad_STD[here], v_STD[before].mT, out=dp)
            ds = dp.sub_(inner_ST1[here]).mul_(p)
            torch.bmm(ds, k_STD[before], out=q_grad[here])
            k_grad[before].baddbmm_(ds.mT, q_STD[here])
        q_grad.mul_(scale)
        k_grad.mul_(scale)
    return (
        q_grad.view(q.shape).to(q.dtype),
        k_grad.view(k.shape).to(k.dtype),
        v_grad.view(v.shape).to(v.dtype),
    )


@dropout_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    seed: Tensor,
    dropout: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    q, k, v, seed, dropout, scale = inputs
    ctx.save_for_backward(q, k, v, output, seed)
    ctx.dropout, ctx.scale = dropout, scale


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
    q, k, v, out, seed = ctx.saved_tensors
    grads = dropout_attention_backward(grad, q, k, v, out, seed, ctx.dropout, ctx.scale)
    return (*grads, None, None, None)


dropout_attention.register_autograd(_backward, setup_context=_save)


def _exact(x_BHTD: Tensor) -> Tensor:
    """Return (B, H, T, D) as (S, T, D) in the type that everything is computed in."""
    dtype = torch.float64 if x_BHTD.dtype == torch.float64 else torch.float32
    return x_BHTD.to(dtype).reshape(-1, *x_BHTD.shape[2:])


def keep_mask(n_sequences: int, n_tokens: int, seed: Tensor, dropout: float) -> Tensor:
    """Return the whole mask (S, T, T), true where a weight is kept: to look at, and for tests."""
    shape = torch.empty((n_sequences, n_tokens, 1))
    mask = torch.zeros((n_sequences, n_tokens, n_tokens), dtype=torch.bool)
    for strip in _strips(shape, seed, dropout):
        mask[strip.sequences, strip.rows, : strip.end] = strip.kept().bool()
    return mask


class _Strip:
    """Some rows of some sequences: rows `rows` of the scores, columns up to `end`."""

    def __init__(
        self, sequences: slice, rows: slice, buffers: list[Tensor], drops: "_Drops", n: int
    ) -> None:
        self.sequences, self.rows, self.end = sequences, rows, rows.stop
        self._shape = (n, rows.stop - rows.start, rows.stop)
        self._buffers, self._drops = buffers, drops

    def _view(self, buffer: Tensor) -> Tensor:
        n, rows, end = self._shape
        return buffer[: n * rows * end].view(self._shape)

    def probabilities(self, q_STD: Tensor, k_STD: Tensor, scale: float) -> Tensor:
        """Return softmax of the causal scores, in a buffer that the next strip reuses."""
        p = self._view(self._buffers[0])
        torch.bmm(q_STD[self.sequences, self.rows], k_STD[self.sequences, : self.end].mT, out=p)
        p.mul_(scale)
        rows = self._shape[1]
        p[:, :, self.rows.start :] += torch.full((rows, rows), -torch.inf, dtype=p.dtype).triu_(1)
        return torch.softmax(p, -1, out=p)

    def kept(self) -> Tensor:
        """Return the strip's mask as 0 and 1; call it once per strip, in the order of strips."""
        mask = self._view(self._buffers[1])
        return self._drops.fill(mask)

    def other_buffer(self, like: Tensor) -> Tensor:
        """Return a second buffer of the strip's shape."""
        return self._view(self._buffers[2])


class _Drops:
    """The stream of random bytes behind the masks: a pure function of the seed."""

    def __init__(self, seed: Tensor, dropout: float) -> None:
        self._generator = torch.Generator().manual_seed(int(seed))
        self._threshold = 256 * dropout

    def fill(self, mask: Tensor) -> Tensor:
        """Fill `mask` (..., rows, columns) with ones where kept and zeros where dropped."""
        words = torch.empty(-(-mask.numel() // 8), dtype=torch.int64)
        words.random_(torch.iinfo(torch.int64).min, None, generator=self._generator)
        mask.view(-1).copy_(words.view(torch.uint8)[: mask.numel()])
        threshold = torch.rand((*mask.shape[:-1], 1), generator=self._generator)
        return mask.ge_(threshold.add_(self._threshold).floor_())


def _strips(q_STD: Tensor, seed: Tensor, dropout: float) -> Iterator[_Strip]:
    """Cut (S, T) into strips, a few sequences and `ROWS` rows each."""
    n_sequences, n_tokens, _ = q_STD.shape
    rows = min(ROWS, n_tokens)
    together = min(n_sequences, max(1, _CACHED_BYTES // (4 * rows * n_tokens)))
    drops = _Drops(seed, dropout)
    buffers = [q_STD.new_empty(together * rows * n_tokens) for _ in range(3)]
    for first in range(0, n_sequences, together):
        sequences = slice(first, min(first + together, n_sequences))
        for start in range(0, n_tokens, rows):
            here = slice(start, min(start + rows, n_tokens))
            yield _Strip(sequences, here, buffers, drops, sequences.stop - first)
