"""The chunked head and loss for any device, plainly: for GPUs, and to hold `head_cpu.py` against.

Letters in tensor names: N tokens, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from phi_lit.train.head import Gradients, HeadPass

_ADDMM_TAKES_OUT_DTYPE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


class PlainHead(HeadPass):
    """One pass over the rows for any device, chunk by chunk."""

    def run(self, target_N: Tensor, counted_N: Tensor, scale: Tensor) -> tuple[Tensor, Gradients]:
        """Return the sums and the gradients: see `HeadPass.run`."""
        scale = scale.to(self.exact)
        sums = self.hidden_ND.new_zeros(3, dtype=self.exact)
        hidden_grad, weight_grad, bias_grad = (
            torch.zeros_like(x, dtype=self.exact) if x is not None and wants else None
            for x, wants in (
                (self.hidden_ND, self.wants_hidden),
                (self.weight_VD, self.wants_weight),
                (self.bias_V, self.wants_bias),
            )
        )
        for start in range(0, self.hidden_ND.shape[0], self.rows):
            rows = slice(start, start + self.rows)
            weight = counted_N[rows].to(self.exact)
            logits = self._logits(self.hidden_ND[rows])
            p = self._losses(rows, logits, target_N[rows, None], weight, sums)
            if p is None:
                continue
            if bias_grad is not None:
                bias_grad.addmv_(p.t(), weight)
            # The products run in their own type: [-1, 1] fits it, and the scale comes after.
            logit_grad = logits.copy_(p)
            del p
            if hidden_grad is not None:
                hidden_grad[rows] = (logit_grad @ self.weight_VD).to(self.exact)
                hidden_grad[rows] *= (weight * scale).unsqueeze(1)
            if weight_grad is not None:
                hidden = self.hidden_ND[rows] * weight.to(self.hidden_ND.dtype).unsqueeze(1)
                _add_product(weight_grad, logit_grad.t(), hidden)
        for grad in (weight_grad, bias_grad):
            if grad is not None:
                grad.mul_(scale)
        return sums, (hidden_grad, weight_grad, bias_grad)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.bias_V is None:
            return torch.mm(hidden, self.weight_VD.t())
        return torch.addmm(self.bias_V, hidden, self.weight_VD.t())

    def _losses(
        self, rows: slice, logits: Tensor, target: Tensor, weight: Tensor, sums: Tensor
    ) -> Tensor | None:
        """Add the losses of a chunk; return the gradient of its logits, if one is wanted."""
        x = logits.to(self.exact)
        soft = None
        if self.teacher is not None:
            theirs = self.teacher.logits(rows)
            divergence, soft = self.teacher.compare(x, theirs, want_gradient=self.wants_any)
            sums[2] += (divergence * weight).sum()
        log_p = torch.log_softmax(x, 1)
        negative = -log_p.gather(1, target).squeeze(1)
        lse = x.gather(1, target).squeeze(1) + negative
        sums[0] += (negative * weight).sum()
        if self.z_loss:
            sums[1] += (lse.square() * weight).sum() * self.z_loss
        if not self.wants_any:
            return None
        p = log_p.exp_()
        self._turn_into_gradient(p, target, lse)
        return p if soft is None else p.add_(soft)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a @ b` to a float32 (or float64) total, whatever the type of `a` and `b`."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda" and _ADDMM_TAKES_OUT_DTYPE:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)
