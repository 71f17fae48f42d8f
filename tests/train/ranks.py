"""Ranks as forked processes over gloo: a training on two of them starts in no time.

`test_distributed.py` has the command itself start its processes; here they start themselves, as
under torchrun or SLURM, which costs seconds less for each of many runs.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runs import pretrain


def train_on_ranks(arguments: dict[str, Any], world: int = 2) -> list[tuple[int, str]]:
    """Run a training on `world` processes; returns each one's (exit code, what it said)."""
    import phi_lit.train.launch  # noqa: F401  (imported before the forks)

    arguments = {**arguments, "devices": world}
    return on_ranks(lambda: pretrain(arguments), Path(arguments["out_dir"]), world)


def on_ranks(action: Callable[[], None], said: Path, world: int = 2) -> list[tuple[int, str]]:
    """Do something on `world` processes that find each other; returns (exit code, output) of each.

    Their output lies beside `said`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
        "NODE_RANK": "0",
    }  # fmt: skip
    files = [said.with_name(f"{said.name}-rank{rank}.txt") for rank in range(world)]
    children = [
        forked(action, {**environment, "LOCAL_RANK": str(rank)}, file)
        for rank, file in enumerate(files)
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [(code, file.read_text()) for code, file in zip(codes, files, strict=True)]


def forked(action: Callable[[], None], environment: dict[str, str], said: Path) -> int:
    """Fork a process that does something with its output in a file; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(environment)
        with open(said, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        action()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException as error:
        sys.excepthook(type(error), error, None)
        if not isinstance(error, ValueError):
            traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
