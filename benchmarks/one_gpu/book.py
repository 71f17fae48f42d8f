"""The results of `gpu.py`: kept on disk by key, and as a Markdown table."""

import datetime
import json
import math
import platform
from pathlib import Path
from typing import Any


class Book:
    """Results on disk, by key; what is there is not measured again."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "results.json"
        self.results: dict[str, Any] = (
            json.loads(self.path.read_text()) if self.path.exists() else {}
        )

    def __contains__(self, key: str) -> bool:
        return key in self.results

    def write(self, key: str, result: Any) -> None:
        """Keep a result, at once."""
        self.results[key] = result
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.results, indent=1))
        partial.replace(self.path)


def about(device: str) -> dict[str, str]:
    """Return what the figures were measured on."""
    from importlib import metadata

    import torch

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "missing"

    on_gpu = device == "cuda"
    hardware = torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU"
    packages = ("torch", "triton", "litgpt", "lightning", "transformers", "liger-kernel", "torchao")
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware,
        "cuda": str(torch.version.cuda) if on_gpu else "none",
        "python": platform.python_version(),
        **{package: version(package) for package in (*packages, "flash-attn")},
    }


def best(results: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the fastest of the sizes that fitted."""
    ran = [result for result in results if "tokens_per_second" in result]
    return max(ran, key=lambda result: result["tokens_per_second"], default=None)


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in results.get("about", {}).items())
    lines = ["# One GPU, side by side", "", machine, ""]
    if tests := results.get("tests"):
        lines += [f"Tests that need a GPU: {tests['summary']}", ""]
    lines += speed_table(results)
    lines += kernel_table(results)
    for key, run in results.items():
        if key.startswith("train "):
            said = run.get("error") or (
                f"loss {run['first_loss']:.3f} -> {run['last_loss']:.3f} in {run['steps']} steps"
            )
            lines += [f"Training {key.removeprefix('train ')}: {said}, {run['seconds']:.0f} s", ""]
    return "\n".join(lines) + "\n"


def speed_table(results: dict[str, Any]) -> list[str]:
    """Return the rows of the contestants, each at its fastest size, out-of-memory sizes named."""
    rows = {key[6:]: value for key, value in results.items() if key.startswith("speed ")}
    if not rows:
        return []
    head = [
        "contestant", "rows", "tokens/s", "of LitGPT", "MFU 6N", "MFU 6N+12LdT", "peak GB",
        "planned GB", "start s", "note",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * 8 + "|---|"]
    baseline = {
        value["case"]["model"]: fastest["tokens_per_second"]
        for value in rows.values()
        if value["case"]["side"] == "litgpt"
        and value["case"]["precision"] == "bf16-mixed"
        and (fastest := best(value["results"]))
    }
    for key, value in rows.items():
        lines.append("| " + " | ".join(speed_row(key, value, baseline)) + " |")
    return [*lines, "", "of LitGPT: relative to stock LitGPT, bf16-mixed, of the same model.", ""]


def speed_row(key: str, value: dict[str, Any], baseline: dict[str, float]) -> list[str]:
    """Return one contestant's cells."""
    fastest = best(value["results"])
    notes = [
        f"out of memory at {r['micro_batch']}" for r in value["results"] if "out_of_memory" in r
    ]
    notes += [value["error"].replace("|", "/")] if "error" in value else []
    if fastest is None:
        return [key, *["-"] * 8, "; ".join(notes)]
    if not math.isfinite(fastest["last_loss"]) or fastest["last_loss"] > fastest["first_loss"]:
        notes.append(f"loss {fastest['first_loss']:.2f} -> {fastest['last_loss']:.2f}")
    stock = baseline.get(value["case"]["model"])
    planned = fastest.get("predicted_gb")
    return [
        key,
        str(fastest["micro_batch"]),
        f"{fastest['tokens_per_second']:,.0f}",
        f"{fastest['tokens_per_second'] / stock:.2f}" if stock else "-",
        f"{fastest['mfu_6n']:.1%}",
        f"{fastest['mfu_6n_12ldt']:.1%}",
        f"{fastest['peak_gb']:.1f}",
        f"{planned:.1f}" if planned else "-",
        f"{fastest['start_seconds']:.0f}",
        "; ".join(notes),
    ]


def kernel_table(results: dict[str, Any]) -> list[str]:
    """Return the rows of the parts of a step."""
    rows = results.get("kernels", {}).get("results", [])
    if not rows:
        return []
    lines = ["| part of a step | ms | TFLOP/s | extra GB |", "|---|---:|---:|---:|"]
    for row in rows:
        cells = [
            f"{row[name]:.{digits}f}" if name in row else "-"
            for name, digits in (("milliseconds", 2), ("tflops", 1), ("extra_gb", 2))
        ]
        note = f" ({row['error'].replace('|', '/')})" if "error" in row else ""
        share = f", {row['share_of_peak']:.0%} of the peak" if "share_of_peak" in row else ""
        lines.append(f"| {row['kernel']}{share}{note} | " + " | ".join(cells) + " |")
    return [*lines, ""]
