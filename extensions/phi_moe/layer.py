"""The layer: router, experts, shared experts, and the losses that keep the routing healthy.

It takes the place of any of LitGPT's MLPs: built from a model's config, (B, T, D) in and out.
Letters in tensor names: B rows, T tokens of a row, N = B * T, D hidden size, E experts, K experts
kept per token.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from extensions.phi_moe import routing
from extensions.phi_moe.experts import Experts
from extensions.phi_moe.routing import AttachLoss, Router, Routing
from extensions.phi_moe.settings import Settings
from extensions.phi_moe.stacks import StackedLinear

if TYPE_CHECKING:
    from litgpt.config import Config


class PhiMoE(nn.Module):
    """A mixture of experts: each token visits the `n_expert_per_token` that its router prefers.

    No token is ever dropped, and none waits for another. The attributes below are training
    settings: set them from outside, before a forward pass; at their defaults the layer has no
    loss of its own.

    Args:
        config: a LitGPT config with `mlp_class_name` PhiMoE; see `settings.py`.
    """

    balance_weight: float = 0.0
    """Weight of the balance loss (Switch and GShard; 0.01 is usual)."""
    router_z_weight: float = 0.0
    """Weight of the router z-loss (ST-MoE; 0.001 is usual)."""
    jitter: float = 0.0
    """The router reads its input times uniform numbers from [1 - jitter, 1 + jitter]."""
    auxiliary_scale: float | Tensor = 1.0
    """What both losses' gradients are multiplied by: this pass's share of the step, times the loss
    scale. A tensor may change from pass to pass without compiling anew."""

    def __init__(self, config: "Config") -> None:
        super().__init__()
        settings = Settings.of(config)
        self.config = config
        self.kept, self.n_expert = config.n_expert_per_token, config.n_expert
        self.over_all = settings.normalize == "all" or (
            settings.normalize == "auto" and self.kept == 1
        )
        self.gate = self.make_router()
        inner = config.moe_intermediate_size or config.intermediate_size
        self.experts = self.make_experts(config.n_expert, inner, settings)
        self.shared_experts = (
            self.make_experts(1, inner * config.n_shared_expert, settings)
            if config.n_shared_expert
            else None
        )

    def make_router(self) -> Router:
        """Make the router (variants for finetuning make another)."""
        return Router(self.config.n_embd, self.config.n_expert)

    def make_experts(self, n_expert: int, inner: int, settings: Settings) -> Experts:
        """Make experts of one shape."""
        tanh = settings.activation == "gelu" and self.config.gelu_approximate == "tanh"
        return Experts(
            n_expert,
            self.config.n_embd,
            inner,
            bias=self.config.bias,
            activation="gelu_tanh" if tanh else settings.activation,
            silent=settings.placement == "after",
            linear=self.make_stack,
        )

    def make_stack(self, *sizes: int, **options: bool) -> StackedLinear:
        """Make a stack of linear layers (variants for finetuning make another)."""
        return StackedLinear(*sizes, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, and the shared ones (B, T, D)."""
        x_ND = x.reshape(-1, x.shape[-1])
        logits_NE = self.gate(self._jittered(x_ND))
        score_NE = logits_NE.softmax(-1)
        weight_NK, expert_NK = routing.choose(
            logits_NE,
            score_NE,
            self.gate.selection_bias,
            kept=self.kept,
            over_all=self.over_all,
            scale=self.config.routed_scaling_factor,
        )
        load_E = routing.count_tokens(expert_NK, self.n_expert)
        y_ND = self.experts(x_ND, weight_NK, expert_NK, load_E)
        if self.shared_experts is not None:
            y_ND = y_ND + self.shared_experts.at(x_ND, 0)
        if self.training:
            self.gate.note(logits_NE, score_NE, load_E)
            y_ND = self._with_losses(y_ND, logits_NE, score_NE, load_E)
        return y_ND.view(x.shape)

    @property
    def routing(self) -> Routing:
        """How the last forward pass in training routed; the next one overwrites it."""
        return self.gate.routing

    def _jittered(self, x_ND: Tensor) -> Tensor:
        if not (self.training and self.jitter):
            return x_ND
        return x_ND * torch.empty_like(x_ND).uniform_(1 - self.jitter, 1 + self.jitter)

    def _with_losses(
        self, y_ND: Tensor, logits_NE: Tensor, score_NE: Tensor, load_E: Tensor
    ) -> Tensor:
        """Return `y_ND`, with the weighted losses attached to it."""
        loss = logits_NE.new_zeros(())
        if self.balance_weight:
            loss = loss + self.balance_weight * routing.balance_loss(score_NE, load_E)
        if self.router_z_weight:
            loss = loss + self.router_z_weight * routing.router_z_loss(logits_NE)
        if not loss.requires_grad:
            return y_ND
        scale = torch.as_tensor(self.auxiliary_scale, dtype=loss.dtype, device=loss.device)
        return AttachLoss.apply(y_ND, loss, scale)
