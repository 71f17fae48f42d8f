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

Backend = Literal["auto", "torch", "liger"]

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
"""Room for the logits of one chunk, counted in float32. On a CPU 512 rows of 51,200 logits are
where the matrix products are at full speed and the pages of one buffer are reused; a GPU wants
larger products."""

_CACHED_BYTES = 4 << 20  # rows whose softmax is taken together on a CPU: what stays in its caches


class HeadLoss(NamedTuple):
    """What `linear_cross_entropy` returns; all are 0-d tensors, only `loss` carries a gradient."""

    loss: Tensor
    """What to minimise: `cross_entropy + z_loss`."""
    cross_entropy: Tensor
    """Mean negative log-likelihood over the counted targets, detached."""
    z_loss: Tensor
    """The coefficient times the mean of logsumexp squared, detached."""
    count: Tensor
    """How many targets counted (int64)."""


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

    Under autocast the products run in autocast's type, as `F.linear` would; softmax, loss and the
    accumulated gradients of weight and bias are float32 (float64 for float64 input). Gradients are
    kept unscaled between forward and backward, with entries in [-1, 1] per row, so that a loss
    scale of 65,536 applied later overflows nothing in float16. No targets at all gives a loss of 0
    and gradients of 0. Only first derivatives exist.

    Raises:
        ValueError: shapes or types that do not fit, or a backend that cannot do what is asked.
    """
    _check(hidden_ND, weight_VD, bias_V, target_N)
    count = (target_N != ignore_index).sum()
    if denominator is None:
        denominator = count.clamp(min=1)
    scale = torch.as_tensor(denominator, dtype=torch.float64, device=hidden_ND.device).reciprocal()
    if chunk is None and _use_liger(backend, hidden_ND):
        total, z = liger.summed_loss(
            hidden_ND, weight_VD, bias_V, target_N, ignore_index=ignore_index, z_loss=z_loss
        )
        scale = scale.to(total.dtype)
        loss, z = total * scale, z * scale
        return HeadLoss(loss, loss.detach() - z, z, count)
    rows = chunk or chunk_rows(weight_VD.shape[0], hidden_ND.device.type)
    loss, cross_entropy, z = _chunked(
        hidden_ND, weight_VD, bias_V, target_N, scale, ignore_index, z_loss, rows
    )
    return HeadLoss(loss, cross_entropy, z, count)


def chunk_rows(vocabulary: int, device_type: str = "cpu") -> int:
    """Rows of logits to hold at a time: the power of two that fills `CHUNK_BYTES`, at least 16."""
    room = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocabulary)
    return max(16, 1 << (max(room, 1).bit_length() - 1))


def _check(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor) -> None:
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
) -> tuple[Tensor, Tensor, Tensor]:
    want = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, bias_V, target_N, scale, ignore_index, z_loss, rows, want
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
    """The chunked loss; forward leaves the unscaled gradients on `ctx`, backward scales them."""

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _compute_dtype(hidden_ND, weight_VD)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            chunks = _Chunks(hidden_ND, weight_VD, bias_V, dtype, rows, z_loss)
            wanted = [want and need for need in ctx.needs_input_grad[:3]]
            ctx.gradients = chunks.make_gradients(*wanted)
            nll, z = chunks.run(target_N, ignore_index)
        ctx.scale = scale
        ctx.dtypes = (hidden_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        cross_entropy = (nll * scale).to(nll.dtype)
        z = (z * scale).to(nll.dtype)
        ctx.mark_non_differentiable(cross_entropy, z)
        return cross_entropy + z, cross_entropy, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad.double() * ctx.scale
        gradients = ctx.gradients
        keep = _graph_is_kept()
        if not keep:  # then in place, on the only reference: autograd keeps the tensor as `.grad`
            ctx.gradients = None
        scaled = [
            None if g is None else _scale(g, factor.to(g.dtype), in_place=not keep).to(dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        del gradients
        return (*scaled, None, None, None, None, None, None)


def _graph_is_kept() -> bool:
    """Whether the backward pass that is running was asked to retain the graph."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if asked is None else asked()


def _scale(gradient: Tensor, factor: Tensor, *, in_place: bool) -> Tensor:
    return gradient.mul_(factor) if in_place else gradient * factor


