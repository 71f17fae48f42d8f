"""Which library multiplies float32 matrices on this CPU.

PyTorch gives float32 products to MKL, which runs at half width (AVX2) on processors that are not
Intel's. oneDNN, which PyTorch also carries, uses AVX-512 wherever it exists: 1.3 to 2 times as fast
on an AMD EPYC 9005, the more so the larger the inner dimension. The choice is a pure function of
the processor, never a timing, so that a resumed run multiplies as the interrupted one did.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def prefers_onednn() -> bool:
    """Whether float32 products are faster in oneDNN: AVX-512 on a processor not made by Intel."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "GenuineIntel" not in cpuinfo.read_text()
    )


def product(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` (N, M), without a gradient; `weight` may be a transpose."""
    if x_NK.dtype == torch.float32 and x_NK.device.type == "cpu" and prefers_onednn():
        return torch.ops.mkldnn._linear_pointwise(x_NK, weight_MK, bias_M, "none", [], "")
    if bias_M is None:
        return torch.mm(x_NK, weight_MK.t())
    return torch.addmm(bias_M, x_NK, weight_MK.t())
