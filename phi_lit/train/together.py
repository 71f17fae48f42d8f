"""What ranks do side by side where each may fail by itself, such as writing to a full disk.

A rank that raises alone leaves the others waiting for it in their next exchange. Here they hear of
it and end with it, and one line is printed rather than one per rank.
"""

from collections.abc import Callable

import torch
from lightning import Fabric


def together(fabric: Fabric, action: Callable[[], None] | None) -> None:
    """Do this rank's part, if it has one, and wait for the others.

    Raises:
        Exception: what this rank's part raised, on the first rank whose part did.
        SystemExit: another rank's part raised; it says why.
    """
    failure: Exception | None = None
    if action is not None:
        try:
            action()
        except Exception as error:
            failure = error
    rank, world = fabric.global_rank, fabric.world_size
    first = rank if failure is not None else world
    if world > 1:
        counted = torch.tensor(float(world - first), device=fabric.device)
        first = world - int(fabric.all_reduce(counted, reduce_op="max"))
    if first == rank and failure is not None:
        raise failure
    if first < world:
        raise SystemExit(rank == 0)  # the launcher waits for rank 0's code only
