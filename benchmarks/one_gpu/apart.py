"""Measuring in a process of its own, with a time limit; tests and a training run the same way.

A child writes a marked line per result, so what it had found before its end is kept.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from one_gpu.cases import Case
from one_gpu.device import one_line
from one_gpu.kernels import measure_kernels
from one_gpu.speed import measure_speed

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
MARK = "RESULT "
"""What a measuring process writes before each result on standard output."""


def serve(task: dict[str, Any]) -> None:
    """Measure what a parent process asked for; a line per result."""
    for result in results_of(task):
        print(MARK + json.dumps(result), flush=True)


def results_of(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the results of a task."""
    if task["kind"] == "kernels":
        yield from measure_kernels(task["device"], task["quick"])
    else:
        yield from measure_speed(
            Case(**task["case"]), task["device"], task["sizes"], task["steps"], task["accumulate"]
        )


def run_limited(command: list[str], limit: float, **environment: str) -> tuple[int | None, str]:
    """Run a command with all its children; returns (exit code or None if cut off, output)."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        start_new_session=True, env={**os.environ, **environment}, errors="replace",
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def measure_apart(task: dict[str, Any], limit: float) -> dict[str, Any]:
    """Measure in a process of its own; what it had found before its end is kept."""
    began = time.monotonic()
    code, output = run_limited(
        [sys.executable, str(SCRIPT), "--task", json.dumps(task)],
        limit,
        # For every contestant: growing sizes otherwise leave holes that nothing fits into.
        PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
    )
    lines = output.splitlines()
    found = [json.loads(line[len(MARK) :]) for line in lines if line.startswith(MARK)]
    result: dict[str, Any] = {"results": found, "seconds": time.monotonic() - began}
    if code is None:
        result["error"] = f"cut off after {limit:.0f} s"
    elif code != 0:
        rest = [line for line in lines if line.strip() and not line.startswith(MARK)]
        result["error"] = rest[-1][:300] if rest else f"exit code {code}"
        print("\n".join(rest[-15:]), file=sys.stderr)
    return result


def measure_here(task: dict[str, Any]) -> dict[str, Any]:
    """Measure in this process: for the toy, whose start would take longer than its steps."""
    began = time.monotonic()
    result: dict[str, Any] = {"results": []}
    try:
        result["results"] = list(results_of(task))
    except Exception as error:
        result["error"] = one_line(error)
    result["seconds"] = time.monotonic() - began
    return result


def run_tests(limit: float) -> dict[str, Any]:
    """Run the tests that need a GPU."""
    code, output = run_limited(
        [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-q",
            "--no-header",
            "-p",
            "no:cacheprovider",
        ],
        limit,
    )
    tail = [line for line in output.splitlines() if line.strip()]
    good = code in (0, 5)  # 5: no such tests
    result = {"exit_code": code, "summary": tail[-1] if tail else "", "tail": tail[-40:]}
    return result if good else {**result, "error": "tests failed"}  # and so run again next time


def run_training(device: str, model: str, steps: int, work: Path, limit: float) -> dict[str, Any]:
    """Train on Python's standard library as a user would, from tokenizer to loss curve."""
    began = time.monotonic()
    phi_lit = [sys.executable, "-m", "phi_lit"]
    tokenizer, out_dir = work / "tokenizer", work / f"train-{model}"
    toy = model == "phi1-test"
    made = ["tokenizer", "train", "--vocab_size", "512"] if toy else ["tokenizer", "codegen"]
    if not tokenizer.exists():
        code, output = run_limited([*phi_lit, *made, "--out_dir", str(tokenizer)], limit)
        if code != 0:
            return {"error": f"tokenizer: {output.splitlines()[-1:]}"}
    rows = 4 if toy else 64
    options = {
        "out_dir": out_dir,
        "precision": "32-true" if device == "cpu" else "bf16-mixed",
        "devices": 1,
        "tokenizer_dir": tokenizer,
        "data": "CodeTextbook",
        "data.data_dir": work / "data",
        "train.global_batch_size": rows,
        "train.micro_batch_size": 4 if toy else 16,
        "train.max_steps": steps,
        "train.lr_schedule": "linear",
        "train.lr_warmup_steps": max(steps // 10, 1),
        "train.attention_dropout": 0.1,
        "train.residual_dropout": 0.1,
        "train.save_interval": steps,
        "train.compile": "off" if device == "cpu" else "on",
        "eval.interval": steps,
        "eval.max_iters": 4,
        "eval.final_validation": "true",
        "logger_name": "csv",
    }
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    left = max(limit - (time.monotonic() - began), 30)
    code, output = run_limited([*phi_lit, "pretrain", model, *arguments], left)
    losses = read_losses(out_dir)
    result: dict[str, Any] = {"steps": len(losses), "seconds": time.monotonic() - began}
    if losses:
        result |= {"first_loss": losses[0], "last_loss": losses[-1]}
    if code != 0:
        result["error"] = "cut off" if code is None else (output.strip().splitlines() or [""])[-1]
    result["summary"] = [line for line in output.splitlines() if line.strip()][-14:]
    return result


def read_losses(out_dir: Path) -> list[float]:
    """Return the training losses that a run recorded."""
    path = out_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["loss"] for row in rows if "loss" in row]
