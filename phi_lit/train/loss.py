"""Head and cross-entropy as one operation that never holds the whole logits.

At a vocabulary of 51,200 the logits are the largest tensor of a training step by far: 4096 tokens
take 839 MB in float32, twice that with their gradient. Here they exist for a chunk of rows at a
time, and the gradients of hidden states, weight and bias are made while the chunk is there, in the
forward pass. Letters in tensor names: N tokens, D hidden size, V vocabulary.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from phi_lit.train import liger
from phi_lit.train.distillation import TeacherHead
from phi_lit.train.head_cpu import CpuHead
from phi_lit.train.head_plain import PlainHead

Backend = Literal["auto", "torch", "liger"]

CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Room for the logits of one chunk, counted in float32. On a CPU 256 rows of 51,200 logits keep the
matrix products at full speed (512 took as long and 53 MB more of a step's 632); a GPU wants larger
products."""

TEACHER_CHUNKS = 4
"""How many chunks of logits a teacher adds beside the student's: they get this much shorter on a
GPU. On a CPU all but one are made in tiles."""


class HeadLoss(NamedTuple):
    """What `linear_cross_entropy` returns; all are 0-d tensors, only `loss` carries a gradient."""

    loss: Tensor
    """What to minimise: `cross_entropy + z_loss`, or with a teacher `(1 - share) * cross_entropy +
    share * T^2 * divergence + z_loss`."""
    cross_entropy: Tensor
    """Mean negative log-likelihood over the counted targets, detached."""
    z_loss: Tensor
    """The coefficient times the mean of logsumexp squared, detached."""
    count: Tensor
    """How many targets counted (int64)."""
    divergence: Tensor
    """Mean KL(teacher || student) at the temperature over the counted targets, detached; zero
    without a teacher."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    denominator: Tensor | float | None = None,
    chunk: int | None = None,
    backend: Backend = "auto",
    teacher: TeacherHead | None = None,
) -> HeadLoss:
    """Cross-entropy of `hidden @ weight.T + bias` against `target`, plus an optional z-loss.

    Args:
        hidden_ND: hidden states (N, D).
        weight_VD: the head's weight (V, D).
        bias_V: the head's bias (V,), or None.
        target_N: int64 ids (N,); rows whose target is `ignore_index` count for nothing.
        ignore_index: see `target_N`.
        z_loss: coefficient of the mean squared logsumexp (PaLM, arXiv 2204.02311, section 5).
        denominator: divide the sums by this rather than by the number of counted targets, so that
            micro-batches with different counts add up to one batch.
        chunk: rows of logits held at a time; None chooses by `CHUNK_BYTES`. A number means the
            "torch" backend: liger chooses its own.
        backend: "torch" is the code below; "liger" is liger-kernel's fused operation (CUDA only);
            "auto" takes liger where it is installed and can do what is asked.
        teacher: whose distribution is to be learned too, for the same N rows; see
            `distillation.py`. No gradient reaches it.

    Under autocast the products run in autocast's type, as `F.linear` would; softmax, loss and the
    summed gradients are float32 (float64 for float64 input). Only the products see float16, with
    the logits' gradient unscaled, in [-1, 1]: neither a large batch nor a loss scale that is
    applied later can push it out of range. No targets at all gives a loss of 0 and gradients of 0.
    Only first derivatives exist.

    Raises:
        ValueError: shapes or types that do not fit, or a backend that cannot do what is asked.
    """
    _check(hidden_ND, weight_VD, bias_V, target_N, teacher)
    count = (target_N != ignore_index).sum()
    if denominator is None:
        denominator = count.clamp(min=1)
    scale = torch.as_tensor(denominator, dtype=torch.float64, device=hidden_ND.device).reciprocal()
    if chunk is None and _use_liger(backend, hidden_ND, teacher):
        total, z = liger.summed_loss(
            hidden_ND, weight_VD, bias_V, target_N, ignore_index=ignore_index, z_loss=z_loss
        )
        scale = scale.to(total.dtype)
        loss, z = total * scale, z * scale
        return HeadLoss(loss, loss.detach() - z, z, count, torch.zeros_like(z))
    rows = chunk or chunk_rows(weight_VD.shape[0], hidden_ND.device.type, teacher is not None)
    loss, cross_entropy, z, divergence = _chunked(
        hidden_ND, weight_VD, bias_V, target_N, scale, ignore_index, z_loss, rows, teacher
    )
    return HeadLoss(loss, cross_entropy, z, count, divergence)


def chunk_rows(vocabulary: int, device_type: str = "cpu", teacher: bool = False) -> int:
    """Rows of logits to hold at a time: the power of two that fills `CHUNK_BYTES`, at least 16."""
    room = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocabulary)
    if teacher and device_type != "cpu":
        room //= TEACHER_CHUNKS
    return max(16, 1 << (max(room, 1).bit_length() - 1))


def _check(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    teacher: TeacherHead | None,
) -> None:
    faults = []
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        faults.append(f"hidden {tuple(hidden_ND.shape)} does not fit weight {weight_VD.shape}")
    if bias_V is not None and bias_V.shape != weight_VD.shape[:1]:
        faults.append(f"bias {tuple(bias_V.shape)} does not fit weight {tuple(weight_VD.shape)}")
    if target_N.shape != hidden_ND.shape[:1] or target_N.dtype != torch.int64:
        faults.append(
            f"targets are {target_N.dtype} {tuple(target_N.shape)}, "
            f"int64 {tuple(hidden_ND.shape[:1])} is needed"
        )
    if teacher is not None:
        last = teacher.hidden_ND if teacher.weight_VD is None else teacher.weight_VD.t()
        found, needed = (len(teacher.hidden_ND), last.shape[1]), (len(hidden_ND), len(weight_VD))
        if found != needed:
            faults.append(f"the teacher's logits are {found}, the student's {needed}")
    if faults:
        raise ValueError(f"linear_cross_entropy: {'; '.join(faults)}")


@torch.compiler.disable  # called between compiled blocks: nothing here would gain by tracing
def _chunked(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    scale: Tensor,
    ignore_index: int,
    z_loss: float,
    rows: int,
    teacher: TeacherHead | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    want = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, bias_V, target_N, scale, ignore_index, z_loss, rows, want, teacher
    )


def _compute_dtype(hidden_ND: Tensor, weight_VD: Tensor) -> torch.dtype:
    """Return the type of the matrix products: autocast's, or that of the tensors."""
    device_type = hidden_ND.device.type
    if torch.is_autocast_enabled(device_type) and hidden_ND.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if hidden_ND.dtype != weight_VD.dtype:
        raise ValueError(
            f"linear_cross_entropy: hidden states are {hidden_ND.dtype} and the head's weight is "
            f"{weight_VD.dtype}. Without autocast they must be the same."
        )
    return weight_VD.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """The chunked loss: forward leaves the gradients on `ctx`, backward hands them out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        scale: Tensor,
        ignore_index: int,
        z_loss: float,
        rows: int,
        want: bool,
        teacher: TeacherHead | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = _compute_dtype(hidden_ND, weight_VD)
        parts = [
            None if x is None else x.detach().to(dtype) for x in (hidden_ND, weight_VD, bias_V)
        ]
        wanted: Any = tuple(want and needed for needed in ctx.needs_input_grad[:3])
        counted_N = target_N != ignore_index
        target_N = torch.where(counted_N, target_N, 0)
        head = CpuHead if hidden_ND.device.type == "cpu" else PlainHead
        with torch.autocast(hidden_ND.device.type, enabled=False):
            sums, ctx.gradients = head(
                *parts, rows=rows, z_loss=z_loss, wanted=wanted, teacher=teacher
            ).run(target_N, counted_N, scale)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden_ND, weight_VD, bias_V)]
        cross_entropy, z, divergence = (sums.double() * scale).to(sums.dtype).unbind()
        ctx.mark_non_differentiable(cross_entropy, z, divergence)
        loss = teacher.mix(cross_entropy, divergence) if teacher else cross_entropy
        return loss + z, cross_entropy, z, divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        keep = _graph_is_kept()
        if not keep:  # then in place, on the only reference: autograd keeps the tensor as `.grad`
            ctx.gradients = None
        one = grad.device.type == "cpu" and grad.item() == 1
        scaled = [
            None if g is None else _times(g, None if one else grad, in_place=not keep).to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        del gradients
        return (*scaled, None, None, None, None, None, None, None)


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running was asked to retain the graph."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def _times(gradient: Tensor, factor: Tensor | None, *, in_place: bool) -> Tensor:
    """Multiply by the gradient of the loss; None is one."""
    if factor is None:
        return gradient if in_place else gradient.clone()
    factor = factor.to(gradient.dtype)
    return gradient.mul_(factor) if in_place else gradient * factor


def _use_liger(backend: Backend, hidden_ND: Tensor, teacher: TeacherHead | None) -> bool:
    """Whether liger-kernel does this call; "liger" insists and says what is missing."""
    if backend not in ("auto", "torch", "liger"):
        raise ValueError(f"loss backend is {backend!r}; choose 'auto', 'torch' or 'liger'.")
    missing = [] if backend == "torch" else liger.what_is_missing(hidden_ND)
    if teacher is not None:
        missing.append("it knows no teacher")
    if missing and backend == "liger":
        raise ValueError(
            f"loss backend 'liger' cannot do this: {'; '.join(missing)}. Choose 'auto'."
        )
    return backend != "torch" and not missing


def plain_loss(
    logits_NV: Tensor,
    target_N: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    denominator: Tensor | float | None = None,
    teacher: TeacherHead | None = None,
) -> HeadLoss:
    """The same loss from whole logits: for heads that are not one linear layer."""
    logits_NV = logits_NV.float()
    counted_N = target_N != ignore_index
    count = counted_N.sum()
    scale = 1.0 / (count.clamp(min=1) if denominator is None else denominator)
    nll = F.cross_entropy(logits_NV, target_N, ignore_index=ignore_index, reduction="sum") * scale
    loss, z, divergence = nll, torch.zeros_like(nll), torch.zeros_like(nll)
    if teacher is not None:
        tau = teacher.temperature
        log_q, log_p = (
            torch.log_softmax(x.float() / tau, 1) for x in (logits_NV, teacher.logits(slice(None)))
        )
        kl_N = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
        divergence = (kl_N * counted_N).sum() * scale
        loss = teacher.mix(nll, divergence)
    if z_loss:
        z = z_loss * (logits_NV.logsumexp(1).square() * counted_N).sum() * scale
    return HeadLoss(loss + z, nll.detach(), z.detach(), count, divergence.detach())
