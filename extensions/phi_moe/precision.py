"""What autocast means for operations that it does not know."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cast(x: Tensor) -> Tensor:
    """Return `x` in the type that autocast wants products in; unchanged outside of autocast."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def as_given(x: Tensor) -> AbstractContextManager:
    """Return a context in which products are computed in the types of their factors."""
    device = x.device.type
    if torch.amp.is_autocast_available(device):  # not on the meta device
        return torch.autocast(device, enabled=False)
    return nullcontext()
