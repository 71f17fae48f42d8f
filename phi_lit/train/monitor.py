"""What a run shows while it works: progress, LitGPT's logger, and its own record of losses.

The record, `metrics.jsonl`, has a row per optimizer step with exact numbers; a resumed run cuts it
back to the checkpoint it starts from, so it reads as if the run had never stopped. The loss curve
is drawn from it.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning import Fabric

from phi_lit.files import write_atomic
from phi_lit.progress import Progress, progress
from phi_lit.train.experts import by_layer

RECORD = "metrics.jsonl"

EXPERT_ROWS = 600
"""How many rows of a run's record hold the load of every expert: as many as a picture shows."""


class Record:
    """The run's rows on disk, one JSON object per line."""

    def __init__(self, out_dir: Path, *, keep_until: int) -> None:
        self._path = out_dir / RECORD
        kept = [row for row in read_record(out_dir) if row["step"] <= keep_until]
        write_atomic(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115

    def add(self, **row: Any) -> None:
        """Append a row; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_record(out_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's record; a last line cut short by a kill is left out."""
    path = out_dir / RECORD
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class Monitor:
    """Shows a run's figures; on ranks other than 0 it only counts.

    Args:
        fabric: whose logger gets the figures.
        out_dir: where the record goes.
        total: optimizer steps in all.
        done: optimizer steps done before (a resumed run).
        tokens_per_step: of all ranks together.
        flops_per_token: forward and backward, counted as 6N + 12LdT.
        peak_flops: of all devices together, per second.
    """

    def __init__(
        self, fabric: Fabric, out_dir: Path, *, total: int, done: int, tokens_per_step: int,
        flops_per_token: float, peak_flops: float,
    ) -> None:  # fmt: skip
        self._fabric = fabric
        self.tokens_per_step = tokens_per_step
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._shown = fabric.global_rank == 0
        self._record: Record | None = Record(out_dir, keep_until=done) if self._shown else None
        self._progress: Progress | None = (
            progress(total, "train", "steps", initial=done) if self._shown else None
        )
        self._times: list[float] = []
        self._experts_every = max(1, total // EXPERT_ROWS)
        self.seconds = 0.0
        """Seconds spent in optimizer steps so far in this process: no validation, no saving."""
        self.steps = 0
        """Optimizer steps done in this process."""

    def step(
        self, *, step: int, seconds: float, log: bool, experts: dict[str, Any] | None = None,
        **figures: float,
    ) -> None:  # fmt: skip
        """Take note of a finished optimizer step (counted from 1).

        Args:
            step: its number.
            seconds: how long it took.
            log: whether LitGPT's logger is told too.
            experts: what each expert did (`experts.summary`).
            **figures: numbers by name.
        """
        self.seconds += seconds
        self.steps += 1
        self._times = [*self._times[-19:], seconds]
        if self._record is None or self._progress is None:
            return
        tokens = step * self.tokens_per_step
        loads = {} if experts is None or step % self._experts_every else {"experts": experts}
        self._record.add(step=step, tokens=tokens, **figures, **loads)
        speed = self.tokens_per_second
        figures = {
            **figures,
            "tokens_per_second": speed,
            "mfu": self.mfu(speed),
            **memory(self._fabric),
        }
        self._progress.note(**_brief(figures))
        self._progress.update()
        if log:
            left = (self._progress.total or step) - step
            self._fabric.log_dict(
                {
                    **figures,
                    **(by_layer(experts) if experts else {}),
                    "step": step,
                    "total_tokens": tokens,
                    "iter_time": seconds,
                    "remaining_time": left * self.tokens_per_step / speed,
                },
                step=step,
            )

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all ranks per second of training, over the last 20 steps (median)."""
        times = sorted(self._times)
        return self.tokens_per_step / max(times[len(times) // 2], 1e-9)

    def mfu(self, tokens_per_second: float) -> float:
        """Return the share of the devices' peak that a speed is, counted as 6N + 12LdT."""
        return tokens_per_second * self._flops_per_token / self._peak_flops

    def validated(self, *, step: int, loss: float, seconds: float) -> None:
        """Take note of a held-out loss, in nats per token."""
        perplexity = math.exp(min(loss, 700.0))
        if self._record is not None and self._progress is not None:
            self._record.add(step=step, tokens=step * self.tokens_per_step, val_loss=loss)
            self._fabric.log_dict({"val_loss": loss, "val_ppl": perplexity}, step=step)
            self.say(
                f"step {step}: held-out loss {loss:.4f}, perplexity {perplexity:.2f} "
                f"({seconds:.1f} s)"
            )

    def say(self, text: str) -> None:
        """Print a line on rank 0 without breaking the bar."""
        if self._progress is not None:
            self._progress.say(text)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Show the final state and close the record (once)."""
        if self._record is not None and self._progress is not None:
            self._progress.close()
            self._record.close()
        self._record = self._progress = None


def memory(fabric: Fabric) -> dict[str, float]:
    """Return the peak of device memory in GB, or this process's resident memory on a CPU."""
    if fabric.device.type == "cuda":
        return {"memory_gb": torch.cuda.max_memory_allocated(fabric.device) / 1e9}
    return {"memory_gb": psutil.Process().memory_info().rss / 1e9}


def _brief(figures: dict[str, float]) -> dict[str, str]:
    brief = {"loss": f"{figures['loss']:.3f}", "lr": f"{figures['learning_rate']:.1e}"}
    brief["tok/s"] = f"{figures['tokens_per_second']:,.0f}"
    if "max_load" in figures:
        brief["busiest expert"] = f"{figures['max_load']:.1f}x"
    brief["MFU"] = f"{figures['mfu']:.0%}"
    brief["GB"] = f"{figures['memory_gb']:.1f}"
    return brief
