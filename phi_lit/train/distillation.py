"""What a teacher adds to the loss of some rows: knowledge distillation in its standard form.

A student learns from the teacher's whole distribution over the next token, not only from the token
that came: `(1 - share) * cross-entropy + share * T^2 * KL(teacher || student)`, both distributions
softened by the temperature T (Hinton et al., arXiv 1503.02531, section 2; the T^2 keeps the soft
gradients' size when T changes). Here are the arithmetic and the gradient for a few rows; `loss.py`
and `head_cpu.py` call it chunk by chunk, so neither's whole logits exist. The teacher as a model is
in `teacher.py`. Letters: N tokens, D hidden size of the teacher, V vocabulary, n some of the rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from extensions.phi_moe.gemm import product


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's last hidden states and its head: its logits, made for some rows at a time."""

    hidden_ND: Tensor
    """Hidden states; the logits themselves where `weight_VD` is None."""
    weight_VD: Tensor | None
    bias_V: Tensor | None
    share: float
    """Weight of the divergence, 0 to 1; the cross-entropy has the rest."""
    temperature: float = 1.0

    def logits(self, rows: slice) -> Tensor:
        """Return the teacher's logits (n, V), in the type of its weights."""
        if self.weight_VD is None:
            return self.hidden_ND[rows]
        return product(self.hidden_ND[rows], self.weight_VD, self.bias_V)

    def compare(
        self, student_nV: Tensor, teacher_nV: Tensor, *, want_gradient: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Hold a student's logits against the teacher's.

        Args:
            student_nV: the student's logits, in the type of the arithmetic; not changed.
            teacher_nV: the teacher's.
            want_gradient: whether to make the second result.

        Returns:
            KL(teacher || student) at the temperature, in nats per row (n,); and the gradient of
            `share * T^2 * KL` by the student's logits (n, V).
        """
        teacher_nV = teacher_nV.to(student_nV.dtype)
        if self.temperature != 1:
            student_nV = student_nV / self.temperature
            teacher_nV = teacher_nV / self.temperature
        log_q, log_p = torch.log_softmax(student_nV, 1), torch.log_softmax(teacher_nV, 1)
        p = log_p.exp()
        divergence = log_p.sub_(log_q).mul_(p).sum(1)
        if not want_gradient:
            return divergence, None
        return divergence, log_q.exp_().sub_(p).mul_(self.share * self.temperature)

    def mix(self, cross_entropy: Tensor, divergence: Tensor) -> Tensor:
        """Return the loss to minimise from the two means."""
        soft = self.share * self.temperature**2 * divergence
        return (1 - self.share) * cross_entropy + soft
