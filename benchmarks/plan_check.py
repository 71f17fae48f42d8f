"""Holds the memory that `phi-lit plan` predicts against what a training step really allocates.

Runs small phi-shaped models on the CPU and reads every allocation and release from torch's
profiler, so the peak is exact to the byte and free of the allocator's habits.

    python benchmarks/plan_check.py            # all cases, one line each
    python benchmarks/plan_check.py --json plan_check.json
"""

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise

import torch
from litgpt.config import Config
from litgpt.model import GPT
from torch.profiler import ProfilerActivity, profile, record_function

from phi_lit.registry import MODELS
from phi_lit.train.checkpointing import apply_activation_checkpointing
from phi_lit.train.dropout import apply_dropout
from phi_lit.train.layout import Layout
from phi_lit.train.memory import predict
from phi_lit.train.model import LossModel, compile_blocks
from phi_lit.train.optim import build_optimizer

MARK = "moment: "


@dataclass(frozen=True)
class Measured:
    """Bytes of one training step of two micro-batches."""

    parameters: int
    optimizer: int
    kept: int
    """What is there after a forward pass and was not before: for the backward pass."""
    total: int
    """The peak, with parameters and optimizer state."""


@dataclass(frozen=True)
class Case:
    """A model (as a difference from phi1-nano) and how it is trained."""

    name: str
    layout: Layout
    model: dict[str, Any]


BASE = Layout(micro_batch=4, seq_length=256, precision="32-true", compiled=False, device="cpu")
WIDE = dict(n_embd=512, n_head=8, n_layer=6)
CASES = [
    Case("fp32", BASE, {}),
    Case("fp32, wider", BASE, WIDE),
    Case("fp32, vocabulary 51,200", BASE, dict(padded_vocab_size=51_200)),
    Case("fp32, one micro-batch", replace(BASE, accumulates=False), WIDE),
    Case("fp32, compiled", replace(BASE, compiled=True), WIDE),
    Case("fp32, plain loss", replace(BASE, fused_loss=False), {}),
    Case("bf16-true", replace(BASE, precision="bf16-true"), WIDE),
    Case("bf16-mixed", replace(BASE, precision="bf16-mixed"), WIDE),
    Case("bf16-mixed, compiled", replace(BASE, precision="bf16-mixed", compiled=True), WIDE),
    Case("fp32, residual dropout", replace(BASE, residual_dropout=0.1), WIDE),
    Case(
        "bf16-true, both dropouts",
        replace(BASE, precision="bf16-true", residual_dropout=0.1, attention_dropout=0.1),
        WIDE,
    ),
    Case(
        "bf16-mixed, both dropouts",
        replace(BASE, precision="bf16-mixed", residual_dropout=0.1, attention_dropout=0.1),
        WIDE,
    ),
    Case(
        "fp32, residual dropout, compiled", replace(BASE, residual_dropout=0.1, compiled=True), WIDE
    ),
    Case(
        "fp32, selective, dropouts",
        replace(BASE, residual_dropout=0.1, attention_dropout=0.1, checkpointing="selective"),
        WIDE,
    ),
    Case(
        "fp32, selective, compiled", replace(BASE, checkpointing="selective", compiled=True), WIDE
    ),
    Case("fp32, full, compiled", replace(BASE, checkpointing="full", compiled=True), WIDE),
    Case("fp32, attention dropout", replace(BASE, attention_dropout=0.1), WIDE),
    Case("fp32, selective", replace(BASE, checkpointing="selective"), WIDE),
    Case("fp32, full", replace(BASE, checkpointing="full"), WIDE),
    Case(
        "bf16-mixed, selective",
        replace(BASE, checkpointing="selective", precision="bf16-mixed"),
        WIDE,
    ),
    Case("bf16-mixed, full", replace(BASE, checkpointing="full", precision="bf16-mixed"), WIDE),
    Case("fp32, one key/value head", BASE, dict(WIDE, n_query_groups=1)),
    Case("fp32, SGD", replace(BASE, optimizer="SGD"), WIDE),
]


