"""Products of matrices on a CPU, in the faster of the two libraries that PyTorch carries.

float32 products go to MKL by default, which runs at half width (AVX2) on processors that are not
Intel's; oneDNN uses AVX-512 wherever it exists. The choice depends on the processor alone, never on
a timing, so that a run repeats itself to the bit. Half precision goes to oneDNN anyway.
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
