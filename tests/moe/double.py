"""The slow, obvious double: one token after another, one expert after another, plain autograd."""

import torch
from torch import Tensor
from torch.nn import functional as F


def mlp(x: Tensor, experts, expert: int) -> Tensor:
    """Run one token (D,) through one expert of a stack."""
    fc_bias = None if experts.fc.bias is None else experts.fc.bias[expert]
    proj_bias = None if experts.proj.bias is None else experts.proj.bias[expert]
    h = F.linear(x, experts.fc.weight[expert], fc_bias)
    if experts.activation == "swiglu":
        inner = experts.fc.weight.shape[1] // 2
        a = F.silu(h[:inner]) * h[inner:]
    elif experts.activation == "gelu_tanh":
        a = F.gelu(h, approximate="tanh")
    else:
        a = F.gelu(h)
    return F.linear(a, experts.proj.weight[expert], proj_bias)


def mixture(x_ND: Tensor, experts, weight_NK: Tensor, expert_NK: Tensor) -> Tensor:
    """Return what `Experts.forward` promises, and autograd its gradients."""
    rows = [
        sum(
            weight * mlp(x, experts, int(expert))
            for weight, expert in zip(weights, chosen, strict=True)
        )
        for x, weights, chosen in zip(x_ND, weight_NK, expert_NK, strict=True)
    ]
    return torch.stack(rows)
