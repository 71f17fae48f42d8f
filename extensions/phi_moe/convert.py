"""The experts' weights in Hugging Face's layout, one tensor per expert, and back, to the bit.

No model of transformers is phi with experts, so the names follow those that exist: as in OLMoE,
Qwen and DeepSeek there is `mlp.gate` and `mlp.experts.3.up_proj`, with phi's `fc1` and `fc2` where
an expert is a GELU MLP. Experts after the MLP are `moe.gate`, `moe.experts.3.fc1` and so on, and
their norm is `post_mlp_layernorm`.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from extensions.phi_moe.settings import Settings

if TYPE_CHECKING:
    from litgpt.config import Config

_OURS = re.compile(
    r"transformer\.h\.(\d+)\.((?:mlp|moe)\.(?:gate|experts|shared_experts)|norm_3)\."
)
_THEIRS = re.compile(
    r"model\.layers\.(\d+)\.((?:mlp|moe)\.(?:gate|experts|shared_experts)|post_mlp_layernorm)\."
)
_SAME = [  # (ours, theirs) of what is one tensor in both
    ("norm_3.", "post_mlp_layernorm."),
    ("gate.weight", "gate.weight"),
    ("gate.selection_bias", "gate.e_score_correction_bias"),
]
_PARTS = {
    "gelu": {"fc": ["fc1"], "proj": ["fc2"]},
    "swiglu": {"fc": ["gate_proj", "up_proj"], "proj": ["down_proj"]},
}
"""Each of our stacks in the hub's names: the first product of a gated expert is two of theirs."""


def copy_to_hub(
    config: "Config",
    state_dict: dict[str, Tensor],
    lit_weights: dict[str, Any],
    saver: Any,
    load: Callable[[Any, str, Any], Tensor],
) -> dict[str, Any]:
    """Put the experts of `lit_weights` into `state_dict` under the hub's names.

    Args:
        config: the model's.
        state_dict: what will be saved.
        lit_weights: LitGPT's tensors by name, perhaps still on disk.
        saver: LitGPT's `incremental_save`, or None.
        load: LitGPT's `load_param`.

    Returns:
        The weights that are not ours to convert.
    """
    activation = Settings.of(config).activation
    for name in filter(_OURS.match, lit_weights):
        for theirs, part in _split(name, load(lit_weights[name], name, None), activation):
            state_dict[theirs] = part if saver is None else saver.store_early(part)
    return {name: value for name, value in lit_weights.items() if not _OURS.match(name)}


def copy_from_hub(
    config: "Config",
    state_dict: dict[str, Tensor],
    hf_weights: dict[str, Any],
    dtype: torch.dtype | None,
    load: Callable[[Any, str, Any], Tensor],
) -> dict[str, Any]:
    """Put the experts of `hf_weights` into `state_dict`, each stack once all its parts are there.

    A model's files come one by one: parts wait in `state_dict` under their own names. Arguments
    and result are those of `copy_to_hub`; `dtype` is what weights are converted to.
    """
    for name in filter(_THEIRS.match, hf_weights):
        keep = "e_score_correction_bias" in name  # float32 whatever the weights are
        state_dict[name] = load(hf_weights[name], name, None if keep else dtype)
    for ours, parts in _wanted(config, list(state_dict)).items():
        if all(name in state_dict for row in parts for name in row):
            rows = [torch.cat([state_dict.pop(name) for name in row]) for row in parts]
            state_dict[ours] = torch.stack(rows) if "experts." in ours else rows[0]
    return {name: value for name, value in hf_weights.items() if not _THEIRS.match(name)}


def _split(name: str, value: Tensor, activation: str) -> list[tuple[str, Tensor]]:
    """Return one of our tensors as (the hub's name, tensor) pairs."""
    name = name.replace("transformer.h.", "model.layers.")
    root, _, path = name.partition("experts.")
    if not path:
        for ours, theirs in _SAME:
            name = name.replace(ours, theirs)
        return [(name, value)]
    stack, leaf = path.split(".")
    names = _PARTS[activation][stack]
    return [
        (f"{root}experts.{expert}.{part}.{leaf}", piece.clone())
        for expert, whole in enumerate(value.unbind(0))
        for part, piece in zip(names, whole.chunk(len(names)), strict=True)
    ]


def _wanted(config: "Config", names: list[str]) -> dict[str, list[list[str]]]:
    """Return which of the hub's tensors make up each of ours that has a part among `names`.

    The outer list is the experts, the inner one the parts of one expert's matrix.
    """
    stacks = _PARTS[Settings.of(config).activation]
    wanted = {}
    for name in filter(_THEIRS.match, names):
        ours = name.replace("model.layers.", "transformer.h.")
        found = re.fullmatch(r"(.*experts)\.\d+\.(\w+)\.(\w+)", ours)
        if not found:
            for mine, theirs in _SAME:
                ours = ours.replace(theirs, mine)
            wanted[ours] = [[name]]
            continue
        root, part, leaf = found.groups()
        stack = next(stack for stack, parts in stacks.items() if part in parts)
        experts = 1 if root.endswith("shared_experts") else config.n_expert
        start = name[: name.index("experts.")]
        wanted[f"{root}.{stack}.{leaf}"] = [
            [f"{start}experts.{expert}.{part}.{leaf}" for part in stacks[stack]]
            for expert in range(experts)
        ]
    return wanted
