"""What a model's config says about its experts, checked.

Numbers lie in LitGPT's own fields (`n_expert`, `n_expert_per_token`, `moe_intermediate_size`,
`n_shared_expert`, `routed_scaling_factor`). What LitGPT has no field for lies in the dictionary
`hf_config["moe"]`, which survives its YAML files. All of it is architecture, so all of it is saved
with a checkpoint; how a model is trained (losses, jitter) is not here.
"""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from extensions.phi_moe.errors import MoEError

if TYPE_CHECKING:
    from litgpt.config import Config

MLP_CLASS = "PhiMoE"
"""`mlp_class_name` of a model with these experts."""

DENSE_CLASS = {"gelu": "GptNeoxMLP", "swiglu": "LLaMAMLP"}
"""LitGPT's MLP of the same kind as an expert, for the layers (and places) without experts."""


@dataclass(frozen=True)
class Settings:
    """The keys of `hf_config["moe"]`."""

    placement: Literal["instead", "after"] = "instead"
    """Experts instead of the MLP, or a third step of the block after attention and MLP."""
    every: int = 1
    """Layers every-1, 2*every-1, ... (from 0) have experts; the others keep their MLP alone."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """gelu: fc, GELU, proj, as in phi. swiglu: silu(fc_1) * fc_2, proj, as in LLaMA."""
    normalize: Literal["auto", "kept", "all"] = "auto"
    """What a token's weights are a softmax over: the kept experts (they add up to one), or all of
    them. auto is kept, but all where one expert is kept: its weight would always be 1, and the
    router would never learn."""

    @classmethod
    def of(cls, config: "Config") -> "Settings":
        """Return the settings of a model whose MLP class is `MLP_CLASS`.

        Raises:
            MoEError: they make no sense; all that is wrong is told in one line.
        """
        if wrong := faults(config):
            raise MoEError(f"{config.name or 'the model config'}: {'; '.join(wrong)}")
        return cls(**config.hf_config.get("moe", {}))


def faults(config: "Config") -> list[str]:
    """Return what is wrong with a model's settings of experts, a sentence each."""
    return [*_number_faults(config), *_moe_faults(config.hf_config.get("moe", {}), config.n_layer)]


def _number_faults(config: "Config") -> list[str]:
    """Look at LitGPT's own fields."""
    wrong = []
    n_expert, kept = config.n_expert, config.n_expert_per_token
    if n_expert < 1:
        wrong.append(f"n_expert is {n_expert}, and {MLP_CLASS} needs at least 1")
    elif not 1 <= kept <= n_expert:
        wrong.append(
            f"n_expert_per_token is {kept}, but the model has {n_expert} experts; "
            f"choose 1 to {n_expert}"
        )
    for name in ("moe_intermediate_size", "n_shared_expert"):
        value = getattr(config, name)
        if value is not None and value < (name == "moe_intermediate_size"):
            wrong.append(f"{name} is {value}")
    for name in ("n_expert_groups", "n_topk_groups", "n_topk_scores_per_group"):
        if getattr(config, name) is not None:
            wrong.append(f"{MLP_CLASS} chooses among all experts: leave {name} out")
    if config.first_k_dense_replace is not None:
        wrong.append(f"{MLP_CLASS} has no first_k_dense_replace: see hf_config.moe.every")
    return wrong


def _moe_faults(moe: Any, n_layer: int) -> list[str]:
    """Look at `hf_config["moe"]`."""
    if not isinstance(moe, dict):
        return [f"hf_config.moe is {moe!r}; it must be a mapping"]
    known = {field.name: get_type_hints(Settings)[field.name] for field in fields(Settings)}
    wrong = []
    for key, value in moe.items():
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            wrong.append(
                f"hf_config.moe has no key {key!r}"
                + (f", did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}")
            )
        elif key == "every":
            if type(value) is not int or not 1 <= value <= n_layer:
                wrong.append(f"hf_config.moe.every is {value!r}; choose 1 to {n_layer}, the layers")
        elif value not in get_args(known[key]):
            wrong.append(
                f"hf_config.moe.{key} is {value!r}; it can be {', '.join(get_args(known[key]))}"
            )
    return wrong


def has_experts(config: "Config", block_idx: int) -> bool:
    """Tell whether layer `block_idx` (from 0) of a model has experts."""
    if config.mlp_class_name != MLP_CLASS:
        return False
    return (block_idx + 1) % Settings.of(config).every == 0
