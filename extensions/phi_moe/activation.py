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
    return _gate(h).mul_(h) if _is_slow(h, activation) else activate(h, activation)


def activate_with_slope(h: Tensor, activation: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the activations, and what turns their gradient (.., F) into that of `h` (.., H)."""
    if _is_slow(h, activation):
        return _gelu_tanh_with_slope(h)
    return activate(h, activation), lambda grad: _backward(grad, h, activation)


def _is_slow(h: Tensor, activation: str) -> bool:
    """Tell whether PyTorch's own is the slower one: half precision would have to be converted."""
    whole = h.dtype in (torch.float32, torch.float64)
    return activation == "gelu_tanh" and h.device.type == "cpu" and whole


def _gate(x: Tensor) -> Tensor:
    """Return sigmoid(2u), u being the argument of GELU's tanh."""
    return _quadratic(x, _CUBIC).mul_(x).sigmoid_()


def _quadratic(x: Tensor, factor: float) -> Tensor:
    """Return _LINEAR + factor * x^2, in one pass."""
    return torch.addcmul(x.new_tensor(_LINEAR), x, x, value=factor)


def _gelu_tanh_with_slope(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    gate = _gate(x)
    a = gate * x

    def back(grad: Tensor) -> Tensor:
        """Multiply with gate + (1 - gate) * a * d(2u)/dx."""
        slope = _quadratic(x, 3 * _CUBIC).mul_(a)
        return slope.lerp_(x.new_tensor(1.0), gate).mul_(grad)

    return a, back


def _backward(grad: Tensor, h: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, up = h.chunk(2, -1)
        made = torch.empty_like(h)
        first, second = made.chunk(2, -1)
        first.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        torch.mul(grad, F.silu(gate), out=second)
        return made
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, h, approximate=approximate)
