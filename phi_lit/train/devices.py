"""What a device can do: dense matmul peak by number format, and memory.

The table holds vendors' data-sheet figures **without** structured sparsity (data sheets print twice
as much beside a footnote) and with float32 accumulation; torch's own helpers mix the two kinds for
some cards, which halves or doubles an MFU. A CPU, a slice of a GPU or a card not listed is measured
instead: the best of large matmuls in about 0.3 seconds.
"""

import time
from dataclasses import dataclass
from functools import lru_cache

import torch

from phi_lit.errors import UserError, did_you_mean

_TERA = 1e12
_HOPPER = "NVIDIA H100 data sheet and H100 architecture white paper, dense"
_H200 = "NVIDIA H200 data sheet, dense"
_BLACKWELL = "NVIDIA HGX B200 data sheet, dense"
_A100 = "NVIDIA A100 data sheet, dense"
_ADA = "NVIDIA Ada architecture white paper and data sheets, dense"
_AMPERE = "NVIDIA GA102 architecture white paper and data sheets, dense"


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Peaks are dense TFLOP/s; None where the format is not supported."""

    name: str
    memory_gib: float
    """What torch reports as total memory, which is a little under the number on the box."""
    bf16: float | None
    fp16: float
    fp32: float
    tf32: float | None
    fp8: float | None
    source: str

    def peak(self, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
        """Dense FLOP/s for matmuls of `dtype`, or None where it is not supported.

        Args:
            dtype: the matmuls' operands.
            tf32: float32 matmuls are allowed to round to TF32.
        """
        by_dtype = {
            torch.float32: self.tf32 if tf32 and self.tf32 else self.fp32,
            torch.bfloat16: self.bf16,
            torch.float16: self.fp16,
            torch.float8_e4m3fn: self.fp8,
            torch.float8_e5m2: self.fp8,
        }
        tera = by_dtype.get(dtype)
        return None if tera is None else tera * _TERA


#                    name          GiB    bf16   fp16   fp32   tf32   fp8
GPUS: dict[str, Gpu] = {
    "a100": Gpu("A100 80 GB", 79.2, 312, 312, 19.5, 156, None, _A100),
    "a100-40": Gpu("A100 40 GB", 39.4, 312, 312, 19.5, 156, None, _A100),
    "h100": Gpu("H100 SXM 80 GB", 79.1, 989.4, 989.4, 66.9, 494.7, 1978.9, _HOPPER),
    "h100-pcie": Gpu("H100 PCIe 80 GB", 79.1, 756, 756, 51.2, 378, 1513, _HOPPER),
    "h100-nvl": Gpu("H100 NVL 94 GB", 93.1, 835.5, 835.5, 60, 417.5, 1671, _HOPPER),
    "h200": Gpu("H200 SXM 141 GB", 139.8, 989.4, 989.4, 66.9, 494.7, 1978.9, _H200),
    "h200-nvl": Gpu("H200 NVL 141 GB", 139.8, 835.5, 835.5, 60, 417.5, 1671, _H200),
    "gh200": Gpu("GH200 96 GB", 94.5, 989.4, 989.4, 66.9, 494.7, 1978.9, _HOPPER),
    "b200": Gpu("B200 180 GB", 178.0, 2250, 2250, 75, 1125, 4500, _BLACKWELL),
    "l4": Gpu("L4 24 GB", 22.0, 121, 121, 30.3, 60, 242, _ADA),
    "l40s": Gpu("L40S 48 GB", 44.4, 362, 362, 91.6, 183, 733, _ADA),
    "rtx4090": Gpu("RTX 4090 24 GB", 23.5, 165.2, 165.2, 82.6, 82.6, 330.3, _ADA),
    "rtx6000-ada": Gpu("RTX 6000 Ada 48 GB", 47.4, 364.2, 364.2, 91.1, 182.1, 728.5, _ADA),
    "rtx3090": Gpu("RTX 3090 24 GB", 23.6, 71, 71, 35.6, 35.6, None, _AMPERE),
    "a6000": Gpu("RTX A6000 48 GB", 47.4, 154.8, 154.8, 38.7, 77.4, None, _AMPERE),
    "a40": Gpu("A40 48 GB", 44.4, 149.7, 149.7, 37.4, 74.8, None, _AMPERE),
    "a10": Gpu("A10 24 GB", 22.0, 125, 125, 31.2, 62.5, None, _AMPERE),
    "a10g": Gpu("A10G 24 GB", 22.0, 70, 70, 35, 35, None, _AMPERE),
    "v100": Gpu("V100 SXM2 32 GB", 31.7, None, 125, 15.7, None, None, "NVIDIA V100 data sheet"),
    "v100-16": Gpu("V100 SXM2 16 GB", 15.8, None, 125, 15.7, None, None, "NVIDIA V100 data sheet"),
    "t4": Gpu("T4 16 GB", 14.6, None, 65, 8.1, None, None, "NVIDIA T4 data sheet"),
}
"""GPUs by the short name that `phi-lit plan --gpu` takes."""

# What a driver calls the card, in the order of looking: the first whose words are all there wins.
_REPORTED: tuple[tuple[str, str], ...] = (
    ("gh200", "gh200"),
    ("h200 nvl", "h200-nvl"),
    ("h200", "h200"),
    ("h100 nvl", "h100-nvl"),
    ("h100 pcie", "h100-pcie"),
    ("h100 80gb hbm2e", "h100-pcie"),
    ("h100", "h100"),
    ("b200", "b200"),
    ("a100 40gb", "a100-40"),
    ("a100", "a100"),
    ("l40s", "l40s"),
    ("l4", "l4"),
    ("4090", "rtx4090"),
    ("6000 ada", "rtx6000-ada"),
    ("3090", "rtx3090"),
    ("a6000", "a6000"),
    ("a40", "a40"),
    ("a10g", "a10g"),
    ("a10", "a10"),
    ("v100 sxm2 16gb", "v100-16"),
    ("v100 sxm2", "v100"),
    ("t4", "t4"),
)


def gpu_named(name: str) -> Gpu:
    """Return the GPU of a short name such as "h100" (case and punctuation do not matter).

    Raises:
        UserError: no such GPU in the table.
    """
    folded = _fold(name)
    for key, gpu in GPUS.items():
        if folded in (_fold(key), _fold(gpu.name)):
            return gpu
    raise UserError(
        f"unknown GPU {name!r}.{did_you_mean(name, GPUS)} Known: {', '.join(GPUS)}, "
        "and cpu (measures this machine)."
    )


def gpu_reported(name: str) -> Gpu | None:
    """Return the GPU that a driver reports as `name`, such as "NVIDIA H100 80GB HBM3", or None.

    A slice of a card ("MIG 1g.10gb") has a fraction of its peak and memory: None.
    """
    words = name.lower().replace("-", " ").split()
    if "mig" in words:
        return None
    for pattern, key in _REPORTED:
        if all(word in words for word in pattern.split()):
            return GPUS[key]
    return None


def arithmetic_of(precision: str) -> torch.dtype:
    """Return the dtype of the matrix products under a precision."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32


