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
import datetime
import gc
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("tests", "kernels", "speed", "train")
MARK = "RESULT "  # what a measuring process writes before each result on standard output


@dataclass(frozen=True)
class Case:
    """One contestant with one model: what is measured at growing micro-batch sizes."""

    side: str
    """ours, litgpt, transformers"""
    model: str
    precision: str
    dropout: float = 0.0
    checkpointing: str = "none"
    compile: bool = True
    fp8: bool = False
    attention: str = "sdpa"

    @property
    def key(self) -> str:
        """A readable name, unique among cases."""
        extras = [
            f"dropout {self.dropout}" if self.dropout else "",
            self.checkpointing if self.checkpointing != "none" else "",
            "fp8" if self.fp8 else "",
            "" if self.compile else "eager",
            self.attention if self.attention != "sdpa" else "",
        ]
        return ", ".join([self.model, self.side, self.precision, *filter(None, extras)])


def cases(models: list[str], *, quick: bool, fp8: bool, compiled: bool) -> list[Case]:
    """List what to measure, the most telling first: a run may be cut short."""
    mixed = {"precision": "bf16-mixed", "compile": compiled}
    true = {"precision": "bf16-true", "compile": compiled}
    variants: list[dict[str, Any]] = [
        {"side": "ours", **mixed},
        {"side": "litgpt", **mixed},
        {"side": "transformers", **mixed, "compile": False},
        {"side": "ours", **mixed, "dropout": 0.1},
        {"side": "ours", **true},
        *([{"side": "ours", **true, "fp8": True}] if fp8 else []),
        {"side": "ours", **mixed, "checkpointing": "selective"},
    ]
    if not quick:
        variants += [
            {"side": "ours", **true, "dropout": 0.1},
            {"side": "litgpt", **true},
            {"side": "transformers", **mixed},
            {"side": "transformers", **true},
            {"side": "transformers", **mixed, "compile": False, "attention": "flash_attention_2"},
            {"side": "ours", **true, "checkpointing": "selective"},
            {"side": "ours", **mixed, "dropout": 0.1, "checkpointing": "selective"},
            {"side": "ours", **mixed, "checkpointing": "full"},
            {"side": "ours", **mixed, "compile": False},
        ]
    found = [Case(model=model, **variant) for variant in variants for model in models]
    return list(dict.fromkeys(found))  # without compilation some coincide


def sizes(model: str, *, quick: bool) -> list[int]:
    """Return the micro-batch sizes to try, growing; the first that fails ends it."""
    if model == "phi1-test":
        return [2, 4]
    if quick:
        return [8] if model == "phi-1" else [32]
    return [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128]


# --------------------------------------------------------------------------- the measuring process


def build_ours(case: Case, config: Any, fabric: Any) -> tuple[Any, Any]:
    """Return (ids, targets -> loss) and the parameters' module, as our training loop sets it up."""
    import torch
    from litgpt.model import GPT

    from phi_lit.train.checkpointing import apply_activation_checkpointing
    from phi_lit.train.dropout import apply_dropout
    from phi_lit.train.init import initialize
    from phi_lit.train.model import LossModel, compile_blocks

    with torch.device(fabric.device):
        gpt = GPT(config)
    initialize(gpt, "normal")
    if case.fp8:
        use_float8(gpt.transformer.h)  # the head stays in bf16: it decides the loss
    apply_dropout(gpt, attention=case.dropout, residual=case.dropout)
    apply_activation_checkpointing(gpt, case.checkpointing)  # type: ignore[arg-type]
    if case.compile:
        compile_blocks(gpt, dynamic=False)
    model = LossModel(gpt)
    cosine, sine = gpt.cos, gpt.sin
    module = fabric.setup_module(model)
    gpt.cos, gpt.sin = cosine.to(fabric.device), sine.to(fabric.device)  # stay float32
    return module, module


def use_float8(blocks: Any) -> None:
    """Let the linear layers multiply in float8: by torchao where it is installed, or by ours."""
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError:
        from _float8 import convert_to_float8_training
    convert_to_float8_training(blocks)


def build_litgpt(case: Case, config: Any, fabric: Any) -> tuple[Any, Any]:
    """Return the same for stock LitGPT, as its `pretrain` sets it up."""
    import torch
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    from phi_lit.train.init import initialize

    with torch.device(fabric.device):
        gpt = GPT(config)
    initialize(gpt, "normal")
    model = torch.compile(gpt, dynamic=False) if case.compile else gpt
    module = fabric.setup_module(model)
    return lambda ids, targets: chunked_cross_entropy(module(ids), targets), module


