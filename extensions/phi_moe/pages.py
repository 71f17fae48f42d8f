"""Large CPU tensors on large pages.

A tensor above glibc's largest threshold (32 MB) is fresh memory from the kernel each time, and the
first touch of its 4 KB pages costs as much as a tenth of the products that fill it: the weight
gradients of 64 experts took 118 ms that way and take 26 ms on pages of 2 MB. Linux gives those to
memory that asks for them (`madvise`), which is what happens here and changes nothing else.
"""

import ctypes
import mmap
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

_FRESH_BYTES = 32 << 20
_MADV_HUGEPAGE = 14


@cache
def _madvise():  # type: ignore[no-untyped-def]
    """Return libc's madvise, or None where there is none (it is Linux's)."""
    try:
        return ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None
    except (OSError, AttributeError):
        return None


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor on `like`'s device, of its type where none is given."""
    made = like.new_empty(shape, dtype=dtype)
    if made.nbytes >= _FRESH_BYTES and made.device.type == "cpu" and _madvise():
        page = mmap.PAGESIZE
        start = -(-made.data_ptr() // page) * page
        length = (made.data_ptr() + made.nbytes - start) // page * page
        _madvise()(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return made
