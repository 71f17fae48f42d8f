"""A twin of LitGPT's model for sampling: the same tensors and the same code, three parts exchanged.

The twin is a second tree of modules over the first one's tensors; the model itself stays as it is.
Exchanged are the attention's cache and product (`cache.py`), the head, which sees only the position
that is sampled from, and on a CPU the plain linear layers, whose weights are laid out for oneDNN.
"""

from collections.abc import Callable
from typing import Any

import torch
from litgpt.model import GPT
from torch import Tensor, nn

from phi_lit.generate.cache import Attention, Cache

ROWS_TO_PACK_FOR = 64
"""The batch that oneDNN lays weights out for; the layout serves any number of rows as well."""


class PackedLinear(nn.Module):
    """A linear layer on a CPU whose weight lies as oneDNN multiplies it.

    On an AMD EPYC with AVX-512 a float32 head of 512 x 51,200 takes half the time of PyTorch's own
    product (which MKL computes at half width) for 64 rows, a quarter for 16, 0.4 for one.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        self.dtype = weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_TO_PACK_FOR)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias."""
        return torch.ops.mkldnn._linear_pointwise(
            x.contiguous(), self.weight, self.bias, "none", [], ""
        )


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Tell whether oneDNN multiplies this type on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    half = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or half


class LastPositionHead(nn.Module):
    """The head at one position of each row: a prompt's other logits are never made."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.last_n: Tensor | None = None
        """The position wanted of each row; None in a pass over one token."""

    def forward(self, x_nTC: Tensor) -> Tensor:
        """Return logits (n, 1, V)."""
        if self.last_n is not None:
            row_n = torch.arange(len(x_nTC), device=x_nTC.device)
            x_nTC = x_nTC[row_n, self.last_n].unsqueeze(1)
        return self.head(x_nTC)


def twin_of(model: GPT, cache: Cache, *, pack: bool = True) -> GPT:
    """Return a twin of `model` that keeps its keys and values in `cache`.

    Args:
        model: any of LitGPT's models, quantized or not.
        cache: an empty cache.
        pack: whether to lay out the weights for oneDNN where it can multiply them: a second copy
            of the weights, unless the model is given up.
    """
    device = model.lm_head.weight.device

    def packed(module: nn.Module) -> nn.Module | None:
        if type(module) is nn.Linear and can_pack(module.weight.dtype, device):
            return PackedLinear(module)
        return None

    twin: Any = _copy_tree(model, packed if pack else lambda module: None)
    for block in twin.transformer.h:
        layer = Attention(block.attn, cache)
        block.attn.kv_cache = layer
        block.attn.scaled_dot_product_attention = layer.attend
    twin.lm_head = LastPositionHead(twin.lm_head)
    # LitGPT takes its mask from here by position; ours does not depend on it.
    twin.mask_cache = torch.ones(1, 1, model.max_seq_length, 1, dtype=torch.bool, device=device)
    return twin.eval()


def _copy_tree(module: nn.Module, exchange: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Copy a tree of modules but not their tensors, `exchange`d where that returns a module.

    Only children of LitGPT's own modules are exchanged, which call their children and no more:
    others, such as a router, may use the weights in ways of their own.
    """
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    for held in ("_parameters", "_buffers"):
        copy.__dict__[held] = dict(module.__dict__[held])
    litgpts = type(module).__module__.startswith(("litgpt.", "torch.nn."))
    copy.__dict__["_modules"] = {
        name: None if child is None
        else (litgpts and exchange(child)) or _copy_tree(child, exchange)
        for name, child in module._modules.items()
    }  # fmt: skip
    return copy
