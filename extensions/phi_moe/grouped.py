"""PyTorch's product of many row segments with many matrices in one kernel, where it has one.

It came under another name first, and what it takes differs with the version, the device and the
type of number: so it is tried once on a small case and believed if it gives what it should.
Letters in tensor names: S rows, E experts, N tokens, K experts per token, D hidden size.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from extensions.phi_moe.precision import as_given


def grouped_mm(x_SJ: Tensor, weight_EJM: Tensor, end_E: Tensor) -> Tensor:
    """Return the product of each row with its segment's matrix (S, M); `end_E` is int32."""
    if hasattr(F, "grouped_mm"):  # torch 2.10 and later
        return F.grouped_mm(x_SJ, weight_EJM, offs=end_E)
    return torch._grouped_mm(x_SJ, weight_EJM, offs=end_E)


def can_group(x_SJ: Tensor, weight_EMJ: Tensor) -> bool:
    """Tell whether `grouped_mm` takes these: known to work, and rows of whole 16 bytes."""
    sizes = weight_EMJ.shape[1:]
    if any(size * x_SJ.element_size() % 16 for size in sizes) or 0 in (*x_SJ.shape, *sizes):
        return False
    return x_SJ.device.type != "meta" and works(x_SJ.device.type, x_SJ.dtype)


@torch.compiler.assume_constant_result
def works(device: str, dtype: torch.dtype) -> bool:
    """Tell whether `grouped_mm` gives the right products and gradients on a device (cached)."""
    return _tried(device, dtype)


@cache
def _tried(device: str, dtype: torch.dtype) -> bool:
    with torch.enable_grad(), as_given(torch.empty(0, device=device)):
        x = (torch.arange(64.0, device=device).view(4, 16) / 64).to(dtype).requires_grad_()
        weight = (torch.arange(512.0, device=device).view(2, 16, 16) / 512).to(dtype)
        weight.requires_grad_()
        ends = torch.tensor([1, 4], dtype=torch.int32, device=device)
        try:
            y = grouped_mm(x, weight.transpose(1, 2), ends)
            y.backward(torch.ones_like(y))  # `sum` would give a gradient without strides
        except (RuntimeError, AttributeError, TypeError, NotImplementedError):
            return False
        assert x.grad is not None
        assert weight.grad is not None
        close = dict(rtol=0.05, atol=0.05)
        return (
            torch.allclose(y[1:], x[1:] @ weight[1].T, **close)
            and torch.allclose(x.grad[0], weight[0].sum(0), **close)
            and torch.allclose(weight.grad[1, 0], x[1:].sum(0), **close)
        )


class _Rearrange(torch.autograd.Function):
    """Takes rows by an index whose inverse is known, so that no gradient is added up by chance."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Tensor, back: Tensor, copies: int) -> Tensor:
        """Return `x[take]`."""
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Bring each row's gradient back, and add up a row's copies in their order."""
        (back,) = ctx.saved_tensors
        grad = grad.index_select(0, back)
        return grad.unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


def dispatch(x_ND: Tensor, order_S: Tensor, kept: int) -> Tensor:
    """Return each visit's token (S, D), sorted by expert; K is `kept`."""
    return _Rearrange.apply(x_ND, order_S // kept, _inverse(order_S), kept)


def combine(y_SD: Tensor, weight_NK: Tensor, order_S: Tensor) -> Tensor:
    """Return the weighted sum of each token's visits (N, D), in the type of the weights."""
    y_VD = _Rearrange.apply(y_SD, _inverse(order_S), order_S, 1)
    return (y_VD.unflatten(0, weight_NK.shape) * weight_NK.unsqueeze(-1)).sum(1)


def _inverse(order_S: Tensor) -> Tensor:
    place_S = torch.arange(len(order_S), device=order_S.device)
    return torch.empty_like(order_S).scatter_(0, order_S, place_S)
