"""Bytes that autograd keeps of the blocks for the backward pass, by what is made again.

The formulas follow LitGPT's blocks operation by operation. Letters: N tokens of a micro-batch, D
hidden size.
"""

from typing import TYPE_CHECKING

from phi_lit.train.layout import Layout
from phi_lit.train.memory_experts import MLP_CLASS, kept_numbers, mlp_bytes

if TYPE_CHECKING:
    from litgpt.config import Config


def residual_bytes(layout: Layout) -> int:
    """Bytes of one number of the residual stream: float32 wherever the embedding is."""
    return layout.weight_bytes


def saved_per_block(config: "Config", layout: Layout) -> float:
    """Return the bytes that one block saves for its backward pass, without checkpointing."""
    masks = 2 * config.n_embd * _mask_bytes(layout) if layout.residual_dropout else 0
    return layout.tokens * (
        _norm_bytes(config, layout)
        + _attention_bytes(config, layout)
        + _mlp_bytes(config, layout)
        + masks
    )


def _mask_bytes(layout: Layout) -> int:
    """Bytes of one number of a dropout mask: booleans, but eager CPU multiplies with numbers."""
    eager_cpu = layout.device == "cpu" and not layout.compiled
    return layout.compute_bytes if eager_cpu else 1


def _norm_bytes(config: "Config", layout: Layout) -> float:
    """Per token: the norms' inputs, and their outputs, which are the products' inputs."""
    s, r, d = layout.compute_bytes, residual_bytes(layout), config.n_embd
    inputs = 1 if config.parallel_residual else 2  # both norms of a parallel block read the same
    outputs = 1 if config.shared_attention_norm else 2
    if layout.mixed and config.shared_attention_norm and not layout.compiled:
        outputs = 2  # eager autocast rounds the shared norm's output once for each reader
    total = float(inputs * r * d + outputs * s * d)
    if config.norm_class_name == "RMSNorm":
        total += 4 * d * (1 if config.shared_attention_norm else 2)  # scaled in float32
    return total


def _attention_bytes(config: "Config", layout: Layout) -> float:
    """Per token: q and k after rotation, v, the output twice (as heads and side by side).

    `attention.py`, which drops attention weights on a CPU, keeps its output once.
    """
    assert config.head_size is not None
    assert config.n_query_groups is not None
    s = layout.compute_bytes
    width = config.n_head * config.head_size
    if config.n_query_groups == config.n_head:
        inputs = 5 * width  # v is a view: it keeps q, k and v as they left the product
    else:
        inputs = 3 * width  # keys and values repeated for every query head
    if layout.attention_dropout and layout.device == "cpu":
        return float(s * (inputs + width))
    statistics = 4 * config.n_head
    return float(s * (inputs + 2 * width) + statistics)


def _mlp_bytes(config: "Config", layout: Layout) -> float:
    """Per token: the inner activations before and after the non-linearity."""
    inner = config.intermediate_size or 4 * config.n_embd
    dense = layout.compute_bytes * inner * (2 if _is_gelu(config) else 4)
    return mlp_bytes(config, layout, dense) if config.n_expert else dense


def _is_gelu(config: "Config") -> bool:
    """Whether the MLP is GPT-NeoX's, one product before the non-linearity, and not gated."""
    if config.mlp_class_name == MLP_CLASS:
        return config.hf_config.get("moe", {}).get("activation") != "swiglu"
    return config.mlp_class_name == "GptNeoxMLP"


def kept_per_block(config: "Config", layout: Layout, block: float) -> float:
    """Return the bytes of one block that are kept until its backward pass."""
    if layout.checkpointing == "none":
        return block
    entrance = layout.tokens * config.n_embd * residual_bytes(layout)
    if layout.checkpointing == "full":
        return entrance
    assert config.head_size is not None
    assert config.n_query_groups is not None
    heads = config.n_head + 2 * config.n_query_groups  # of the first product; the output's follow
    dense = (config.intermediate_size or 0) * (1 if _is_gelu(config) else 2)  # two side by side
    numbers = (heads + config.n_head) * config.head_size
    numbers += round(kept_numbers(config, layout, dense)) if config.n_expert else dense
    if not layout.compiled:  # the compiler sees that nobody reads the branches' last products again
        numbers += 2 * config.n_embd
    masks = 0
    if layout.residual_dropout and layout.device == "cuda":
        masks = 2 * config.n_embd
        numbers += 0 if layout.compiled else 2 * config.n_embd
    return entrance + layout.tokens * (layout.compute_bytes * numbers + masks)


def working_set(config: "Config", layout: Layout, block: float) -> float:
    """Return what one block's backward pass needs beside what was kept."""
    gradients = layout.tokens * config.n_embd * layout.compute_bytes * 5
    return gradients + block - min(block, kept_per_block(config, layout, block))
