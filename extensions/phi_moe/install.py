"""For programs without phi_lit: make LitGPT know the layer, in one call.

phi_lit does the same through its own table of seams; do not call this beside it.
"""

import functools
from importlib import import_module
from typing import Any

from extensions.phi_moe.placement import place_experts
from extensions.phi_moe.settings import MLP_CLASS

_MODULES = {
    "litgpt.model": "extensions.phi_moe.layer",
    "litgpt.lora": "extensions.phi_moe.lora",
    "litgpt.adapter_v2": "extensions.phi_moe.adapter_v2",
}
"""Where LitGPT looks up an MLP's class by name, and where ours for that place lies."""


def install() -> None:
    """Put the layer into LitGPT's modules: `mlp_class_name="PhiMoE"` then builds it (idempotent).

    What stays missing without phi_lit: the name in `model_config:` blocks of YAML files, the
    conversion to Hugging Face's layout, and the training options (losses, biases).
    """
    for name, ours in _MODULES.items():
        module = import_module(name)
        if not hasattr(module, MLP_CLASS):
            setattr(module, MLP_CLASS, getattr(import_module(ours), MLP_CLASS))
            module.Block.__init__ = _placing(module.Block.__init__)


def _placing(init: Any) -> Any:
    @functools.wraps(init)
    def __init__(self: Any, config: Any, block_idx: int) -> None:
        place_experts(self, config, block_idx, init)

    return __init__