class _Chunks:
    """One pass over the rows, chunk by chunk, that sums the loss and fills the gradients."""

    def __init__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        dtype: torch.dtype,
        rows: int,
        z_loss: float,
    ) -> None:
        self.hidden_ND = hidden_ND.detach().to(dtype)
        self.weight_VD = weight_VD.detach().to(dtype)
        self.bias_V = None if bias_V is None else bias_V.detach().to(dtype)
        self.rows = min(rows, max(hidden_ND.shape[0], 1))
        self.z_loss = z_loss
        # Sums are never kept in a half-precision type: 2048 rows added in bf16 lose 8 bits.
        self.exact = torch.float64 if dtype == torch.float64 else torch.float32
        self.hidden_grad_ND: Tensor | None = None
        self.weight_grad_VD: Tensor | None = None
        self.bias_grad_V: Tensor | None = None

    def make_gradients(
        self, hidden: bool, weight: bool, bias: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Make the tensors that `run` fills, for those gradients that are wanted."""
        if hidden:
            self.hidden_grad_ND = torch.empty_like(self.hidden_ND)
        if weight:
            self.weight_grad_VD = torch.zeros_like(self.weight_VD, dtype=self.exact)
        if bias:
            assert self.bias_V is not None
            self.bias_grad_V = torch.zeros_like(self.bias_V, dtype=self.exact)
        return self.hidden_grad_ND, self.weight_grad_VD, self.bias_grad_V

    def run(self, target_N: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Return the summed negative log-likelihood and the summed z-loss."""
        n_rows, vocabulary = self.hidden_ND.shape[0], self.weight_VD.shape[0]
        counted_N = target_N != ignore_index
        target_N = torch.where(counted_N, target_N, 0)
        nll = self.hidden_ND.new_zeros((), dtype=self.exact)
        z = self.hidden_ND.new_zeros((), dtype=self.exact)
        buffer = self.hidden_ND.new_empty((self.rows, vocabulary))
        for start in range(0, n_rows, self.rows):
            rows = slice(start, min(start + self.rows, n_rows))
            logits = buffer[: rows.stop - start]
            self._logits(rows, out=logits)
            counted = counted_N[rows].to(self.exact)
            self._softmax(logits, target_N[rows], counted, nll, z)
            self._products(rows, logits, counted)
        return nll, z

    @property
    def _wants_gradients(self) -> bool:
        wanted = (self.hidden_grad_ND, self.weight_grad_VD, self.bias_grad_V)
        return any(gradient is not None for gradient in wanted)

    def _logits(self, rows: slice, out: Tensor) -> None:
        if self.bias_V is None:
            torch.mm(self.hidden_ND[rows], self.weight_VD.t(), out=out)
        else:
            torch.addmm(self.bias_V, self.hidden_ND[rows], self.weight_VD.t(), out=out)

    def _softmax(
        self, logits: Tensor, target: Tensor, counted: Tensor, nll: Tensor, z: Tensor
    ) -> None:
        """Add to the loss; turn logits into their gradient in place, a few rows at a time.

        On a CPU a few rows stay in the caches between the passes over them.
        """
        few = logits.shape[0]
        if logits.device.type == "cpu":
            few = max(1, _CACHED_BYTES // (4 * logits.shape[1]))
        for start in range(0, logits.shape[0], few):
            part = logits[start : start + few]
            weight = counted[start : start + few]
            index = target[start : start + few, None]
            x = part.to(self.exact)
            target_logit = x.gather(1, index).squeeze(1)
            if not self._wants_gradients:
                lse = x.logsumexp(1)
            else:
                largest = x.amax(1, keepdim=True)
                p = torch.softmax(x, 1)
                # The largest probability is 1 / sum(exp(x - largest)), exact to the last bits.
                lse = (largest - p.amax(1, keepdim=True).log_()).squeeze(1)
                if self.z_loss:
                    p.mul_((1 + 2 * self.z_loss * lse).unsqueeze(1))
                p.scatter_add_(1, index, p.new_full((), -1.0).expand(index.shape))
                if self.bias_grad_V is not None:
                    self.bias_grad_V.addmv_(p.t(), weight)
                part.copy_(p)
            nll += ((lse - target_logit) * weight).sum()
            z += self.z_loss * (lse.square() * weight).sum()

    def _products(self, rows: slice, logit_grad: Tensor, counted: Tensor) -> None:
        """Turn the gradient of the logits into that of hidden states and weight."""
        counted = counted.to(logit_grad.dtype).unsqueeze(1)
        if self.hidden_grad_ND is not None:
            out = self.hidden_grad_ND[rows]
            torch.mm(logit_grad, self.weight_VD, out=out)
            out.mul_(counted)
        if self.weight_grad_VD is not None:
            hidden = self.hidden_ND[rows] * counted
            if self.weight_grad_VD.dtype == hidden.dtype:
                self.weight_grad_VD.addmm_(logit_grad.t(), hidden)
            else:
                self.weight_grad_VD.add_(logit_grad.t() @ hidden)


def _use_liger(backend: Backend, hidden_ND: Tensor) -> bool:
    """Whether liger-kernel does this call; "liger" insists and says what is missing."""
    if backend not in ("auto", "torch", "liger"):
        raise ValueError(f"loss backend is {backend!r}; choose 'auto', 'torch' or 'liger'.")
    missing = [] if backend == "torch" else liger.what_is_missing(hidden_ND)
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
) -> HeadLoss:
    """The same loss from whole logits: for heads that are not one linear layer."""
    logits_NV = logits_NV.float()
    counted_N = target_N != ignore_index
    count = counted_N.sum()
    scale = 1.0 / (count.clamp(min=1) if denominator is None else denominator)
    nll = F.cross_entropy(logits_NV, target_N, ignore_index=ignore_index, reduction="sum") * scale
    if not z_loss:
        return HeadLoss(nll, nll.detach(), torch.zeros_like(nll), count)
    z = z_loss * (logits_NV.logsumexp(1).square() * counted_N).sum() * scale
    return HeadLoss(nll + z, nll.detach(), z.detach(), count)
