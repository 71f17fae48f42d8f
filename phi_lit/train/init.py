"""Initial weights, chosen on purpose.

The paper does not publish its initialisation; the released phi-1 config says `initializer_range`
0.02 with zero biases, which is what `normal` does. LitGPT's own scheme scales the residual
projections of attention and LLaMA-style MLPs but not of the GELU MLP that phi uses, so `litgpt` is
kept only for runs that must start as LitGPT's would.
"""

import math

import torch
from litgpt.model import GPT, CausalSelfAttention, LLaMAMLP
from torch import nn

from phi_lit.errors import UserError
from phi_lit.scramble import mix

STD = 0.02
"""Standard deviation of the released phi-1 config (`initializer_range`)."""


def initialize(model: GPT, scheme: str) -> None:
    """Fill the model's parameters in place, in module order, from torch's default generator.

    Args:
        model: on any real device, in any dtype.
        scheme: "normal" (std 0.02, zero biases, unit norms), "gpt2" (the same with the projections
            onto the residual stream divided by sqrt(2 n_layer)), or "litgpt" (GPT-NeoX).
    """
    config = model.config
    stds = {
        "normal": (STD, STD),
        "gpt2": (STD, STD / math.sqrt(2 * config.n_layer)),
        "litgpt": (
            math.sqrt(2 / (5 * config.n_embd)),
            1 / math.sqrt(config.n_embd) / config.n_layer,
        ),
    }
    if scheme not in stds:
        raise UserError(f"train.init is {scheme!r}; it can be {', '.join(stds)}")
    std, residual_std = stds[scheme]
    residual = {id(module) for module in model.modules() if _is_residual(module, model, scheme)}
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=residual_std if id(module) in residual else std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif module is not model and callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()
            if hasattr(module, "init_weights"):  # stacked experts: no nn.Linear to be found above
                module.init_weights(std=std, residual_std=residual_std)


def _is_residual(module: nn.Module, model: GPT, scheme: str) -> bool:
    """Tell whether `module` projects onto the residual stream and the scheme treats it apart."""
    if scheme == "normal" or not isinstance(module, nn.Linear):
        return False
    parents = [parent for parent in model.modules() if getattr(parent, "proj", None) is module]
    if scheme == "gpt2":
        return bool(parents)
    return any(isinstance(parent, CausalSelfAttention | LLaMAMLP) for parent in parents)


def seeded(seed: int, step: int, micro_step: int, rank: int) -> int:
    """Return a 63-bit seed that is a pure function of its arguments (splitmix64 over each).

    The loop reseeds torch with it before every micro-batch: dropout masks then depend on the place
    in the run and on nothing that would have to be saved, so a resumed run repeats them to the bit.
    """
    state = 0
    for value in (seed, step, micro_step, rank):
        state = mix(state ^ value)
    return state >> 1


def reseed(seed: int, step: int, micro_step: int, rank: int) -> None:
    """Seed torch's generators (CPU and GPU) for one micro-batch of one rank."""
    torch.manual_seed(seeded(seed, step, micro_step, rank))
