"""Experts on one GPU: our layer beside the dense MLP of equal active FLOPs and LitGPT's loop.

Forward and backward of one layer in bf16, interleaved, timed by CUDA events; dense and ours are
compiled, as in training. Needs a GPU. `measure` is what `gpu.py` may call.

    python benchmarks/gpu_moe.py
    python benchmarks/gpu_moe.py --json gpu_moe.json
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measure import print_table, write_json
from moe_layer import make_layer

KINDS = {
    "dense": "dense MLP",
    "loop": "LitGPT's loop",
    "ours": "ours",
    "fused": "ours, one operation",
}
CASES = [(8, 2, 16384), (16, 2, 16384), (64, 8, 16384)]
"""Experts, experts per token, tokens."""


def measure(
    *, width: int = 2048, rounds: int = 20, cases: list[tuple[int, int, int]] = CASES
) -> list[dict[str, Any]]:
    """Return a row per case and contestant: milliseconds, and speed relative to dense and loop."""
    rows = []
    for experts, kept, tokens in cases:
        runs = {kind: layer_run(kind, experts, kept, width, tokens) for kind in KINDS}
        times: dict[str, list[float]] = {kind: [] for kind in runs}
        for number in range(rounds + 3):
            for kind, run in runs.items():
                seconds = timed(run)
                if number >= 3:  # the first ones warm up
                    times[kind].append(seconds)
        for kind, seconds_each in times.items():
            rows.append(
                {
                    "experts": experts, "kept": kept, "tokens": tokens, "width": width,
                    "name": KINDS[kind], "milliseconds": 1e3 * statistics.median(seconds_each),
                    "of_dense": ratio(times["dense"], seconds_each),
                    "of_loop": ratio(times["loop"], seconds_each),
                }
            )  # fmt: skip
        del runs
        torch.cuda.empty_cache()
    return rows


def layer_run(
    kind: str, experts: int, kept: int, width: int, tokens: int, compiled: bool = True
) -> Callable[[], None]:
    """Return one forward and backward pass; LitGPT's loop cannot be compiled whole."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        layer = make_layer(kind, experts, kept, width, "gelu").bfloat16()
        if kind == "fused":
            layer.experts.path = "fused"
        x = torch.randn(1, tokens, width, dtype=torch.bfloat16).requires_grad_()
        grad = torch.randn(1, tokens, width, dtype=torch.bfloat16)
    if compiled and kind in ("dense", "ours"):
        layer.compile()

    def run() -> None:
        layer(x).backward(grad)
        x.grad = None
        layer.zero_grad()

    return run


def timed(run: Callable[[], None]) -> float:
    """Return the seconds that one call takes on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def ratio(base: list[float], ours: list[float]) -> float:
    """Return the median over rounds of how many times as fast."""
    return statistics.median(b / o for b, o in zip(base, ours, strict=True))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--width", type=int, default=2048, help="hidden size")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_moe.py needs a GPU")
    rows = measure(width=args.width, rounds=args.rounds)
    columns = ("experts", "kept", "tokens", "name", "milliseconds", "of_dense", "of_loop")
    print_table(columns, [[row[column] for column in columns] for row in rows])
    write_json(args.json, {"gpu": torch.cuda.get_device_name(), "rows": rows})


if __name__ == "__main__":
    main()
