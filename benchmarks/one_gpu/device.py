"""The device under `gpu.py`: its queue, its memory, and running out of it."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any


def time_of(once: Callable[[], None], device: Any, runs: int = 8) -> float:
    """Return the median seconds of a call, after two to warm up."""
    times = []
    for number in range(runs + 2):
        synchronize(device)
        before = time.perf_counter()
        once()
        synchronize(device)
        if number >= 2:
            times.append(time.perf_counter() - before)
    return statistics.median(times)


def synchronize(device: Any) -> None:
    """Wait for the device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: Any) -> None:
    """Start measuring peak memory anew."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: Any) -> dict[str, float]:
    """Return peak memory in GB (1e9): in tensors, and reserved; of the process on a CPU."""
    import psutil
    import torch

    if device.type == "cuda":
        return {
            "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
        }
    return {"peak_gb": psutil.Process().memory_info().rss / 1e9}


def clean_up() -> None:
    """Let go of models, compiled code and cached memory."""
    import torch

    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error, or what caused it, is the device's memory running out."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__name__ == "OutOfMemoryError" or "out of memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def one_line(error: BaseException) -> str:
    """Return an error as one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