def build_transformers(case: Case, config: Any, fabric: Any) -> tuple[Any, Any]:
    """Return the same for transformers' PhiForCausalLM with its own loss."""
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    phi = PhiConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        max_position_embeddings=config.block_size,
        partial_rotary_factor=config.rotary_percentage,
        attention_dropout=case.dropout,
        resid_pdrop=case.dropout,
        use_cache=False,
        attn_implementation=case.attention,
    )
    with torch.device(fabric.device):
        model = PhiForCausalLM(phi)
    model.train()
    if case.compile:
        model.compile(dynamic=False)

    class LossOnly(torch.nn.Module):  # or Fabric would copy the logits to float32 on their way out
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, targets: Any) -> Any:
            # `shift_labels` are targets already in their places, as ours are.
            return self.model(input_ids=ids, labels=targets, shift_labels=targets).loss

    module = fabric.setup_module(LossOnly())
    return module, module


BUILDERS: dict[str, Callable[[Case, Any, Any], tuple[Any, Any]]] = {
    "ours": build_ours,
    "litgpt": build_litgpt,
    "transformers": build_transformers,
}


def measure_speed(
    case: Case, device: str, tried: list[int], steps: int, accumulate: int
) -> Iterator[dict[str, Any]]:
    """Yield a result per micro-batch size; stops after the first that does not fit."""
    for rows in tried:
        try:
            yield {"micro_batch": rows, **measure_size(case, device, rows, steps, accumulate)}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            yield {"micro_batch": rows, "out_of_memory": True}
            return
        finally:
            clean_up()