def measure(config: Config, layout: Layout) -> Measured:
    """Run one step (after one to warm up) and return what it allocated.

    Args:
        config: the model.
        layout: how it is trained; `strategy` must be "single", `device` "cpu".
    """
    dtype = torch.bfloat16 if layout.precision == "bf16-true" else torch.float32
    torch.manual_seed(0)
    gpt = GPT(config).to(dtype)
    gpt.max_seq_length = layout.seq_length
    if layout.attention_dropout or layout.residual_dropout:
        apply_dropout(gpt, attention=layout.attention_dropout, residual=layout.residual_dropout)
    if layout.checkpointing != "none":
        apply_activation_checkpointing(gpt, layout.checkpointing)
    if layout.compiled:
        compile_blocks(gpt)
    model = LossModel(gpt) if layout.fused_loss else _PlainModel(gpt)
    optimizers = build_optimizer(model, {"class_path": layout.optimizer, "init_args": {"lr": 1e-4}})
    ids = torch.randint(0, config.vocab_size, (layout.micro_batch, layout.seq_length))

    def step() -> None:
        for _ in range(2 if layout.accumulates else 1):
            with (
                record_function(f"{MARK}forward"),
                torch.autocast("cpu", torch.bfloat16, enabled=layout.mixed),
            ):
                loss = model(ids, ids)
            with record_function(f"{MARK}backward"):
                loss.backward()
            del loss
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    states = [s for o in optimizers for state in o.state.values() for s in state.values()]
    optimizer_bytes = sum(s.numel() * s.element_size() for s in states if torch.is_tensor(s))
    kept, peak = _read(profiler)
    return Measured(parameters, optimizer_bytes, kept, parameters + optimizer_bytes + peak)


class _PlainModel(torch.nn.Module):
    """A GPT and its loss from whole logits."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.gpt(idx).flatten(0, 1).float()
        return torch.nn.functional.cross_entropy(logits, targets.flatten())


def _read(profiler: Any) -> tuple[int, int]:
    """Return (bytes that the last forward pass left behind, peak bytes) since the start."""
    events = profiler.profiler.kineto_results.events()
    forwards = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.name() == f"{MARK}forward"
    ]
    start, end = max(forwards)
    level = peak = before = after = 0
    for moment, size in sorted(
        (e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"
    ):
        level += size
        peak = max(peak, level)
        before = level if moment < start else before
        after = level if moment <= end else after
    return after - before, peak


def compare(case: Case) -> dict[str, Any]:
    """Measure a case, predict it, and return both with their ratios (predicted / measured)."""
    torch._dynamo.reset()
    config = Config(**dict(MODELS["phi1-nano"], **case.model))
    measured, predicted = measure(config, case.layout), predict(config, case.layout)
    figures = {
        "parameters": (predicted.parameters, measured.parameters),
        "optimizer": (predicted.optimizer, measured.optimizer),
        "kept": (predicted.kept, measured.kept),
        "total": (predicted.total, measured.total),
    }
    return {
        "case": case.name,
        **{
            name: {"predicted": p, "measured": m, "ratio": p / m if m else 1.0}
            for name, (p, m) in figures.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, CPU; predicted / measured, peak in MB")
    print(f"{'case':<28}{'parameters':>11}{'optimizer':>11}{'kept':>8}{'peak':>8}{'MB':>9}")
    rows = []
    for case in CASES:
        if options.only not in case.name:
            continue
        row = compare(case)
        rows.append(row)
        ratios = [row[key]["ratio"] for key in ("parameters", "optimizer", "kept", "total")]
        text = "".join(f"{r:>{w}.3f}" for r, w in zip(ratios, (11, 11, 8, 8), strict=True))
        print(f"{case.name:<28}{text}{row['total']['measured'] / 1e6:>9.1f}", flush=True)
    worst = max(rows, key=lambda row: abs(row["total"]["ratio"] - 1))
    print(f"worst peak: {worst['case']}, {worst['total']['ratio']:.3f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
