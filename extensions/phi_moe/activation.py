"""What lies between an expert's products, and its gradient by hand.

On a CPU, GELU's tanh costs as much as a tenth of the products beside it. The same function is
x * sigmoid(2u), and sigmoid is four times as fast there; and one sigmoid gives both the value and
the slope. Letters in tensor names: H what the first product gives, F inner size: H, or half of it
where the MLP is gated.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_LINEAR = 2 * math.sqrt(2 / math.pi)
_CUBIC = 0.044715 * _LINEAR


def activate(h: Tensor, activation: str) -> Tensor:
    """Return the inner activations (.., F) of what the first product gave (.., H).

    Args:
        h: first products.
        activation: "gelu", "gelu_tanh" or "swiglu" (the first half's SiLU times the second half).
    """
    if activation == "swiglu":
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


def activate_quickly(h: Tensor, activation: str) -> Tensor:
    """Return the same without a gradient."""
    if activation != "gelu_tanh" or h.device.type != "cpu":
        return activate(h, activation)
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    return _gate(x).mul_(x).to(h.dtype)


def activate_with_slope(h: Tensor, activation: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the activations, and what turns their gradient (.., F) into that of `h` (.., H)."""
    if activation == "gelu_tanh" and h.device.type == "cpu":
        return _gelu_tanh_with_slope(h)
    return activate(h, activation), lambda grad: _backward(grad, h, activation)


def _gate(x: Tensor) -> Tensor:
    """Return sigmoid(2u), u being the argument of GELU's tanh."""
    return (x * x).mul_(_CUBIC).add_(_LINEAR).mul_(x).sigmoid_()


def _gelu_tanh_with_slope(h: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    x = h.to(torch.promote_types(h.dtype, torch.float32))
    gate = _gate(x)
    a = gate * x

    def back(grad: Tensor) -> Tensor:
        """Multiply with gate + a * (1 - gate) * d(2u)/dx."""
        slope = (x * x).mul_(3 * _CUBIC).add_(_LINEAR)
        return slope.mul_(a).mul_(1 - gate).add_(gate).mul_(grad)

    return a.to(h.dtype), back


def _backward(grad: Tensor, h: Tensor, activation: str) -> Tensor:
    grad = grad.to(h.dtype)
    if activation == "swiglu":
        gate, up = h.chunk(2, -1)
        made = torch.empty_like(h)
        first, second = made.chunk(2, -1)
        first.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        torch.mul(grad, F.silu(gate), out=second)
        return made
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, h, approximate=approximate)
