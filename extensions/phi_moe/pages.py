"""Large CPU tensors without the price of fresh memory.

A tensor above glibc's largest threshold (32 MB) is fresh memory from the kernel each time, and the
first touch of its pages costs as much as a tenth of the products that fill it: half of what 64
experts cost beyond their arithmetic was the first touch of their weights' gradients. So memory that
held a gradient is used for the next one once nobody holds that any more.
"""

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

FRESH_BYTES = 32 << 20
"""From here on memory comes from the kernel and goes back to it."""

_kept: list[Tensor] = []  # bytes that gradients lay in, in use or not
_lock = threading.Lock()


def empty_again(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an uninitialised tensor of `like`'s type and device.

    A large one lies where an earlier one from here lay that nobody holds any more.
    """
    size = math.prod(shape) * like.element_size()
    if size < FRESH_BYTES or like.device.type != "cpu" or not hasattr(torch._C, _USE_COUNT):
        return like.new_empty(shape)
    with _lock:
        for block in _kept:
            if block.nbytes == size and not _is_held(block):
                return like.new_empty(0).set_(block.view(like.dtype).untyped_storage(), 0, shape)
        # Whatever else lies about unused belongs to other shapes: a model that is gone.
        _kept[:] = [block for block in _kept if _is_held(block)]
        made = like.new_empty(shape)
        _kept.append(made.detach().view(-1).view(torch.uint8))
        return made


_USE_COUNT = "_storage_Use_Count"


def _is_held(block: Tensor) -> bool:
    """Tell whether any other tensor lies in the memory of `block`."""
    storage = block.untyped_storage()
    return getattr(torch._C, _USE_COUNT)(storage._cdata) > 2  # `block` and `storage` are two
