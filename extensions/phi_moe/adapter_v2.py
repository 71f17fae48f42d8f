"""The layer for LLaMA-Adapter v2 (arXiv 2304.15010): a scale and a bias after every linear layer.

As in LitGPT's own `AdapterV2Linear`: scale * (linear(x) + bias), which start at one and zero.
Letters in tensor names: S rows, E experts, J features in, M features out.
"""

import torch
from torch import Tensor, nn

from extensions.phi_moe.layer import PhiMoE as BasePhiMoE
from extensions.phi_moe.routing import Router
from extensions.phi_moe.stacks import StackedLinear, rows


class AdapterRouter(Router):
    """A router with a scale and a bias for every expert's score."""

    def make_parameters(self, size: int, n_expert: int) -> None:
        """Add scale and bias."""
        super().make_parameters(size, n_expert)
        self.adapter_bias = nn.Parameter(torch.zeros(n_expert), requires_grad=False)
        self.adapter_scale = nn.Parameter(torch.ones(n_expert), requires_grad=False)

    def reset_parameters(self) -> None:
        """Start as the model without an adapter."""
        _reset(self)

    def logits(self, x_ND: Tensor) -> Tensor:
        """Multiply, shift, scale; `x_ND` is in full precision."""
        return self.adapter_scale * (super().logits(x_ND) + self.adapter_bias)


class AdapterStack(StackedLinear):
    """A stack of linear layers with a scale and a bias after each."""

    is_plain = False

    def make_parameters(self, n_expert: int, size_in: int, size_out: int, **options: bool) -> None:
        """Add scales and biases."""
        super().make_parameters(n_expert, size_in, size_out, **options)
        shape = (n_expert, size_out)
        self.adapter_bias = nn.Parameter(torch.zeros(shape), requires_grad=False)
        self.adapter_scale = nn.Parameter(torch.ones(shape), requires_grad=False)

    def reset_parameters(self) -> None:
        """Start as the model without an adapter."""
        _reset(self)

    def forward(self, x_SJ: Tensor, end_E: Tensor) -> Tensor:
        """Return each row's product with its expert, shifted and scaled (S, M)."""
        y_SM = super().forward(x_SJ, end_E)
        y_SM = y_SM + rows(self.adapter_bias, end_E, y_SM)
        return rows(self.adapter_scale, end_E, y_SM) * y_SM

    def at(self, x_NJ: Tensor, expert: int) -> Tensor:
        """Return the product of rows with one expert, shifted and scaled (N, M)."""
        return self.adapter_scale[expert] * (super().at(x_NJ, expert) + self.adapter_bias[expert])


def _reset(module: AdapterRouter | AdapterStack) -> None:
    if hasattr(module, "adapter_scale"):
        nn.init.zeros_(module.adapter_bias)
        nn.init.ones_(module.adapter_scale)


class PhiMoE(BasePhiMoE):
    """The layer in LitGPT's adapter v2 models."""

    def make_router(self) -> Router:
        """Make a router with an adapter."""
        return AdapterRouter(self.config.n_embd, self.config.n_expert)

    def make_stack(self, *sizes: int, **options: bool) -> StackedLinear:
        """Make a stack with adapters."""
        return AdapterStack(*sizes, **options)