def peak_for(device: torch.device, dtype: torch.dtype) -> float:
    """Dense matmul peak of a device in FLOP/s: the table's figure, or else measured.

    Args:
        device: where the matmuls run.
        dtype: their operands; float32 counts as TF32 where torch is set to use it.
    """
    if device.type == "cuda":
        gpu = gpu_reported(torch.cuda.get_device_name(device))
        allowed = torch.backends.cuda.matmul.allow_tf32
        peak = None if gpu is None else gpu.peak(dtype, tf32=allowed)
        if peak is not None:
            return peak
    return measure_peak(dtype, device)


def measure_peak(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Best FLOP/s of square matmuls on this device in about 0.3 seconds; measured once a process.

    Args:
        dtype: of both operands.
        device: where; on the CPU the number of threads is torch's own at the time.
    """
    return _measure(dtype, torch.device(device), torch.get_num_threads())


@lru_cache(maxsize=32)
def _measure(dtype: torch.dtype, device: torch.device, threads: int) -> float:
    best, start = 0.0, time.perf_counter()
    for size in (512, 1024, 2048) if device.type == "cpu" else (4096, 8192):
        if time.perf_counter() - start < 0.25:  # a slow device has shown enough by then
            best = max(best, _best_rate(size, dtype, device, 0.1))
    return best


def _best_rate(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    """Best FLOP/s of `size` x `size` matmuls within a time budget (two at least)."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)  # warm-up: picks the kernel, touches the pages
    _wait(device)
    best, start, runs = 0.0, time.perf_counter(), 0
    while runs < 2 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = max(best, 2.0 * size**3 / (time.perf_counter() - before))
        runs += 1
    return best


def _wait(device: torch.device) -> None:
    """Wait for the device's queue: without it only the launch would be timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _fold(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
