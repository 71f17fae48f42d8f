"""What tests of training share: a tiny recipe, running it, and comparing what it left."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml

FILES = ("textwrap.py", "bisect.py", "heapq.py", "keyword.py", "sched.py", "queue.py", "stat.py")

RECIPE: dict[str, Any] = {
    "model_name": "phi1-test",
    "precision": "32-true",
    "logger_name": "csv",
    "data": {"class_path": "CodeTextbook", "init_args": {"num_workers": 1, "val_fraction": 0.15}},
    "train": {
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "max_steps": 12,
        "lr_schedule": "linear",
        "lr_warmup_steps": 3,
        "min_lr": 0.0,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "weight_decay_on": "matrices",
        "init": "normal",
        "save_interval": 4,
        "compile": "off",
    },
    "eval": {"interval": 6, "max_iters": 2},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with nested `changes` put in."""
    result = copy.deepcopy(base)
    for key, value in changes.items():
        if (
            isinstance(value, dict)
            and isinstance(result.get(key), dict)
            and "class_path" not in value
        ):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def pretrain(arguments: dict[str, Any]) -> None:
    """Call what `litgpt pretrain --config` calls, through the same parser."""
    import litgpt.pretrain
    from jsonargparse import CLI, set_docstring_parse_options

    set_docstring_parse_options(attribute_docstrings=True)
    config = Path(arguments["out_dir"]).with_suffix(".yaml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(arguments))
    CLI(litgpt.pretrain.setup, args=["--config", str(config)])


def rows(out_dir: Path) -> list[dict[str, Any]]:
    """Return a run's record."""
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


def losses(out_dir: Path) -> list[float]:
    """Return the training losses, exactly as they were."""
    return [row["loss"] for row in rows(out_dir) if "loss" in row]


def tensors(checkpoint: Path) -> dict[str, Any]:
    """Return everything in a checkpoint's files of tensors, under dotted names."""
    found: dict[str, Any] = {}
    for name in ("lit_model.pth", "training_state.pth"):
        _flatten(torch.load(checkpoint / name, weights_only=True), name, found)
    return found


def _flatten(value: Any, prefix: str, found: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(item, f"{prefix}.{key}", found)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _flatten(item, f"{prefix}.{number}", found)
    else:
        found[prefix] = value


def assert_same_to_the_bit(one: Path, other: Path) -> None:
    """Compare two checkpoints: every tensor and every number."""
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        else:
            assert value == second[name], name


def quiet_environment() -> dict[str, str]:
    """Return this environment for a child that shares the cores with others."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