def measure_size(case: Case, device: str, rows: int, steps: int, accumulate: int) -> dict[str, Any]:
    """Train some steps and return speed, memory, and the losses as a sign that it trains."""
    import torch
    from lightning import Fabric
    from litgpt.config import Config

    from phi_lit.registry import MODELS
    from phi_lit.train import flops
    from phi_lit.train.build import arithmetic_of
    from phi_lit.train.devices import peak_for

    config = Config(**MODELS[case.model])
    fabric = Fabric(accelerator=device, devices=1, precision=case.precision)  # type: ignore[arg-type]
    torch.manual_seed(0)
    loss_of, module = BUILDERS[case.side](case, config, fabric)
    fused = device in ("cuda", "cpu")
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=fused)
    )
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(
        0, config.vocab_size, (accumulate, rows, config.block_size + 1), generator=generator
    ).to(fabric.device)

    def step() -> float:
        total = 0.0
        for batch in data:
            loss = loss_of(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            fabric.backward(loss / accumulate)
            total = loss.detach() / accumulate + total
        fabric.clip_gradients(module, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)  # waits for the device

    began = time.perf_counter()
    losses = [step() for _ in range(2)]
    start = time.perf_counter() - began
    reset_peak(fabric.device)
    times = []
    for _ in range(steps):
        before = time.perf_counter()
        losses.append(step())
        times.append(time.perf_counter() - before)
    tokens = accumulate * rows * config.block_size / statistics.median(times)
    peak = peak_for(fabric.device, arithmetic_of(case.precision))
    return {
        "tokens_per_second": tokens,
        "mfu_6n": flops.mfu(tokens, flops.flops_per_token_6n(config), peak),
        "mfu_6n_12ldt": flops.mfu(tokens, flops.flops_per_token_6n_12ldt(config), peak),
        "step_seconds": statistics.median(times),
        "spread": (max(times) - min(times)) / statistics.median(times),
        "start_seconds": start,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        **memory(fabric.device),
        **predicted(case, config, rows, accumulate, device),
    }


def predicted(case: Case, config: Any, rows: int, accumulate: int, device: str) -> dict[str, float]:
    """Return what `phi-lit plan` would have said about our side's memory."""
    from phi_lit.train.memory import Layout, predict

    if case.side != "ours":
        return {}
    layout = Layout(
        micro_batch=rows,
        seq_length=config.block_size,
        precision=case.precision,
        checkpointing=case.checkpointing,  # type: ignore[arg-type]
        attention_dropout=case.dropout,
        residual_dropout=case.dropout,
        compiled=case.compile,
        accumulates=accumulate > 1,
        device="cuda" if device == "cuda" else "cpu",
    )
    return {"predicted_gb": predict(config, layout).total / 1e9}


def measure_kernels(device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Yield times of what the step is made of: matmul peak, head and loss, attention."""
    import torch

    from phi_lit.train.devices import measure_peak, peak_for

    where, dtype = torch.device(device), torch.bfloat16
    measured, listed = measure_peak(dtype, where), peak_for(where, dtype)
    yield {"kernel": "matmul bf16", "tflops": measured / 1e12, "share_of_peak": measured / listed}
    on_gpu = device == "cuda"
    n, d, v = (16_384, 2048, 51_200) if on_gpu else (256, 64, 512)
    for name, loss in head_losses(on_gpu, quick):
        try:
            yield {"kernel": f"head + loss: {name}", **time_head(loss, n, d, v, where)}
        except Exception as error:
            yield {"kernel": f"head + loss: {name}", "error": one_line(error)}
        clean_up()
    shape = (8, 32, 2048, 64) if on_gpu else (1, 2, 64, 32)
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        for dropout in (0.0, 0.1) if on_gpu else (0.0,):
            name = f"attention: {backend.lower()}, dropout {dropout}"
            try:
                yield {"kernel": name, **time_attention(backend, dropout, shape, where)}
            except RuntimeError as error:
                yield {"kernel": name, "error": one_line(error)}


def head_losses(on_gpu: bool, quick: bool) -> list[tuple[str, Callable[..., Any]]]:
    """Return the ways to get from hidden states to a loss, by name."""
    import torch
    from litgpt.utils import chunked_cross_entropy

    from phi_lit.train.loss import linear_cross_entropy

    def plain(x: Any, w: Any, b: Any, y: Any) -> Any:
        return torch.nn.functional.cross_entropy((x @ w.t() + b).float(), y)

    def litgpt(x: Any, w: Any, b: Any, y: Any) -> Any:
        return chunked_cross_entropy((x @ w.t() + b)[None], y[None])

    def ours(**options: Any) -> Callable[..., Any]:
        return lambda x, w, b, y: linear_cross_entropy(x, w, b, y, **options).loss

    found = [("plain", plain), ("litgpt's chunked", litgpt), ("ours, torch", ours(backend="torch"))]
    if on_gpu:
        found.append(("ours, liger", ours(backend="liger")))
        for chunk in () if quick else (1024, 2048, 4096, 8192):
            found.append((f"ours, torch, {chunk} rows", ours(backend="torch", chunk=chunk)))
    return found


def time_head(loss: Callable[..., Any], n: int, d: int, v: int, device: Any) -> dict[str, float]:
    """Time forward and backward of a head with its loss, and take its peak memory."""
    import torch

    x = torch.randn(n, d, device=device, dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(v, d, device=device) * 0.02).bfloat16().requires_grad_()
    b = torch.zeros(v, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = torch.randint(0, v, (n,), device=device)

    def once() -> None:
        for tensor in (x, w, b):
            tensor.grad = None
        loss(x, w, b, y).backward()

    reset_peak(device)
    held = memory(device)
    seconds = time_of(once, device)
    used = memory(device).get("peak_gb", 0.0) - held.get("peak_gb", 0.0)
    return {
        "milliseconds": 1e3 * seconds,
        "tflops": 6 * n * d * v / seconds / 1e12,
        "extra_gb": used,
    }


def time_attention(
    backend: str, dropout: float, shape: tuple[int, ...], device: Any
) -> dict[str, float]:
    """Time forward and backward of causal attention under one kernel; error if it cannot."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )

    def once() -> None:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            y = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=dropout
            )
        torch.autograd.grad(y.sum(), (q, k, v))

    return {"milliseconds": 1e3 * time_of(once, device)}


def time_of(once: Callable[[], None], device: Any, runs: int = 8) -> float:
    """Return the median seconds of a call, after two to warm up."""
    times = []
    for number in range(runs + 2):
        synchronize(device)
        before = time.perf_counter()
        once()
        synchronize(device)
        if number >= 2:
            times.append(time.perf_counter() - before)
    return statistics.median(times)


def synchronize(device: Any) -> None:
    """Wait for the device."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: Any) -> None:
    """Start measuring peak memory anew."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: Any) -> dict[str, float]:
    """Return peak memory in GB (1e9): in tensors, and reserved; of the process on a CPU."""
    import psutil
    import torch

    if device.type == "cuda":
        return {
            "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
        }
    return {"peak_gb": psutil.Process().memory_info().rss / 1e9}


def clean_up() -> None:
    """Let go of models, compiled code and cached memory."""
    import torch

    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error, or what caused it, is the device's memory running out."""
    seen: BaseException | None = error
    while seen is not None:
        if type(seen).__name__ == "OutOfMemoryError" or "out of memory" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def one_line(error: BaseException) -> str:
    """Return an error as one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


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


# ------------------------------------------------------------------------------ the parent process


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
        [sys.executable, str(Path(__file__).resolve()), "--task", json.dumps(task)],
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


# --------------------------------------------------------------------------------------- the table


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


# -------------------------------------------------------------------------------------------- main


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
