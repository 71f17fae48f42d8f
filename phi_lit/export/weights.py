"""LitGPT's weights under the hub's names, written as safetensors without a second copy in memory.

The renaming is LitGPT's own (`convert_lit_checkpoint`). It runs on the memory-mapped checkpoint, so
that for most models every tensor stays a view of the file until safetensors writes it; what has to
be rearranged or cast exists for one output file at a time.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from litgpt.config import Config
from torch import Tensor

from phi_lit.errors import UserError
from phi_lit.export.architecture import RETIED_ON_THE_WAY_BACK, weight_map
from phi_lit.progress import progress

INDEX = "model.safetensors.index.json"


def hub_weights(config: Config, lit: dict[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Return some of a model's tensors under the hub's names (views where nothing is rearranged).

    Args:
        config: the model.
        lit: LitGPT's tensors, all of a layer's or none of them.
        tied: leave out the head where the way back makes it from the embedding.
    """
    from litgpt.scripts import convert_lit_checkpoint as convert

    hub: dict[str, Tensor] = {}
    name = weight_map(config)
    options = {"untie_weights": tied} if name in RETIED_ON_THE_WAY_BACK else {}
    with torch.inference_mode():
        getattr(convert, f"copy_weights_{name}")(config, hub, lit, **options)
    return hub


def is_tied(config: Config, lit: dict[str, Tensor]) -> bool:
    """Tell whether head and embedding go into the export as one matrix.

    They do where every value is equal and LitGPT makes the head anew on the way back. Finetuning
    lets the two drift apart in LitGPT, whatever the config.json of the base model says.
    """
    embedding, head = lit["transformer.wte.weight"], lit["lm_head.weight"]
    return weight_map(config) in RETIED_ON_THE_WAY_BACK and torch.equal(embedding, head)


@dataclass(frozen=True)
class Layout:
    """Which tensors go into which files."""

    config: Config
    lit: dict[str, Tensor]
    """The checkpoint's tensors by LitGPT's names, memory-mapped."""
    dtype: torch.dtype | None
    """What to write floating-point tensors as; None keeps each as it is."""
    tied: bool
    """Whether head and embedding are written as one matrix."""
    tensors: dict[str, Tensor]
    """Every tensor's shape and final type under its hub name, without data."""
    files: dict[str, list[str]]
    """Hub names by file name."""

    @property
    def bytes(self) -> int:
        """Size of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def plan(
    config: Config, lit: dict[str, Tensor], *, dtype: torch.dtype | None, max_shard_size: str
) -> Layout:
    """Name every tensor and deal the tensors to files.

    Args:
        config: the model.
        lit: its tensors, by LitGPT's names.
        dtype: what to write floating-point tensors as; None keeps each as it is.
        max_shard_size: the largest file, such as "5GB"; a tensor is never split.

    Raises:
        UserError: a tensor has a name that LitGPT's converter does not know.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in lit.items()}
    tied = is_tied(config, lit)
    try:
        found = hub_weights(config, shapes, tied=tied)
    except (KeyError, NotImplementedError) as error:
        raise UserError(
            f"LitGPT's converter knows no place for {error} in a model named {config.name}"
        ) from error
    # New ones: a view would be counted with the size of the whole tensor it is a part of.
    tensors = {
        name: torch.empty(tensor.shape, dtype=_final(tensor, dtype), device="meta")
        for name, tensor in found.items()
    }
    try:
        split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(
            f"max_shard_size is {max_shard_size!r}; give a size such as 500MB or 5GB"
        ) from error
    return Layout(config, lit, dtype, tied, tensors, split.filename_to_tensors)


def _final(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def write(layout: Layout, directory: Path) -> None:
    """Write the weights' files, and the index where there are several.

    Raises:
        OSError: the disk refuses.
    """
    from safetensors.torch import save_file

    with progress(layout.bytes, "export", "bytes") as shown:
        for file, names in layout.files.items():
            tensors = _materialize(layout, names)
            path = directory / file
            path.touch()
            mode = path.stat().st_mode
            _disk(partial(save_file, tensors, path, {"format": "pt"}))
            path.chmod(mode)  # safetensors makes files that only their owner can read
            shown.update(sum(tensor.nbytes for tensor in tensors.values()))
    if len(layout.files) > 1:
        index = {
            "metadata": {"total_size": layout.bytes},
            "weight_map": {name: file for file, names in layout.files.items() for name in names},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _materialize(layout: Layout, names: list[str]) -> dict[str, Tensor]:
    """Return the tensors of one file, from only those layers that it holds a part of."""
    layers = {_layer(name) for name in names}
    part = {name: tensor for name, tensor in layout.lit.items() if _layer(name) in layers}
    found = hub_weights(layout.config, part, tied=layout.tied)
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensor = found[name].to(layout.tensors[name].dtype).contiguous()
        shared = {other.data_ptr() for other in tensors.values()}
        tensors[name] = tensor.clone() if tensor.data_ptr() in shared else tensor
    return tensors


def _layer(name: str) -> str | None:
    """Return the number of the layer that a tensor belongs to, under either's name for it."""
    number = re.search(r"\.(?:h|layers)\.(\d+)\.", name)
    return number[1] if number else None


def _disk(save: Callable[[], Any]) -> None:
    """Save, and say what the disk said as an OSError (safetensors has an exception of its own)."""
    from safetensors import SafetensorError

    try:
        save()
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), str(error)) from error
