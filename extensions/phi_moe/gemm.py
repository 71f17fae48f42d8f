"""Products of matrices on a CPU, in the faster of the two libraries that PyTorch carries.

float32 products go to MKL by default, which runs at half width (AVX2) on processors that are not
Intel's; oneDNN uses AVX-512 wherever it exists: twice as fast on Zen 5, 1.15 times on Zen 4. The
choice depends on the processor alone, never on a timing, so that a run repeats itself to the bit.
Half precision goes to oneDNN anyway. The head of phi_lit's training multiplies here too.
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


@cache
def rows_to_copy_from() -> float:
    """Rows from which a float32 weight's gradient is made sooner in oneDNN and then copied.

    Only where AVX-512 is as wide as its name (AMD from family 26, Zen 5, on); where the processor
    takes two halves, writing in place with MKL is 1.25 times as fast at any number of rows.
    """
    if not prefers_onednn():
        return float("inf")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    family = next((line.partition(":")[2] for line in lines if line.startswith("cpu family")), "0")
    return 512 if int(family) >= 26 else float("inf")


def product(x_NK: Tensor, weight_MK: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` (N, M), without a gradient; `weight` may be a transpose."""
    if x_NK.dtype == torch.float32 and x_NK.device.type == "cpu" and prefers_onednn():
        return torch.ops.mkldnn._linear_pointwise(x_NK, weight_MK, bias_M, "none", [], "")
    if bias_M is None:
        return torch.mm(x_NK, weight_MK.t())
    return torch.addmm(bias_M, x_NK, weight_MK.t())
