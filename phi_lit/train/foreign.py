"""Checkpoint directories that a run takes weights from and did not write: a teacher, a base model.

Here they are looked at before anything is loaded: whether they are whole, and which weights they
hold, wherever the directory lies. Reading them is in `checkpoint.py`.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from phi_lit.errors import UserError
from phi_lit.train import checkpoint
from phi_lit.train.args import raise_together
from phi_lit.train.checkpoint_dir import find_checkpoint_dir, require_checkpoint

_SAMPLE = 1024
"""Numbers of each tensor that enter a digest, from its start and from its end."""


def faults(directory: Path, option: str) -> list[str]:
    """Return why a directory cannot be taken for a whole LitGPT checkpoint, in at most a sentence.

    Args:
        directory: what the user gave.
        option: as what, such as `train.teacher`.
    """
    try:
        require_checkpoint(directory, tokenizer=False)
        if (directory / checkpoint.MANIFEST).is_file():
            checkpoint.read_manifest(directory)
        checkpoint.weights_of(directory)
    except UserError as error:
        return [f"{option}: {error}"]
    return []


def base_checkpoint(given: Path, access_token: str | None) -> Path:
    """Return the directory of a model to finetune, downloaded if it is a model's name on the hub.

    Raises:
        UserError: it is neither, or not whole.
    """
    directory = find_checkpoint_dir(given, access_token)
    raise_together(faults(directory, "checkpoint_dir"))
    return directory


def digest(directory: Path) -> str:
    """Return a name for the weights in a checkpoint, the same for every copy of them.

    It is made of all names, shapes and types and of samples of all tensors, so that a model of any
    size takes no time: two steps of one training differ in every tensor.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(checkpoint.weights_of(directory).items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.flatten()
        for part in (flat[:_SAMPLE], flat[-_SAMPLE:]):
            found.update(_bytes(part))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
