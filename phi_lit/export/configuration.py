"""The config.json of an export: the model's own where it came from the hub, else made for it.

Either is held against the weights: transformers builds the model without memory, and its tensors
must be those that are written, name by name and shape by shape.
"""

import json
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config

from phi_lit.errors import UserError
from phi_lit.export.architecture import Words, hub_words, refuse_experts
from phi_lit.export.tokenizer import special_ids
from phi_lit.export.weights import Layout

HUB_CONFIG = "config.json"
DROPPED = ("auto_map", "quantization_config")


def words_for(config: Config, checkpoint_dir: Path) -> Words:
    """Return the config.json in the checkpoint, or one made from LitGPT's configuration.

    A reference to modelling code is dropped: the class that transformers itself has under that name
    is used, and code from a checkpoint never runs. So is how the base model was quantized: ours is
    not.

    Raises:
        UserError: no architecture of transformers computes the model, or the file is broken.
    """
    refuse_experts(config)
    path = checkpoint_dir / HUB_CONFIG
    if not path.is_file():
        return hub_words(config)
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        return {name: value for name, value in words.items() if name not in DROPPED}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is broken JSON ({error}); restore or remove it") from error


def checkpoint_words(config: Config, base_dir: Path | None, tokenizer_dir: Path | None) -> Words:
    """Return a config.json to lie in a LitGPT checkpoint directory, for other programs to read.

    Args:
        config: the model.
        base_dir: the checkpoint it was trained from, whose config.json is used if it has one.
        tokenizer_dir: where the special tokens' ids are read from.

    Raises:
        UserError: no architecture of transformers computes the model.
    """
    words = words_for(config, base_dir) if base_dir else hub_words(config)
    if "vocab_size" in words:
        words["vocab_size"] = config.padded_vocab_size
    for name, value in special_ids(tokenizer_dir).items() if tokenizer_dir else ():
        words.setdefault(name, value)
    return words


def configure(words: Words, layout: Layout, special: dict[str, int | None]) -> Any:
    """Return transformers' configuration object for the weights that are written.

    Args:
        words: the contents of a config.json.
        layout: what is written: decides vocabulary size, tied embeddings and data type.
        special: ids of the tokenizer's special tokens, under config.json's names.

    Raises:
        UserError: transformers knows no such model, or its tensors are not those of `layout`.
    """
    from transformers import CONFIG_MAPPING

    kind = words.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"config.json says model_type {kind!r}, which this transformers does not have; "
            "upgrade it, or export with the config.json of a model that it has"
        )
    known = {k: v for k, v in words.items() if k not in ("model_type", "torch_dtype", "dtype")}
    hub = CONFIG_MAPPING[kind].from_dict(known).get_text_config()
    hub.vocab_size = layout.config.padded_vocab_size
    hub.tie_word_embeddings = layout.tied
    hub.dtype = next(iter(layout.tensors.values())).dtype
    for name, value in special.items():
        if words.get(name) is None:  # else they are the model's own, of which it may have several
            setattr(hub, name, value)
    hub.architectures = [_check_tensors(hub, layout)]
    return hub


def _check_tensors(hub: Any, layout: Layout) -> str:
    """Hold transformers' own tensors against the layout's; return the name of the class."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hub)
    name = type(model).__name__
    if layout.config.mlp_class_name == "LLaMAMoE":  # transformers regroups experts as it loads
        return name
    wanted = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in layout.tensors.items()}
    if layout.tied:
        wanted = {key: shape for key, shape in wanted.items() if key in given or "head" not in key}
    faults = [f"{key} is missing" for key in wanted.keys() - given.keys()]
    faults += [f"{key} has no place there" for key in given.keys() - wanted.keys()]
    faults += [
        f"{key} is {given[key]}, there {wanted[key]}"
        for key in given.keys() & wanted.keys()
        if given[key] != wanted[key]
    ]
    if faults:
        raise UserError(
            f"the weights do not fit transformers' {name} under this config.json: "
            f"{sorted(faults)[0]} ({len(faults)} such differences). If config.json in the "
            "checkpoint directory is another model's, remove it"
        )
    return name
