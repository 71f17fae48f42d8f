"""What both ways of one pass over head and loss share: `head_plain.py` and `head_cpu.py`.

Letters in tensor names: N tokens, D hidden size, V vocabulary.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from phi_lit.train.distillation import TeacherHead

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden states, weight and bias; None where not wanted."""


class HeadPass(ABC):
    """One pass over the rows that sums the loss and makes the gradients.

    Args:
        hidden_ND: hidden states in the type of the matrix products.
        weight_VD: the head's weight, in the same type.
        bias_V: its bias or None, in the same type.
        rows: rows of logits whose gradients are held at a time.
        z_loss: coefficient of the mean squared logsumexp.
        wanted: which gradients to make: of hidden states, weight, bias.
        teacher: whose distribution is learned too, or None.
    """

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        *,
        rows: int,
        z_loss: float,
        wanted: tuple[bool, bool, bool],
        teacher: TeacherHead | None = None,
    ) -> None:
        self.hidden_ND, self.weight_VD, self.bias_V = hidden_ND, weight_VD, bias_V
        self.rows, self.z_loss = min(rows, max(1, hidden_ND.shape[0])), z_loss
        # Sums are never kept in a half-precision type: 2048 rows added in bf16 lose 8 bits.
        self.exact = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        self.wants_hidden, self.wants_weight, self.wants_bias = wanted
        self.wants_any = any(wanted)
        self.teacher, self.share = teacher, 1 - teacher.share if teacher else 1.0

    @abstractmethod
    def run(self, target_N: Tensor, counted_N: Tensor, scale: Tensor) -> tuple[Tensor, Gradients]:
        """Return the sums over rows (3,) of negative log-likelihood, z-loss and divergence from the
        teacher, and the gradients of the loss made of them, times `scale`.

        Args:
            target_N: ids, any valid one where a row is not counted.
            counted_N: which rows count.
            scale: what the gradients are multiplied by.
        """

    def _turn_into_gradient(self, p: Tensor, target: Tensor, lse: Tensor) -> None:
        """Make of probabilities (n, V), in place, the gradient of the logits but for a teacher."""
        if self.z_loss or self.share != 1:
            p.mul_((self.share + 2 * self.z_loss * lse).unsqueeze(1))
        p.scatter_add_(1, target, p.new_full((), -self.share).expand(target.shape))
