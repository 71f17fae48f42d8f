"""Runs a training again and again, killing it each time, until it is told to let it finish.

`python killing.py CONFIG SEED KILLS` imports everything once and forks a process per attempt, so
that many real SIGKILLs cost seconds. Between kills, the next attempt resumes by itself (`resume:
auto`). Prints where each kill hit, as JSON lines.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import yaml


def main(config: str, seed: int, kills: int) -> None:
    """Kill `kills` attempts at random moments (some as soon as a save is seen), then let one
    end."""
    import litgpt.pretrain  # noqa: F401  (imported before the forks)

    import phi_lit.train.launch  # noqa: F401

    torch.set_num_threads(1)
    arguments = yaml.safe_load(Path(config).read_text())
    out_dir = Path(arguments["out_dir"])
    chance = random.Random(seed)
    for number in range(kills):
        pid = attempt(config)
        began = time.monotonic()
        delay = chance.uniform(0.05, 1.2)
        in_a_save = number % 3 == 0
        before = steps(out_dir)
        while not done(pid):
            seconds = time.monotonic() - began
            hit = saving(out_dir, pid) if in_a_save else progressed(out_dir, before, chance)
            if hit or seconds > 20 + delay:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
            time.sleep(0.001)
        else:
            break
        print(json.dumps({"steps": steps(out_dir), "in_a_save": saving(out_dir, pid)}), flush=True)
    pid = attempt(config)
    _, status = os.waitpid(pid, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


def attempt(config: str) -> int:
    """Fork a process that runs the training; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        from jsonargparse import CLI
        from litgpt.pretrain import setup

        CLI(setup, args=["--config", config])
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(status)


def done(pid: int) -> bool:
    """Tell whether the process has ended by itself."""
    return os.waitpid(pid, os.WNOHANG)[0] != 0


def steps(out_dir: Path) -> int:
    """Return how many optimizer steps the record has."""
    record = out_dir / "metrics.jsonl"
    return record.read_text().count('"loss"') if record.is_file() else 0


def saving(out_dir: Path, pid: int) -> bool:
    """Tell whether this attempt has a checkpoint half written at this moment."""
    return any(out_dir.glob(f".step-*.partial-{pid}"))


def progressed(out_dir: Path, before: int, chance: random.Random) -> bool:
    """Tell, at random, to kill a process that has done a few steps."""
    return steps(out_dir) > before and chance.random() < 0.01


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
