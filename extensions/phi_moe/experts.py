"""The experts of a layer as stacked parameters, and the choice of how to multiply with them.

Letters in tensor names: N tokens, D hidden size, E experts, K experts per token, F inner size, H
the width of the first product: F, or 2 F where it is gated.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from extensions.phi_moe.segments import activate, experts, sort_visits


class Experts(nn.Module):
    """E MLPs of one shape, each parameter of all of them in one tensor.

    Args:
        n_expert: E.
        size: D.
        inner: F.
        bias: whether the products add one.
        activation: "gelu", "gelu_tanh" or "swiglu".
        silent: start with output zero: what is added after a trained model's MLP must not change
            what that model says.
    """

    matrices = ("fc", "proj")
    """Parameters that are linear layers' weights, for optimizers that treat those apart."""

    def __init__(
        self,
        n_expert: int,
        size: int,
        inner: int,
        *,
        bias: bool,
        activation: str,
        silent: bool = False,
    ) -> None:
        super().__init__()
        self.activation, self.silent = activation, silent
        width = 2 * inner if activation == "swiglu" else inner
        self.fc = nn.Parameter(torch.empty(n_expert, width, size))
        self.proj = nn.Parameter(torch.empty(n_expert, size, inner))
        self.fc_bias = nn.Parameter(torch.empty(n_expert, width)) if bias else None
        self.proj_bias = nn.Parameter(torch.empty(n_expert, size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew (std 0.02), biases zero."""
        self.init_weights(std=0.02, residual_std=0.02)

    def init_weights(self, *, std: float, residual_std: float) -> None:
        """Draw weights from normal distributions: `proj` leads onto the residual stream."""
        nn.init.normal_(self.fc, std=std)
        nn.init.normal_(self.proj, std=0.0 if self.silent else residual_std)
        for bias in (self.fc_bias, self.proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_ND: Tensor, weight_NK: Tensor, expert_NK: Tensor, load_E: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts (N, D).

        Args:
            x_ND: the tokens.
            weight_NK: of each token's experts, in float32 at least.
            expert_NK: which these are, int64.
            load_E: how many tokens visit each expert, int64.
        """
        if torch.is_autocast_enabled(x_ND.device.type):
            x_ND = x_ND.to(torch.get_autocast_dtype(x_ND.device.type))
        order_S, end_E = sort_visits(expert_NK, load_E)
        stacks = (self.fc, self.fc_bias, self.proj, self.proj_bias)
        return experts(x_ND, weight_NK, order_S, end_E, *stacks, self.activation)[0]

    def every_token(self, x_ND: Tensor) -> Tensor:
        """Return the sum of all experts' outputs at every token (N, D), each with weight 1."""
        y_ND = None
        for expert in range(self.fc.shape[0]):
            fc_bias = None if self.fc_bias is None else self.fc_bias[expert]
            proj_bias = None if self.proj_bias is None else self.proj_bias[expert]
            a = activate(F.linear(x_ND, self.fc[expert], fc_bias), self.activation)
            y = F.linear(a, self.proj[expert], proj_bias)
            y_ND = y if y_ND is None else y_ND + y
        assert y_ND is not None
        return y_ND
