"""What the loop does for layers of experts: weigh their losses, balance their load, watch them.

A layer attaches its own losses to the graph in its forward, times its `auxiliary_scale`: here that
becomes the micro-batch's share of the step's tokens (padding too: it is routed like any other), so
that a step's gradient is that of the mean over its micro-batches, wherever they run. Balancing
without a loss (DeepSeek, arXiv 2408.15664) moves each expert's selection bias after a step by the
load of the whole step. Layers are found by what they have and not by their class:
`balance_weight`, `router_z_weight`, `jitter`, `auxiliary_scale` (set here), `routing` (read here:
`load_E`, `entropy`, `balance_loss`), `kept` and `gate.selection_bias`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Fabric
from litgpt.config import Config
from litgpt.model import GPT
from torch import Tensor

from phi_lit.experts import MOE_CLASS
from phi_lit.train.args import TrainArgs

KEYS = ("balance_loss", "router_z_loss", "router_jitter", "balance_bias_rate")
"""The training options that only a model with experts can have."""


def expert_settings(train: TrainArgs) -> dict[str, float]:
    """Return those of the experts' options that are set."""
    return {key: value for key in KEYS if (value := getattr(train, key)) is not None}


def architecture(config: Config) -> dict[str, Any]:
    """Return what a config says of its experts beside LitGPT's own fields."""
    return dict((config.hf_config or {}).get("moe") or {})


def expert_faults(train: TrainArgs, config: Config) -> list[str]:
    """Return what of the experts' options the model cannot follow, a sentence each."""
    asked = expert_settings(train)
    if not asked:
        return []
    names = " and ".join(f"train.{key}" for key in asked)
    if not config.n_expert or config.mlp_class_name != MOE_CLASS:
        kind = f"are LitGPT's {config.mlp_class_name}" if config.n_expert else "do not exist"
        return [
            f"{names} asked for, but experts of {config.name} {kind}; leave the option out, or "
            "choose a model of phi_lit with experts (phi1-nano-moe)"
        ]
    return []


def expert_layers(gpt: GPT) -> dict[int, Any]:
    """Return the layers of experts by the number of their block, from 1."""
    return {
        number: layer
        for number, block in enumerate(gpt.transformer.h, start=1)
        for layer in block.modules()
        if hasattr(layer, "auxiliary_scale")
    }


def apply_expert_options(gpt: GPT, train: TrainArgs) -> None:
    """Tell every layer of experts which losses to attach and how much noise to route with."""
    for layer in expert_layers(gpt).values():
        layer.balance_weight = train.balance_loss or 0.0
        layer.router_z_weight = train.router_z_loss or 0.0
        layer.jitter = train.router_jitter or 0.0


@torch.no_grad()
def rebalance(bias_E: Tensor, load_E: Tensor, rate: float) -> None:
    """Move each expert's selection bias by `rate`, up where it had less than the mean load.

    Section 2.1 of arXiv 2408.15664. The bias chooses experts and never enters their weights, so it
    needs no gradient.
    """
    load_E = load_E.to(bias_E.device, torch.float64)
    bias_E += (rate * torch.sign(load_E.mean() - load_E)).to(bias_E.dtype)


