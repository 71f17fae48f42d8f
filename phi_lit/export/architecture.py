"""Which of transformers' architectures computes what a LitGPT configuration describes.

LitGPT's converters choose a weight map by the model's name; `weight_map` makes the same choice. A
`Family` says which LitGPT settings an architecture computes and what they are called there, so that
a config.json can be written for a model that never was on the hub. Weights are in `weights.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from litgpt.config import Config

from phi_lit.errors import UserError

Words = dict[str, Any]
"""The contents of a config.json."""


@dataclass(frozen=True)
class Family:
    """One of transformers' architectures, as far as LitGPT's models fit into it."""

    model_type: str
    """Its name in a config.json."""
    architecture: str
    """The class that AutoModelForCausalLM makes."""
    computes: Words
    """LitGPT settings that it computes with these values only."""
    words: Callable[[Config], Words]
    """The other settings, in its words."""


def _positions(config: Config) -> Words:
    """Return the rotary embedding's settings (transformers' `rope_parameters`)."""
    words: Words = {"rope_type": "default", "rope_theta": float(config.rope_base)}
    changes = dict(config.rope_adjustments or {})
    if "low_freq_factor" in changes:
        changes["original_max_position_embeddings"] = changes.pop("original_max_seq_len")
        words |= {"rope_type": "llama3", **changes}
    elif set(changes) == {"factor"} or config.rope_condense_ratio != 1:
        factor = changes.get("factor", config.rope_condense_ratio)
        words |= {"rope_type": "linear", "factor": float(factor)}
    return words


def _sizes(config: Config) -> Words:
    """Return what every architecture calls the same."""
    return {
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "max_position_embeddings": config.block_size,
        "rope_parameters": _positions(config),
    }


def _partly_rotated(config: Config) -> Words:
    sizes = _sizes(config)
    sizes["rope_parameters"]["partial_rotary_factor"] = config.rotary_percentage
    return sizes | {"layer_norm_eps": config.norm_eps}


def _phi(config: Config) -> Words:
    gelu = {"tanh": "gelu_new", "none": "gelu"}[config.gelu_approximate]
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}
    heads = {"num_key_value_heads": config.n_query_groups}
    return _partly_rotated(config) | {"hidden_act": gelu} | heads | dropout


def _gpt_neox(config: Config) -> Words:
    gelu = {"tanh": "gelu_pytorch_tanh", "none": "gelu"}[config.gelu_approximate]
    parallel = {"use_parallel_residual": config.parallel_residual}
    return _partly_rotated(config) | {"hidden_act": gelu} | parallel


def _llama(config: Config) -> Words:
    heads = {"num_key_value_heads": config.n_query_groups, "head_dim": config.head_size}
    return _sizes(config) | {"rms_norm_eps": config.norm_eps, "hidden_act": "silu"} | heads


_LAYER_NORM_MLP: Words = dict(norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", bias=True)
_RMS_NORM_MLP: Words = dict(
    norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP",
    bias=False,
    lm_head_bias=False,
    parallel_residual=False,
    shared_attention_norm=False,
    rotary_percentage=1.0,
)

FAMILIES: dict[str, Family] = {
    "phi": Family(
        "phi",
        "PhiForCausalLM",
        _LAYER_NORM_MLP
        | dict(parallel_residual=True, shared_attention_norm=True, lm_head_bias=True),
        _phi,
    ),
    "gpt_neox": Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _LAYER_NORM_MLP | dict(shared_attention_norm=False, lm_head_bias=False),
        _gpt_neox,
    ),
    "llama": Family(
        "llama", "LlamaForCausalLM", _RMS_NORM_MLP | dict(attn_bias=False), _llama
    ),
    "qwen_2_5": Family(
        "qwen2", "Qwen2ForCausalLM", _RMS_NORM_MLP | dict(attn_bias=True), _llama
    ),
}  # fmt: skip
"""By weight map. The other maps (falcon, gemma_2, gemma_3, olmo2, qwen_3 and the phi of phi-3 and
phi-4) are exported where the checkpoint still has the config.json it was downloaded with."""

_ONLY_PLAIN = (
    "norm_qk", "post_attention_norm", "post_mlp_norm", "attention_scores_scalar",
    "sliding_window_size", "attention_logit_softcapping", "final_logit_softcapping",
    "rope_interleave", "rope_local_base_freq", "n_expert", "scale_embeddings", "norm_1", "norm_2",
    "latent_attention",
)  # fmt: skip
"""LitGPT settings that none of these families has: they must be at their defaults."""

RETIED_ON_THE_WAY_BACK = ("llama", "qwen_2_5", "qwen_3", "olmo2", "gemma_2", "gemma_3")
"""Weight maps for which `litgpt convert_to_litgpt` makes a missing head from the embedding."""


def weight_map(config: Config) -> str:
    """Return which of LitGPT's weight maps its converters use for a model (by its name)."""
    name = config.name.lower()
    if "falcon" in config.name:
        return "falcon"
    if config.name.startswith(("Gemma-2", "Gemma-3")):
        return f"gemma_{config.name[6]}"
    for start, found in (
        ("phi", "phi"), ("qwen2.5", "qwen_2_5"), ("qwq", "qwen_2_5"), ("olmo-2-", "olmo2"),
        ("qwen3", "qwen_3"),
    ):  # fmt: skip
        if name.startswith(start):
            return found
    llama = config.mlp_class_name in ("LLaMAMLP", "GemmaMLP", "LLaMAMoE")
    return "llama" if llama else "gpt_neox"


