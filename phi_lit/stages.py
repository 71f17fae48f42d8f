"""Several trainings one after the other, as one command that can be called again.

Progressive training (Orca: FLAN-5M, then FLAN-1M) is a YAML per stage, each starting from the last
one's `final/`. Every stage is a process of `litgpt` that resumes where it stood, so whatever stops
the command, calling it again goes on from there.
"""

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from phi_lit.errors import UserError


def stages(configs: list[Path], dry_run: bool = False) -> None:
    """Run trainings in order, each from a YAML; call it again to go on after an interruption.

    Args:
        configs: The stages' YAMLs. One with a model_name is pretrained, one with a checkpoint_dir
            finetuned (finetune_full); each needs an out_dir.
        dry_run: Only check them and say what would be run.
    """
    plans = plan(configs)
    for number, (command, path, out_dir) in enumerate(plans, start=1):
        print(f"stage {number} of {len(plans)}: litgpt {command} --config {path}", flush=True)
        if dry_run:
            continue
        code = run_one(command, path)
        if code:
            raise SystemExit(code)
        if not (out_dir / "final" / "lit_model.pth").is_file():
            raise UserError(
                f"stage {number} ({path}) was stopped before its end; the same command goes on "
                "from there."
            )


def plan(configs: list[Path]) -> list[tuple[str, Path, Path]]:
    """Return (command, YAML, output directory) of every stage, all of them checked.

    Raises:
        UserError: a file is missing or wrong, or a stage starts from what no earlier one leaves.
    """
    if not configs:
        raise UserError("no stage is given; name the YAMLs in order.")
    plans, faults, left = [], list[str](), list[Path]()
    for path in configs:
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            command = _command(settings)
            _parse(command, path)
        except (OSError, ValueError) as error:
            faults.append(f"{path}: {str(error).splitlines()[0]}")
            continue
        start, out_dir = settings.get("checkpoint_dir"), Path(settings["out_dir"])
        made = start is None or any(Path(start).is_relative_to(earlier) for earlier in left)
        if not made and not Path(start).is_dir():
            faults.append(f"{path}: its checkpoint_dir {start} is not there, nor any stage's")
        if settings.get("resume") != "auto":
            faults.append(f"{path}: add `resume: auto`, or a second call would begin anew")
        left.append(out_dir)
        plans.append((command, path, out_dir))
    if faults:
        raise UserError("; ".join(faults) + ".")
    return plans


def _command(settings: Any) -> str:
    if not isinstance(settings, dict) or "out_dir" not in settings:
        raise ValueError("no YAML of a training: it names no out_dir")
    if ("model_name" in settings) == ("checkpoint_dir" in settings):
        raise ValueError("name either a model_name (pretrain) or a checkpoint_dir (finetune_full)")
    return "pretrain" if "model_name" in settings else "finetune_full"


def _parse(command: str, path: Path) -> None:
    """Parse a YAML as `litgpt` will.

    Raises:
        ValueError: it does not fit the command.
    """
    from importlib import import_module

    from jsonargparse import ArgumentError, ArgumentParser

    module = {"pretrain": "litgpt.pretrain", "finetune_full": "litgpt.finetune.full"}[command]
    import_module("litgpt.pretrain")  # with it come the data modules that a YAML names
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(import_module(module).setup)
    try:
        parser.parse_args(["--config", str(path)])
    except ArgumentError as error:
        raise ValueError(str(error)) from None


def run_one(command: str, path: Path) -> int:
    """Run one stage to its end and return its exit code; a SIGTERM to us is passed on to it."""
    words = [sys.executable, "-m", "phi_lit", command, "--config", str(path)]
    child = subprocess.Popen(words)

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue  # the terminal sent it to the child too, which saves and stops
    finally:
        signal.signal(signal.SIGTERM, before)
