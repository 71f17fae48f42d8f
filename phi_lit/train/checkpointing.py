"""Activation checkpointing per block: less memory for a second forward pass of what is cheap.

A block's forward is wrapped where it lies, so parameter names and state dict keys stay as they
are. Gradients do not change, to the bit on a CPU, with dropout on: PyTorch's checkpointing restores
the random state for the second pass.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Literal, get_args

import torch
from litgpt.model import GPT
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from phi_lit.errors import UserError, did_you_mean

Mode = Literal["none", "selective", "full"]

_KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "phi_lit::dropout_attention",
    "phi_moe::experts",
    "phi_lit::segment_attention",
    "flash_attn::_flash_attn_varlen_forward",
    # Attention that is kept draws no random numbers in the second pass: a dropout after it would
    # then draw others than in the first. So on GPUs its mask is kept too.
    "aten::native_dropout",
)
"""Operations whose results `selective` keeps: what is dear to compute again."""


def apply_activation_checkpointing(gpt: GPT, mode: Mode) -> None:
    """Let every block of `gpt` forget activations in forward and make them again in backward.

    Order: dropout first, then this, then `compile_blocks` (so that the compiler sees what is to be
    made again), then `fully_shard`.

    Args:
        gpt: LitGPT's model.
        mode: "none"; "selective" keeps the results of matrix products and attention and makes
            norms, rotations, activations and sums again; "full" keeps a block's input only.

    Raises:
        UserError: another word.
    """
    if mode not in get_args(Mode):
        raise UserError(
            f"activation checkpointing is {mode!r}; choose none, selective or full."
            f"{did_you_mean(str(mode), get_args(Mode))}"
        )
    if mode == "none":
        return
    for block in gpt.transformer.h:
        block.checkpointing = mode
        block.forward = MethodType(_checkpointed_forward, block)


def _checkpointed_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    forward = MethodType(type(self).forward, self)
    if not (self.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    options: dict[str, Callable[[], Any]] = {}
    if self.checkpointing == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = getattr(getattr(operation, "_schema", None), "name", "")
    return CheckpointPolicy.MUST_SAVE if name in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