def family_of(config: Config) -> Family:
    """Return the architecture that computes a model.

    Raises:
        UserError: none does; the message says which setting stands in the way.
    """
    if config.mlp_class_name == "LLaMAMoE":
        raise _no_config_json(config)
    refuse_experts(config)
    name = weight_map(config)
    if name not in FAMILIES or config.name.lower().startswith(("phi-3", "phi-4")):
        raise _no_config_json(config)
    family = FAMILIES[name]
    if faults := _differences(config, family):
        raise UserError(
            f"{config.name}: no config.json can be made for this model: "
            f"{family.architecture} differs in {'; '.join(faults)}. If it came from the hub, put "
            "the config.json that it was downloaded with into the checkpoint directory"
        )
    return family


def _no_config_json(config: Config) -> UserError:
    return UserError(
        f"{config.name}: a config.json can be made for models like phi, Llama, Qwen2.5 and Pythia "
        "(GPT-NeoX). Put the config.json that this model was downloaded with into the checkpoint "
        "directory"
    )


def _differences(config: Config, family: Family) -> list[str]:
    plain = {field.name: field.default for field in fields(Config) if field.name in _ONLY_PLAIN}
    if config.attention_scores_scalar == config.head_size:  # what everybody divides by
        del plain["attention_scores_scalar"]
    if family.model_type == "gpt_neox":
        plain["n_query_groups"] = config.n_head
    if family.model_type in ("phi", "gpt_neox"):
        plain["head_size"] = config.n_embd // config.n_head
    faults = [
        f"{name} (here {getattr(config, name)!r}, there {value!r})"
        for name, value in (plain | family.computes).items()
        if getattr(config, name) != value
    ]
    changes = set(config.rope_adjustments or {})
    llama3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}
    if changes not in (set(), {"factor"}, llama3) or (changes and config.rope_condense_ratio != 1):
        faults.append(f"rope_adjustments (here {config.rope_adjustments!r})")
    return faults


def refuse_experts(config: Config) -> None:
    """Raise a `UserError` for a mixture of experts that is not LitGPT's own LLaMAMoE (Mixtral's).

    No class of transformers computes another, and shipping one would make its users pass
    trust_remote_code, which runs a stranger's code: the very thing that weights must not need.
    """
    if config.mlp_class_name != "LLaMAMoE" and (config.n_expert or "MoE" in config.mlp_class_name):
        raise UserError(
            f"{config.name} is a mixture of experts ({config.mlp_class_name}, {config.n_expert} "
            "experts), which no architecture of transformers computes: it cannot be exported. "
            "Share the LitGPT checkpoint itself; dense models (phi, Llama, ...) can be exported"
        )


def hub_words(config: Config) -> Words:
    """Return the config.json of a model, made from LitGPT's configuration alone.

    Raises:
        UserError: no architecture of transformers computes it.
    """
    family = family_of(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **family.words(config),
        "tie_word_embeddings": False,
    }
