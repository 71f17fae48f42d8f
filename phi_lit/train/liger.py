"""The fused head and loss of liger-kernel, where it is installed and there is a CUDA device.

Its Triton kernels replace the passes over the logits; what it computes is what `loss.py` computes,
which is its reference and fallback.
"""

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def fused_linear_cross_entropy() -> Callable[..., Any] | None:
    """Return liger-kernel's function, or None where it is missing or too old to be exact."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    # Without it the weight's gradient is summed in bfloat16 over the chunks.
    if "accum_dtype" not in inspect.signature(liger_fused_linear_cross_entropy).parameters:
        return None
    return liger_fused_linear_cross_entropy


def what_is_missing(hidden_ND: Tensor) -> list[str]:
    """Return why liger-kernel cannot take these hidden states; empty where it can."""
    missing = []
    if hidden_ND.device.type != "cuda":
        missing.append(f"its kernels need a CUDA device, this is {hidden_ND.device.type!r}")
    if hidden_ND.dtype == torch.float64:
        missing.append("it has no float64")
    if not missing and fused_linear_cross_entropy() is None:
        missing.append("liger-kernel is not installed, or is older than 0.6.3")
    return missing


@torch.compiler.disable
def summed_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_N: Tensor,
    *,
    ignore_index: int,
    z_loss: float,
) -> tuple[Tensor, Tensor]:
    """Return the sums over rows of (negative log-likelihood + z-loss, z-loss alone).

    Sums, not means: the division comes later, in float32, so that the gradients liger makes on the
    way stay of the order of one and do not vanish in float16.
    """
    function = fused_linear_cross_entropy()
    assert function is not None
    result = function(
        hidden_ND,
        weight_VD,
        target_N,
        bias=bias_V,
        ignore_index=ignore_index,
        lse_square_scale=z_loss,
        reduction="sum",
        return_z_loss=True,
        accum_dtype=torch.float32,
    )
    loss, z = (result.loss, result.z_loss) if hasattr(result, "loss") else result[:2]
    return loss, z.detach().to(loss.dtype)
