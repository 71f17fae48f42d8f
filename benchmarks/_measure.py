"""Measuring side by side: every contestant gets a turn in every round, and ratios are per round.

A machine's speed drifts, so a time alone says little; the ratio of two turns taken one after the
other says a lot, and the median over many rounds says more. Contestants live in processes of their
own, so that none inherits another's memory, caches or compiled code.
"""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise

TUNED_MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "536870912",
}
"""glibc settings that keep freed pages: on a CPU much of a training step is page faults."""


def arguments(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """Make a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="turns per contestant")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--only", nargs="*", help="run only the contestants with these words in")
    parser.add_argument(
        "--malloc", choices=("default", "tuned"), default="default",
        help="tuned: all contestants keep freed pages (glibc only)",
    )  # fmt: skip
    return parser


def machine(threads: int) -> dict[str, Any]:
    """Describe what the figures were measured on."""
    import torch

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        said: dict[str, str] = {}  # virtual machines hide the model's name, not its generation
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            said.setdefault(key.strip(), value.strip())
        name = said.get("model name", name)
        if "cpu family" in said:
            name += f" (family {said['cpu family']}, model {said.get('model')})"
    described = {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": threads,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def print_header(title: str, about: dict[str, Any]) -> None:
    """Print the title and the machine as one Markdown paragraph."""
    print(f"\n## {title}\n")
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)


@dataclass
class Turn:
    """What a contestant's process answers to one command."""

    seconds: float
    value: Any = None


@dataclass
class Contestant:
    """Something to measure, built and run in a process of its own.

    `build` is a module-level function; it gets `options` and returns a function without arguments,
    one call of which is one turn. What that returns must be picklable and small.
    """

    name: str
    build: Callable[..., Callable[[], Any]]
    options: dict[str, Any] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None

    def start(self, threads: int, environment: dict[str, str]) -> None:
        """Start the process, build, and take a first turn, which is timed as `start_seconds`."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = {key: os.environ.get(key) for key in environment}
        os.environ.update(environment)
        try:
            self._process = context.Process(
                target=_serve, args=(theirs, self.build, self.options, threads), daemon=True
            )
            self._process.start()
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
        theirs.close()
        answer = self._receive()
        if answer is not None:
            self.figures["start_seconds"] = answer.seconds
            self.figures["first"] = answer.value

    def turn(self, command: str = "turn") -> Turn | None:
        """Take a turn; None once the contestant has failed."""
        if self.failed is not None:
            return None
        self._pipe.send(command)
        return self._receive()

    def stop(self) -> None:
        """End the process."""
        if self.failed is None:
            self._pipe.send("stop")
            self._process.join(30)
        if self._process.is_alive():
            self._process.terminate()

    def _receive(self) -> Turn | None:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self.failed = "its process died (out of memory?)"
            return None
        if isinstance(answer, str):
            self.failed = answer
            return None
        return answer


def _serve(pipe: Any, build: Callable[..., Any], options: dict[str, Any], threads: int) -> None:
    """Answer commands until "stop"; runs in the contestant's process."""
    import torch

    torch.set_num_threads(threads)
    try:
        began = time.perf_counter()
        run = build(**options)
        value = run()
        pipe.send(Turn(time.perf_counter() - began, value))
        while (command := pipe.recv()) != "stop":
            if command == "memory":
                pipe.send(Turn(0.0, exact_memory(run)))
                continue
            began = time.perf_counter()
            value = run()
            pipe.send(Turn(time.perf_counter() - began, value))
    except Exception as error:  # the parent prints it in the table's row, the others go on
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def exact_memory(run: Callable[[], Any]) -> dict[str, float]:
    """Return MB (1e6 bytes) of one call: allocator-exact, and the process's peak so far.

    `held` is what tensors hold before the call, `peak` the most they hold during it, `process` the
    highest resident size of the process since its start.
    """
    held = held_bytes()
    peak = held + peak_of(run)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return {"held": held / 1e6, "peak": peak / 1e6, "process": resident / 1e6}


def held_bytes() -> int:
    """Return the bytes of all tensor storages that Python can see."""
    import torch

    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type != "meta":
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def peak_of(run: Callable[[], Any]) -> int:
    """Return the most bytes that `run` holds beyond what was held before, by allocator events."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = highest = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        highest = max(highest, now)
    return highest


def compete(
    contestants: Sequence[Contestant],
    *,
    rounds: int,
    threads: int,
    malloc: str = "default",
    memory: bool = True,
) -> None:
    """Give every contestant `rounds` turns, one after the other in every round, then its memory.

    `memory=False` leaves the last out, for turns too long to be profiled.
    """
    environment = TUNED_MALLOC if malloc == "tuned" else {}
    for contestant in contestants:
        contestant.start(threads, environment)
        said = contestant.failed or f"started in {contestant.figures['start_seconds']:.1f} s"
        print(f"  {contestant.name}: {said}", file=sys.stderr, flush=True)
    for number in range(rounds + 1):
        for contestant in contestants:
            turn = contestant.turn()
            if turn is not None and number:  # round 0 warms up
                contestant.times.append(turn.seconds)
    for contestant in contestants:
        held = contestant.turn("memory") if memory else None
        if held is not None:
            contestant.figures["memory"] = held.value
        contestant.stop()


def ratio(baseline: Contestant, contestant: Contestant) -> float | None:
    """Return how many times as fast as `baseline`: the median over rounds."""
    if not (baseline.times and contestant.times):
        return None
    pairs = zip(baseline.times, contestant.times, strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def median(values: Iterable[float]) -> float | None:
    """Return the median, or None for nothing."""
    values = list(values)
    return statistics.median(values) if values else None


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a Markdown table; floats with three figures, None as a dash."""
    print("\n| " + " | ".join(columns) + " |")
    print("|" + "|".join(["---"] + ["---:"] * (len(columns) - 1)) + "|")
    for row in rows:
        print("| " + " | ".join(_cell(value) for value in row) + " |")
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write the figures, if a file was asked for."""
    if path is not None:
        path.write_text(json.dumps(content, indent=2) + "\n")


def chosen(contestants: Iterable[Contestant], words: Sequence[str] | None) -> list[Contestant]:
    """Keep the contestants with any of `words` in their names; all without words."""
    return [c for c in contestants if not words or any(word in c.name for word in words)]
