"""The layer for LoRA (arXiv 2106.09685): router and experts get low-rank stacks beside them.

Parameters of the model itself keep their names, so a checkpoint of it loads as it is. LitGPT's
`merge_lora_weights` calls `merge` of whatever is a `LoRALinear`, so these are. Letters in tensor
names: S rows, E experts, J features in, M features out, R rank.
"""

import math
from typing import Any

import torch
from litgpt.lora import LoRALayer, LoRALinear
from torch import Tensor, nn

from extensions.phi_moe.layer import PhiMoE as BasePhiMoE
from extensions.phi_moe.routing import Router
from extensions.phi_moe.stacks import StackedLinear, multiply


class LowRank(LoRALinear):
    """What router and stacks have in common: a low-rank update of `self.weight`."""

    weight: nn.Parameter

    def make_low_rank(self, config: Any) -> None:
        """Add the update's parameters, if the config asks for any in the MLP."""
        self.r = config.lora_r if config.lora_mlp else 0
        if self.r > 0:
            *stack, size_out, size_in = self.weight.shape
            self.lora_A = nn.Parameter(torch.empty(*stack, self.r, size_in))
            self.lora_B = nn.Parameter(torch.empty(*stack, size_out, self.r))
            self.scaling = config.lora_alpha / self.r
            LowRank.reset_parameters(self)

    @property
    def updates(self) -> bool:
        """Whether there is an update that is not yet part of the weight."""
        return self.r > 0 and not self.merged

    def reset_parameters(self) -> None:
        """Draw the update anew as LitGPT does: A as an `nn.Linear` would be, B zero."""
        if self.r > 0:
            nn.init.uniform_(
                self.lora_A,
                -1 / math.sqrt(self.lora_A.shape[-1]),
                1 / math.sqrt(self.lora_A.shape[-1]),
            )
            nn.init.zeros_(self.lora_B)

    def merge(self) -> None:
        """Add the update to the weight, once."""
        if self.updates:
            self.weight.data += self.get_lora_AB().to(self.weight.data)
            self.merged = True


class LoRARouter(Router, LowRank):
    """A router with a low-rank update."""

    def __init__(self, config: Any) -> None:
        LoRALayer.__init__(self, 0, config.lora_alpha, config.lora_dropout)
        self.make_parameters(config.n_embd, config.n_expert)
        self.make_low_rank(config)

    def reset_parameters(self) -> None:
        """Draw the update anew; the model's own weight is loaded, not drawn."""
        LowRank.reset_parameters(self)

    def logits(self, x_ND: Tensor) -> Tensor:
        """Multiply; `x_ND` is in full precision."""
        logits_NE = super().logits(x_ND)
        if not self.updates:
            return logits_NE
        a, b = self.lora_A.to(x_ND.dtype), self.lora_B.to(x_ND.dtype)
        return logits_NE + (self.lora_dropout(x_ND) @ a.T @ b.T) * self.scaling


class LoRAStack(StackedLinear, LowRank):
    """A stack of linear layers with a stack of low-rank updates."""

    def __init__(self, config: Any, *sizes: int, **options: bool) -> None:
        LoRALayer.__init__(self, 0, config.lora_alpha, config.lora_dropout)
        self.make_parameters(*sizes, **options)
        self.make_low_rank(config)

    @property
    def is_plain(self) -> bool:
        """Whether weight and bias are all there is to it."""
        return super().is_plain and not self.updates

    def reset_parameters(self) -> None:
        """Draw the update anew; the model's own weights are loaded, not drawn."""
        LowRank.reset_parameters(self)

    def forward(self, x_SJ: Tensor, end_E: Tensor) -> Tensor:
        """Return each row's product with its expert (S, M), update included."""
        y_SM = super().forward(x_SJ, end_E)
        if not self.updates:
            return y_SM
        inner_SR = multiply(self.lora_dropout(x_SJ), self.lora_A, end_E)
        return y_SM + multiply(inner_SR, self.lora_B, end_E) * self.scaling

    def at(self, x_NJ: Tensor, expert: int) -> Tensor:
        """Return the product of rows with one expert (N, M), update included."""
        y_NM = super().at(x_NJ, expert)
        if not self.updates:
            return y_NM
        a, b = self.lora_A[expert].to(x_NJ.dtype), self.lora_B[expert].to(x_NJ.dtype)
        return y_NM + (self.lora_dropout(x_NJ) @ a.T @ b.T) * self.scaling


class PhiMoE(BasePhiMoE):
    """The layer in LitGPT's LoRA models."""

    def make_router(self) -> Router:
        """Make a router with an update."""
        return LoRARouter(self.config)

    def make_stack(self, *sizes: int, **options: bool) -> StackedLinear:
        """Make a stack with updates."""
        return LoRAStack(self.config, *sizes, **options)
