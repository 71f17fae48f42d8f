"""Linear layers that multiply in float8: the few lines that `gpu.py --fp8` needs without torchao.

Scaling is dynamic, one scale per tensor: activations and weights in e4m3, gradients in e5m2, sums
in float32, as in torchao's tensorwise recipe. An experiment's tool, not a part of phi_lit.
"""

from typing import Any

import torch
from torch import Tensor, nn


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (x in float8, the scale to undo it): the largest value at the format's top."""
    top = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / top
    return (x.float() / scale).clamp(-top, top).to(dtype), scale


def multiply(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Return a @ b of two quantized matrices: the hardware wants b column by column."""
    left, right = a[0].contiguous(), b[0].t().contiguous().t()
    return torch._scaled_mm(
        left, right, scale_a=a[1], scale_b=b[1], out_dtype=dtype, use_fast_accum=False
    )


class _Float8Product(torch.autograd.Function):
    """x @ weight.T with all three products of a training step in float8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        quantized = quantize(x, torch.float8_e4m3fn)
        weight_values, scale = quantize(weight, torch.float8_e4m3fn)
        return multiply(quantized, (weight_values.t(), scale), x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grads, grad_scale = quantize(grad, torch.float8_e5m2)
        x_grad = multiply((grads, grad_scale), quantize(weight, torch.float8_e4m3fn), x.dtype)
        weight_grad = multiply(
            (grads.t(), grad_scale), quantize(x, torch.float8_e4m3fn), weight.dtype
        )
        return x_grad, weight_grad


class Float8Linear(nn.Linear):
    """An `nn.Linear` whose products run in float8; parameters and their names stay as they are."""

    def forward(self, input: Tensor) -> Tensor:
        """Return input @ weight.T + bias, in the input's type."""
        weight = self.weight.to(input.dtype)
        y = _Float8Product.apply(input.flatten(0, -2), weight).view(*input.shape[:-1], -1)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def convert_to_float8_training(module: nn.Module) -> nn.Module:
    """Change the class of every linear layer below `module` whose sizes float8 can take."""
    for layer in module.modules():
        if type(layer) is nn.Linear and layer.in_features % 16 == layer.out_features % 16 == 0:
            layer.__class__ = Float8Linear
    return module
