"""Everything that needs a GPU, in one run: tests, speed, memory, a short training.

    python benchmarks/gpu.py --quick                # about 8 minutes on one H100
    python benchmarks/gpu.py                        # every size and variant
    python benchmarks/gpu.py --device cpu --quick   # the same code with a toy, in seconds

Each measurement runs in a process of its own with a time limit, so that running out of memory ends
that one only. What was measured is kept in `results.json` of the output directory and not measured
again by the next run there; `results.md` is the table.

A measured step is `--accumulate` forward and backward passes, clipping, and fused AdamW, with
random ids; all contestants get the same, under the same Fabric precision. Tokens/s are the median
over steps. MFU is counted both as 6N and as 6N + 12LdT of the dense data-sheet peak.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from one_gpu.apart import measure_apart, measure_here, run_tests, run_training, serve
from one_gpu.book import Book, about, table
from one_gpu.cases import cases, sizes

SECTIONS = ("tests", "kernels", "speed", "train")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="fewer variants and sizes")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="output directory")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--models", nargs="+", default=None, help="phi-1 phi1-small by default")
    parser.add_argument("--only", default="", help="speed cases whose name contains this")
    parser.add_argument("--sizes", nargs="+", type=int, help="micro-batch sizes instead of ours")
    parser.add_argument("--fp8", action="store_true", help="our side with torchao's float8 too")
    parser.add_argument("--steps", type=int, help="timed steps per measurement")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches per step")
    parser.add_argument("--limit", type=float, help="seconds per measurement")
    parser.add_argument(
        "--budget", type=float, help="seconds in all (quick: 480); the next run does the rest"
    )
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.models = options.models or (
        ["phi1-test"] if options.device == "cpu" else ["phi-1", "phi1-small"]
    )
    options.steps = options.steps or (2 if options.device == "cpu" else 6 if options.quick else 10)
    options.limit = options.limit or (120.0 if options.quick else 600.0)
    options.budget = options.budget or (480.0 if options.quick else None)
    options.out = options.out.resolve()
    return options


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run the sections that are asked for and return all results."""
    options = parse(argv)
    if options.task:
        serve(json.loads(options.task))
        return {}
    began = time.monotonic()
    book = Book(options.out)
    book.write("about", about(options.device))
    for key, measure in plan_sections(options):
        if key in book and not options.again and "error" not in book.results[key]:
            continue
        reserve = 100 if key.startswith("speed") and "train" in options.sections else 0
        if options.budget and time.monotonic() - began > options.budget - reserve:
            print(f"skipped, the budget is spent: {key}", flush=True)
            continue
        print(f"[{time.monotonic() - began:5.0f} s] {key}", flush=True)
        book.write(key, measure())
        (options.out / "results.md").write_text(table(book.results))
    print(table(book.results))
    return book.results


def plan_sections(
    options: argparse.Namespace,
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield what there is to do, in order: a key of the results and what measures it."""

    def measure(task: dict[str, Any]) -> dict[str, Any]:
        return measure_here(task) if options.here else measure_apart(task, options.limit)

    if "tests" in options.sections:
        yield "tests", lambda: run_tests(2 * options.limit)
    if "kernels" in options.sections:
        task = {"kind": "kernels", "device": options.device, "quick": options.quick}
        yield "kernels", lambda: measure(task)
    compiled = options.device == "cuda"
    listed = cases(options.models, quick=options.quick, fp8=options.fp8, compiled=compiled)
    for case in listed if "speed" in options.sections else ():
        if options.only not in case.key:
            continue
        asked = {
            "kind": "speed",
            "case": asdict(case),
            "device": options.device,
            "sizes": options.sizes or sizes(case.model, quick=options.quick),
            "steps": options.steps,
            "accumulate": options.accumulate,
        }

        def contest(asked: dict[str, Any] = asked) -> dict[str, Any]:
            return {"case": asked["case"], **measure(asked)}

        yield f"speed {case.key}", contest
    if "train" in options.sections:
        model = options.models[-1]
        steps = 4 if options.device == "cpu" else 60 if options.quick else 300
        yield (
            f"train {model}",
            lambda: run_training(options.device, model, steps, options.out, 3 * options.limit),
        )


if __name__ == "__main__":
    main()
