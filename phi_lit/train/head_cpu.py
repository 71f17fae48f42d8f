"""The chunked head and loss on a CPU: `head_plain.py`'s sums, arranged for caches and pages.

Two things decide there. A tensor of more than 32 MB is fresh pages from the kernel each time, whose
first touch costs as much as the matrix product that fills it: so one buffer of softmax gradients
is reused by all chunks, and everything else is made in tiles that the allocator keeps. And
passes over memory cost more than arithmetic: so softmax, loss and bias gradient are taken for a few
rows while these are in the caches. Letters: N tokens, D hidden size, V vocabulary, and G a group of
neighbouring vocabulary entries, into which the buffer is cut so that its parts stay contiguous.
"""

from typing import Any

import torch
from torch import Tensor

from extensions.phi_moe.gemm import product
from phi_lit.train.head import Gradients, HeadPass

_TILE_BYTES = 24 << 20  # below 32 MB, glibc's largest threshold for asking the kernel for pages
_CACHED_BYTES = 4 << 20
_GROUPS = 8


class CpuHead(HeadPass):
    """One pass over the rows on a CPU."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, *rest: Any, **options: Any) -> None:
        super().__init__(hidden_ND, weight_VD, *rest, **options)
        vocabulary = weight_VD.shape[0]
        self.few = max(1, _CACHED_BYTES // (4 * vocabulary))
        self.tile = max(self.few, _TILE_BYTES // (4 * vocabulary) // self.few * self.few)
        self.groups = _GROUPS if vocabulary % _GROUPS == 0 else 1
        self.hidden_grad_ND: Tensor | None = None
        self.bias_grad_V: Tensor | None = None
        self._weight_grads_DG: list[Tensor] = []

    def run(self, target_N: Tensor, counted_N: Tensor, scale: Tensor) -> tuple[Tensor, Gradients]:
        """Return the sums and the gradients: see `HeadPass.run`."""
        n_rows, vocabulary = self.hidden_ND.shape[0], self.weight_VD.shape[0]
        weight_N = counted_N.to(self.exact)
        if self.wants_hidden:
            self.hidden_grad_ND = torch.empty_like(self.hidden_ND, dtype=self.exact)
        if self.wants_bias:
            self.bias_grad_V = torch.zeros(vocabulary, dtype=self.exact)
        makes = self.wants_hidden or self.wants_weight
        buffer = self.hidden_ND.new_empty(
            (self.groups, self.rows, vocabulary // self.groups) if makes else (0, 0, 0)
        )
        sums = torch.zeros(3, dtype=self.exact)
        for start in range(0, n_rows, self.rows):
            rows = slice(start, min(start + self.rows, n_rows))
            self._losses(rows, target_N, weight_N, buffer, sums)
            if makes:
                self._products(rows, weight_N[rows, None], buffer[:, : rows.stop - start])
        del buffer  # before the weight's gradient is there twice
        scale = scale.to(self.exact)
        hidden_grad = None if self.hidden_grad_ND is None else self.hidden_grad_ND.mul_(scale)
        bias_grad = None if self.bias_grad_V is None else self.bias_grad_V.mul_(scale)
        return sums, (hidden_grad, self._weight_grad(scale), bias_grad)

    def _losses(
        self,
        rows: slice,
        target_N: Tensor,
        weight_N: Tensor,
        buffer: Tensor,
        sums: Tensor,
    ) -> None:
        """Add the losses of a chunk; fill `buffer` (groups, rows, G) with the logits' gradient."""
        for start in range(rows.start, rows.stop, self.tile):
            tile = slice(start, min(start + self.tile, rows.stop))
            place = slice(tile.start - rows.start, tile.stop - rows.start)
            self._tile(tile, target_N, weight_N, buffer[:, place], sums)

    def _tile(
        self,
        tile: slice,
        target_N: Tensor,
        weight_N: Tensor,
        buffer: Tensor,
        sums: Tensor,
    ) -> None:
        """Do the same for as many rows as the allocator gives memory for without new pages."""
        logits = product(self.hidden_ND[tile], self.weight_VD, self.bias_V)
        theirs = None if self.teacher is None else self.teacher.logits(tile)
        targets, weights = target_N[tile, None], weight_N[tile]
        for start in range(0, len(logits), self.few):
            few = slice(start, start + self.few)
            x = logits[few].to(self.exact)
            soft = None if theirs is None else self._soften(x, theirs[few], weights[few], sums)
            p = self._few(x, targets[few], weights[few], sums)
            if p is not None and soft is not None:
                p.add_(soft)
            if p is not None and buffer.numel():
                buffer[:, few].copy_(p.view(len(p), self.groups, -1).transpose(0, 1))

    def _soften(self, x: Tensor, theirs: Tensor, weight: Tensor, sums: Tensor) -> Tensor | None:
        """Add the divergence from the teacher; return its part of the logits' gradient."""
        assert self.teacher is not None
        divergence, soft = self.teacher.compare(x, theirs, want_gradient=self.wants_any)
        sums[2] += divergence.mul_(weight).sum()
        if soft is not None and self.bias_grad_V is not None:
            self.bias_grad_V.addmv_(soft.t(), weight)
        return soft

    def _few(self, x: Tensor, target: Tensor, weight: Tensor, sums: Tensor) -> Tensor | None:
        """Add the losses of a few rows; return the gradient of their logits, made in place."""
        target_logit = x.gather(1, target).squeeze(1)
        largest = x.amax(1, keepdim=True)
        p = torch.softmax(x, 1, out=x)
        # The largest probability is 1 / sum(exp(x - largest)), exact to the last bits.
        lse = (largest - p.amax(1, keepdim=True).log_()).squeeze(1)
        sums[0] += (lse - target_logit).mul_(weight).sum()
        if self.z_loss:
            sums[1] += (lse.square() * weight).sum() * self.z_loss
        if not self.wants_any:
            return None
        self._turn_into_gradient(p, target, lse)
        if self.bias_grad_V is not None:
            self.bias_grad_V.addmv_(p.t(), weight)
        return p

    def _products(self, rows: slice, weight: Tensor, logit_grad: Tensor) -> None:
        """Turn a chunk's gradient of the logits (groups, n, G) into that of hidden and weight."""
        hidden_Dn = (self.hidden_ND[rows] * weight.to(self.hidden_ND.dtype)).t().contiguous()
        hidden_grad = None if self.hidden_grad_ND is None else self.hidden_grad_ND[rows].zero_()
        group_size = logit_grad.shape[2]
        for number, grad_nG in enumerate(logit_grad):
            group = self.weight_VD[number * group_size : (number + 1) * group_size]
            if hidden_grad is not None:
                hidden_grad.add_(product(grad_nG, group.t()))
            if self.wants_weight:
                part_DG = product(hidden_Dn, grad_nG.t())
                if len(self._weight_grads_DG) <= number:
                    self._weight_grads_DG.append(part_DG.to(self.exact))
                else:
                    self._weight_grads_DG[number].add_(part_DG)
        if hidden_grad is not None:
            hidden_grad.mul_(weight)

    def _weight_grad(self, scale: Tensor) -> Tensor | None:
        """Return the weight's gradient (V, D), giving up the transposed parts one by one."""
        if not self.wants_weight:
            return None
        grad_VD = torch.zeros(self.weight_VD.shape, dtype=self.exact)
        for part_VD in grad_VD.view(self.groups, -1, grad_VD.shape[1]):
            if self._weight_grads_DG:
                torch.mul(self._weight_grads_DG.pop(0).t(), scale, out=part_VD)
        return grad_VD
