"""Where in a block the experts lie.

LitGPT's block makes its MLP without telling it the number of the layer, and has no room for a third
step: so a block is made here, from a config that says what this layer has, and then gets what is
missing. Parameters that a dense model has keep their names in every placement.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from extensions.phi_moe.layout import check_layout
from extensions.phi_moe.settings import DENSE_CLASS, MLP_CLASS, Settings, has_experts

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.model import Block


def place_experts(
    block: "Block", config: "Config", block_idx: int, init: Callable[..., None]
) -> None:
    """Do the work of `Block.__init__` for any of LitGPT's blocks, with experts where they belong.

    Args:
        block: an object whose `__init__` this is.
        config: the model's.
        block_idx: the layer's number, from 0.
        init: the block's own `__init__`.
    """
    if config.mlp_class_name != MLP_CLASS:
        init(block, config, block_idx)
        return
    settings = Settings.of(config)
    kind = settings.placement if has_experts(config, block_idx) else "dense"
    if kind == "instead":
        init(block, config, block_idx)
    else:
        dense = copy.copy(config)
        dense.mlp_class_name = DENSE_CLASS[settings.activation]
        init(block, dense, block_idx)
    check_layout(block, block_idx, settings, kind)
    if kind == "after":
        block.norm_3 = config.norm_class(config.n_embd, eps=config.norm_eps)
        block.moe = config.mlp_class(config)
        block.post_moe_norm = nn.Identity()  # the end of the branch, where dropout can be put
        block.__class__ = _with_experts_after(type(block))  # type: ignore[arg-type]


class ExpertsAfter:
    """A block's third step: y + experts(norm(y)), where y is all that the block gave before."""

    norm_3: nn.Module
    moe: nn.Module
    post_moe_norm: nn.Module

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the block's output (B, T, D)."""
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return y + self.post_moe_norm(self.moe(self.norm_3(y)))


@cache
def _with_experts_after(block_class: type) -> type:
    """Return the class of blocks with experts after attention and MLP; one for each class."""
    return type(f"{block_class.__name__}WithExpertsAfter", (ExpertsAfter, block_class), {})
