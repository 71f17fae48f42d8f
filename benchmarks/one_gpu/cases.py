"""What `gpu.py` measures: contestants, models, number formats, and the sizes to try."""

from dataclasses import dataclass
from typing import Any


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
