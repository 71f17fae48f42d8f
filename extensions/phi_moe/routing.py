"""Which experts a token visits and with which weights, and the losses that keep this healthy.

Scores are a softmax in float32 over all experts. The `selection_bias` takes part in choosing and
in nothing else (balancing without a loss, DeepSeek, arXiv 2408.15664). The losses are those of
Switch and GShard (balance, arXiv 2101.03961 section 2.2) and ST-MoE (router z-loss, arXiv
2202.08906 section 3.2); they are functions of the router's logits here and join the graph in
`layer.py`. Letters in tensor names: N tokens, D hidden size, E experts, K experts kept per token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from extensions.phi_moe.precision import as_given


class Routing(NamedTuple):
    """How the last forward pass in training routed its tokens; detached."""

    load_E: Tensor
    """Tokens that visited each expert, float32: they add up to N times K."""
    entropy: Tensor
    """Mean entropy of a token's scores in nats: log E where the router knows nothing, 0 where it is
    sure."""
    balance_loss: Tensor
    """1 where the experts share the tokens evenly, up to E where one gets all; without weight."""
    z_loss: Tensor
    """Mean squared logsumexp of the logits; without weight."""


class Router(nn.Module):
    """One score per expert, in float32 whatever the rest of the model computes in.

    Args:
        size: D.
        n_expert: E.
    """

    matrices = ("weight",)
    """Parameters that are linear layers' weights, for optimizers that treat those apart."""

    selection_bias: Tensor
    """Added to a score when experts are chosen (E,); float32, saved with the weights, zero until
    someone balances with it."""

    figures: Tensor
    """What `Routing` holds, in its order; a buffer, because compiled code may not set attributes
    while it recomputes."""

    def __init__(self, size: int, n_expert: int) -> None:
        nn.Module.__init__(self)
        self.make_parameters(size, n_expert)

    def make_parameters(self, size: int, n_expert: int) -> None:
        """Do what `__init__` does, in an object that is a module already."""
        self.weight = nn.Parameter(torch.empty(n_expert, size))
        exact = torch.float32
        self.register_buffer("selection_bias", torch.zeros(n_expert, dtype=exact))
        self.register_buffer("figures", torch.zeros(n_expert + 3, dtype=exact), persistent=False)
        Router.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Draw the weight anew (std 0.02) and forget the bias."""
        self.init_weights(std=0.02, residual_std=0.02)
        nn.init.zeros_(self.selection_bias)
        nn.init.zeros_(self.figures)

    def init_weights(self, *, std: float, residual_std: float) -> None:
        """Draw the weight from a normal distribution; nothing here projects onto the residual."""
        nn.init.normal_(self.weight, std=std)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Return the logits (N, E): float32, or float64 if `x_ND` is."""
        exact = torch.promote_types(x_ND.dtype, torch.float32)
        with as_given(x_ND):
            return self.logits(x_ND.to(exact))

    def logits(self, x_ND: Tensor) -> Tensor:
        """Multiply; `x_ND` is in full precision."""
        return F.linear(x_ND, self.weight.to(x_ND.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the model, but keep the buffers in float32: bf16 would lose small steps."""
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                setattr(self, name, buffer.to(moved.device))
        return self

    @property
    def routing(self) -> Routing:
        """How the last forward pass in training routed; the next one overwrites it."""
        *_, entropy, balance, z = self.figures
        return Routing(self.figures[:-3], entropy, balance, z)

    def note(self, logits_NE: Tensor, score_NE: Tensor, load_E: Tensor) -> None:
        """Keep the figures of this pass in `routing`."""
        with torch.no_grad():
            lse_N = logits_NE.logsumexp(-1)
            entropy = (lse_N - (score_NE * logits_NE).sum(-1)).mean()
            losses = balance_loss(score_NE, load_E), lse_N.square().mean()
            self.figures.copy_(torch.cat([load_E, torch.stack([entropy, *losses])]))


def choose(
    logits_NE: Tensor,
    score_NE: Tensor,
    selection_bias_E: Tensor,
    *,
    kept: int,
    over_all: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Give each token its best experts.

    Args:
        logits_NE: of the router, in full precision.
        score_NE: their softmax.
        selection_bias_E: added to the scores for choosing only.
        kept: K.
        over_all: weights are a softmax over all experts, of which the kept ones' are used as they
            are; else over the kept ones, so that they add up to `scale`.
        scale: factor of every weight.

    Returns:
        Weights (N, K) with a gradient, in the type of the logits, and experts (N, K), int64.
    """
    expert_NK = (score_NE.detach() + selection_bias_E).topk(kept, dim=-1).indices
    if over_all:
        return _pick(score_NE, expert_NK) * scale, expert_NK
    return _pick(logits_NE, expert_NK).softmax(-1) * scale, expert_NK


def _pick(value_NE: Tensor, expert_NK: Tensor) -> Tensor:
    """Return the values at the chosen experts (N, K): `gather`, with a gradient that adds nowhere.

    A gather's gradient is a scatter, which torch 2.13's compiler fused wrongly here on a CPU: of
    the router's gradient only the losses' share was left.
    """
    expert_E = torch.arange(value_NE.shape[1], device=value_NE.device)
    return (value_NE.unsqueeze(1) * (expert_NK.unsqueeze(-1) == expert_E)).sum(-1)


def count_tokens(expert_NK: Tensor, n_expert: int) -> Tensor:
    """Return how many of the tokens visit each expert (E,), int64."""
    expert_S = expert_NK.flatten()
    return expert_S.new_zeros(n_expert).scatter_add_(0, expert_S, torch.ones_like(expert_S))


def balance_loss(score_NE: Tensor, load_E: Tensor) -> Tensor:
    """Return E * sum over experts of (share of the visits) * (mean score): 1 at an even load.

    The shares are constants to the gradient; only the scores can move.
    """
    share_E = load_E.to(score_NE.dtype) / load_E.sum()
    return score_NE.shape[1] * (share_E * score_NE.mean(0)).sum()


def router_z_loss(logits_NE: Tensor) -> Tensor:
    """Return the mean squared logsumexp of the logits."""
    return logits_NE.logsumexp(-1).square().mean()


class AttachLoss(torch.autograd.Function):
    """Hands a tensor through; the backward pass then also goes into a loss beside it.

    So a layer inside a model can have a loss of its own that nobody has to collect: it joins
    wherever the layer's output does, through accumulation, recomputation and sharding
    (Megatron-LM's MoEAuxLossAutoScaler).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        """Return `y`; `scale * loss` joins what is minimised."""
        ctx.save_for_backward(scale)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Pass the gradient on, and give the loss its own."""
        (scale,) = ctx.saved_tensors
        return grad, scale.clone(), None
