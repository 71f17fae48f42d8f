"""The experts of a layer, and the choice of how to multiply with them.

Letters in tensor names: N tokens, D hidden size, E experts, K experts per token, S = N * K visits
of tokens to experts, F inner size.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from extensions.phi_moe import segments
from extensions.phi_moe.activation import activate
from extensions.phi_moe.grouped import can_group, combine, dispatch
from extensions.phi_moe.precision import as_given, cast
from extensions.phi_moe.segments import sort_visits
from extensions.phi_moe.stacks import StackedLinear

Path = Literal["auto", "fused", "composed"]

FEW = 16
"""Visits up to which, without gradients on a CPU, each is computed by itself: one token decoded."""


class Experts(nn.Module):
    """E MLPs of one shape.

    Args:
        n_expert: E.
        size: D.
        inner: F.
        bias: whether the products add one.
        activation: "gelu", "gelu_tanh" or "swiglu".
        silent: start with output zero: what is added after a trained model's MLP must not change
            what that model says.
        linear: what makes a stack of linear layers.
    """

    path: Path = "auto"
    """fused: one operation with gradients by hand, the fastest on a CPU. composed: sort, multiply,
    activate, multiply, add; with PyTorch's grouped product where it has one, the fastest on a GPU,
    and the only one for stacks that are more than weights and biases."""

    def __init__(
        self,
        n_expert: int,
        size: int,
        inner: int,
        *,
        bias: bool,
        activation: str,
        silent: bool = False,
        linear: Callable[..., StackedLinear] = StackedLinear,
    ) -> None:
        super().__init__()
        self.activation = activation
        width = 2 * inner if activation == "swiglu" else inner
        self.fc = linear(n_expert, size, width, bias=bias)
        self.proj = linear(n_expert, inner, size, bias=bias, residual=True, silent=silent)

    def forward(self, x_ND: Tensor, weight_NK: Tensor, expert_NK: Tensor, load_E: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts (N, D).

        Args:
            x_ND: the tokens.
            weight_NK: of each token's experts, in float32 at least.
            expert_NK: which these are, int64.
            load_E: how many tokens visit each expert, int64.
        """
        if expert_NK.numel() <= FEW and x_ND.device.type == "cpu" and not torch.is_grad_enabled():
            return self._one_by_one(x_ND, weight_NK, expert_NK)
        x_ND = cast(x_ND)
        order_S, end_E = sort_visits(expert_NK, load_E)
        with as_given(x_ND):
            if self._fused(x_ND):
                stacks = (self.fc.weight, self.fc.bias, self.proj.weight, self.proj.bias)
                return segments.experts(x_ND, weight_NK, order_S, end_E, *stacks, self.activation)[
                    0
                ]
            x_SD = dispatch(x_ND, order_S, expert_NK.shape[1])
            y_SD = self.proj(activate(self.fc(x_SD, end_E), self.activation), end_E)
            return combine(y_SD, weight_NK, order_S).to(x_ND.dtype)

    def _fused(self, x_ND: Tensor) -> bool:
        """Choose the path."""
        if not (self.fc.is_plain and self.proj.is_plain):
            return False
        if self.path != "auto":
            return self.path == "fused"
        if x_ND.device.type in ("cpu", "meta"):
            return True
        stacks = (self.fc.weight, self.proj.weight)
        return not all(can_group(x_ND, stack) for stack in stacks)

    def _one_by_one(self, x_ND: Tensor, weight_NK: Tensor, expert_NK: Tensor) -> Tensor:
        """Compute every visit by itself, so that no expert is touched that nobody visits."""
        y_ND = []
        for x, weights, experts in zip(
            x_ND.split(1), weight_NK.tolist(), expert_NK.tolist(), strict=True
        ):
            visits = zip(weights, experts, strict=True)
            y_ND.append(sum(weight * self.at(x, expert) for weight, expert in visits))
        return torch.cat(y_ND) if y_ND else torch.empty_like(x_ND)

    def at(self, x_ND: Tensor, expert: int) -> Tensor:
        """Return one expert's output at every token (N, D)."""
        return self.proj.at(activate(self.fc.at(x_ND, expert), self.activation), expert)
