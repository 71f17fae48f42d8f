"""What a mixture of experts saves for its backward pass, in bytes per token of an average layer.

Belongs to `activations.py`; the layer is `extensions/phi_moe`. On a CPU its experts are one
operation that keeps the first products alone; on a GPU they are PyTorch's grouped products with
everything between them. Letters: D hidden size, F inner size of an expert, K experts kept, E
experts.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from litgpt.config import Config

    from phi_lit.train.layout import Layout

MLP_CLASS = "PhiMoE"


def layers_with_experts(config: "Config") -> int:
    """Return how many layers have experts, of any class."""
    if not config.n_expert:
        return 0
    every = config.hf_config.get("moe", {}).get("every", 1) if _ours(config) else 1
    return config.n_layer // every


def mlp_bytes(config: "Config", layout: "Layout", dense: float) -> float:
    """Return the bytes per token of a layer's MLP and experts, averaged over the layers.

    Args:
        config: a model with experts.
        layout: how it is trained.
        dense: what its MLP saves in a layer without experts.
    """
    share = layers_with_experts(config) / config.n_layer
    replaced = not _ours(config) or config.hf_config.get("moe", {}).get("placement") != "after"
    return dense * (1 - share * replaced) + share * _layer_bytes(config, layout, replaced)


def kept_numbers(config: "Config", layout: "Layout", dense: float) -> float:
    """Return the numbers per token that selective checkpointing keeps of MLP and experts."""
    share = layers_with_experts(config) / config.n_layer
    replaced = config.hf_config.get("moe", {}).get("placement") != "after"
    first, _ = _widths(config)
    shared = (config.n_shared_expert or 0) * (first // config.n_expert_per_token)
    own = first + shared + (0 if layout.device == "cpu" else _visited(config))
    return dense * (1 - share * replaced) + share * own


def stack_numbers(config: "Config") -> float:
    """Return the parameters of the routed stacks, which autocast does not copy on a CPU."""
    if not _ours(config):
        return 0.0
    first, inner = _widths(config)
    per_expert = (first + inner) / config.n_expert_per_token * config.n_embd
    return layers_with_experts(config) * config.n_expert * per_expert


def _ours(config: "Config") -> bool:
    return config.mlp_class_name == MLP_CLASS


def _widths(config: "Config") -> tuple[int, int]:
    """Return K times what an expert's first product gives, and K * F."""
    inner = config.moe_intermediate_size or config.intermediate_size or 4 * config.n_embd
    gated = not _ours(config) or config.hf_config.get("moe", {}).get("activation") == "swiglu"
    kept = config.n_expert_per_token * inner
    return kept * (2 if gated else 1), kept


def _visited(config: "Config") -> int:
    return config.n_expert_per_token * config.n_embd


def _layer_bytes(config: "Config", layout: "Layout", replaced: bool) -> float:
    s, d, kept = layout.compute_bytes, config.n_embd, config.n_expert_per_token
    first, inner = _widths(config)
    if not _ours(config):  # each kept expert reads a gathered row and adds a weighted one
        return s * (first + 2 * inner + 3 * _visited(config))
    routing = 24 * kept + kept * config.n_expert  # weights, order, which expert is whose
    routing += 4 * d if s == 2 else 0  # the router reads float32
    shared = s * (config.n_shared_expert or 0) * (first + inner) / kept
    norm = 0 if replaced else (layout.weight_bytes + s) * d
    if layout.device == "cpu":
        return s * first + routing + shared + norm
    rows_of_bias = 2 * kept * config.n_expert if config.bias else 0
    return s * (first + inner + 3 * _visited(config) + rows_of_bias) + routing + shared + norm
