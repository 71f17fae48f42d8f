"""LitGPT's side of the experts in `extensions/phi_moe`: configs, blocks, converters.

Each function takes the place of one of LitGPT's (see `seam_table.py`), and a model without experts
goes through LitGPT's own.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from phi_lit.errors import UserError
from phi_lit.seams import stock

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.model import Block

MOE_CLASS = "PhiMoE"
"""`mlp_class_name` of models with the experts of `extensions/phi_moe`."""


def config_post_init(self: "Config") -> None:
    """Replace `Config.__post_init__`: experts are checked before LitGPT looks at the rest.

    Raises:
        UserError: the settings of experts make no sense; all that is wrong with them is told.
    """
    if self.mlp_class_name == MOE_CLASS:
        from extensions.phi_moe.settings import faults

        if wrong := faults(self):
            raise UserError(f"{self.name or 'model_config'}: {'; '.join(wrong)}")
    stock("litgpt.config.Config.__post_init__")(self)


def config_annotations(stocks: dict[str, Any]) -> dict[str, Any]:
    """Return the types of `Config`'s arguments that change: one more name of an MLP class."""
    from typing import Literal, get_args

    names = (*get_args(stocks["mlp_class_name"]), MOE_CLASS)
    return {"mlp_class_name": Literal[names]}


def _block_init(module: str) -> Callable[..., None]:
    """Return what replaces `Block.__init__` in a LitGPT module."""

    def __init__(self: "Block", config: "Config", block_idx: int) -> None:
        init = stock(f"{module}.Block.__init__")
        if config.mlp_class_name != MOE_CLASS:
            init(self, config, block_idx)
            return
        from extensions.phi_moe.placement import place_experts

        place_experts(self, config, block_idx, init)

    return __init__


model_block_init = _block_init("litgpt.model")
lora_block_init = _block_init("litgpt.lora")
adapter_v2_block_init = _block_init("litgpt.adapter_v2")


def copy_phi_to_hub(
    config: "Config", state_dict: dict, lit_weights: dict, saver: Any = None
) -> None:
    """Replace `copy_weights_phi` of `litgpt convert_from_litgpt`: experts are copied too."""
    if config.mlp_class_name == MOE_CLASS:
        from litgpt.scripts.convert_hf_checkpoint import load_param

        from extensions.phi_moe.convert import copy_to_hub

        lit_weights = copy_to_hub(config, state_dict, lit_weights, saver, load_param)
    copy = stock("litgpt.scripts.convert_lit_checkpoint.copy_weights_phi")
    copy(config, state_dict, lit_weights, saver)


def copy_phi_from_hub(
    config: "Config",
    qkv_weights: dict,
    state_dict: dict,
    hf_weights: dict,
    saver: Any = None,
    dtype: Any = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Replace `copy_weights_phi` of `litgpt convert_to_litgpt`: experts are copied too."""
    if config.mlp_class_name == MOE_CLASS:
        from litgpt.scripts.convert_hf_checkpoint import load_param

        from extensions.phi_moe.convert import copy_from_hub

        hf_weights = copy_from_hub(config, state_dict, hf_weights, dtype, load_param)
    copy = stock("litgpt.scripts.convert_hf_checkpoint.copy_weights_phi")
    copy(config, qkv_weights, state_dict, hf_weights, saver, dtype, *args, **kwargs)
