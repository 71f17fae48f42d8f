"""Keeping freed memory: on a CPU much of a training step is the first touch of fresh pages.

By default glibc gives every large tensor's memory back to the kernel when it is freed, and the next
step's tensors are fresh pages again, which the kernel fills with zeros. Training frees and takes
the same sizes in every step, so what is kept is what the next step needs: the process is no larger
than at its peak.
"""

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of malloc.h
_KEPT = 2**31 - 1
_PAD = 512 << 20


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the rest of the process.

    Returns:
        Whether it does: only glibc is asked, and only where nobody set its variables.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not Linux, or another C library
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _PAD))
    return all(mallopt(setting, value) == 1 for setting, value in settings)