@dataclass
class Experts:
    """The expert layers of a run and what they did in the step under way; none is fine.

    Letters: L layers, E experts.
    """

    layers: list[Any]
    blocks: list[int] = field(default_factory=list)
    """The numbers of the blocks that the layers are in, from 1."""
    bias_rate: float = 0.0
    """How far an expert's selection bias moves after a step."""
    _tokens: list[int] = field(default_factory=list)
    _total: float = 0.0
    _ranks: int = 1
    _load_LE: Tensor | None = None
    _figures_L2: Tensor | None = None

    @classmethod
    def of(cls, gpt: GPT, bias_rate: float | None = None) -> "Experts":
        """Return the expert layers of a model."""
        found = expert_layers(gpt)
        return cls(list(found.values()), list(found), bias_rate or 0.0)

    def begin(self, fabric: Fabric, tokens: list[int]) -> None:
        """Start a step; `tokens` counts those of each micro-batch of this rank."""
        if not self.layers:
            return
        total = torch.tensor(float(sum(tokens)), dtype=torch.float64, device=fabric.device)
        if fabric.world_size > 1:
            total = fabric.all_reduce(total, reduce_op="sum")
        self._tokens, self._total, self._ranks = tokens, float(total), fabric.world_size
        self._load_LE = self._figures_L2 = None

    def weigh(self, micro: int, loss_scale: float = 1.0) -> None:
        """Set the weight of the losses in the next forward, that of micro-batch `micro`.

        Ranks' gradients are averaged, hence the number of ranks.

        Args:
            micro: counted from 0.
            loss_scale: fp16's, which multiplies every other gradient through the loss.
        """
        if not self.layers:
            return
        share = self._tokens[micro] / self._total * self._ranks
        # A tensor, because compiled code would be made anew for every other number.
        scale = torch.tensor(share * loss_scale, device=self.layers[0].gate.weight.device)
        for layer in self.layers:
            layer.auxiliary_scale = scale

    @torch.no_grad()
    def note(self, micro: int) -> None:
        """Add up what the layers did in micro-batch `micro`."""
        if not self.layers:
            return
        routings = [layer.routing for layer in self.layers]
        load_LE = torch.stack([routing.load_E for routing in routings]).double()
        figures_L2 = torch.stack(
            [torch.stack([routing.entropy, routing.balance_loss]) for routing in routings]
        ).double() * (self._tokens[micro] / self._total)
        self._load_LE = load_LE if self._load_LE is None else self._load_LE + load_LE
        self._figures_L2 = figures_L2 if self._figures_L2 is None else self._figures_L2 + figures_L2

    @torch.no_grad()
    def finish(self, fabric: Fabric, *, move_biases: bool) -> dict[str, Any]:
        """Sum over the ranks, balance, and return the step's figures (see `summary`).

        Args:
            fabric: sums.
            move_biases: False leaves the biases where they are (a step that was left out).
        """
        if self._load_LE is None or self._figures_L2 is None:
            return {}
        sums = torch.cat([self._load_LE, self._figures_L2], dim=1)
        if fabric.world_size > 1:
            sums = fabric.all_reduce(sums, reduce_op="sum")
        load_LE, figures_L2 = sums[:, :-2], sums[:, -2:].cpu()
        if move_biases and self.bias_rate:
            for layer, load_E in zip(self.layers, load_LE, strict=True):
                rebalance(layer.gate.selection_bias, load_E, self.bias_rate)
        assignments = round(self._total) * self.layers[0].kept
        return summary(load_LE.cpu(), figures_L2, self.blocks, assignments=assignments)


def summary(
    load_LE: Tensor, figures_L2: Tensor, blocks: list[int], *, assignments: int
) -> dict[str, Any]:
    """Return a step's figures as a record holds them.

    Args:
        load_LE: how many tokens each expert of each layer got.
        figures_L2: per layer the router's entropy in nats and the balance loss before its weight.
        blocks: the number of each layer's block.
        assignments: how many tokens the experts of a layer should have got together.

    Returns:
        `balance_loss` and `router_entropy`, means over the layers; `max_load`, that of the busiest
        expert of all in fair shares; `dropped`, assignments that no expert got; and `experts`, per
        layer its block, the load in thousandths and the entropy.
    """
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True)
    entropy_L, balance_L = figures_L2.unbind(dim=1)
    return {
        "balance_loss": float(balance_L.mean()),
        "router_entropy": float(entropy_L.mean()),
        "max_load": float(share_LE.max()) * load_LE.shape[1],
        "dropped": assignments * len(load_LE) - round(float(load_LE.sum())),
        "experts": {
            "block": blocks,
            "load": [[round(1000 * share) for share in row] for row in share_LE.tolist()],
            "entropy": [round(entropy, 4) for entropy in entropy_L.tolist()],
        },
    }


def by_layer(experts: dict[str, Any]) -> dict[str, float]:
    """Return a step's `experts` as a logger's scalars: per block least and most load, entropy."""
    fair = 1000 / len(experts["load"][0])
    found = {}
    layers = zip(experts["block"], experts["load"], experts["entropy"], strict=True)
    for block, load, entropy in layers:
        found[f"experts/block_{block:02}_min_load"] = min(load) / fair
        found[f"experts/block_{block:02}_max_load"] = max(load) / fair
        found[f"experts/block_{block:02}_entropy"] = entropy
    return found
