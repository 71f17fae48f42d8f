"""The checkpoints of one run: `step-N` directories in its `out_dir`, and the links that name some.

Which to go on from, which to keep. What is in one is `checkpoint.py`'s.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from phi_lit.errors import UserError
from phi_lit.files import PARTIAL, staged_dir
from phi_lit.train.checkpoint import MANIFEST, STATE_FILE, is_whole, read_manifest


def step_dirs(out_dir: Path) -> Iterator[tuple[int, Path]]:
    """Yield (step, directory) of the checkpoints in `out_dir`, the newest first."""
    found = []
    for path in out_dir.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and path.is_dir():
            found.append((int(number), path))
    yield from sorted(found, reverse=True)


def find_resume(
    resume: bool | str | Path, out_dir: Path, say: Callable[[str], None]
) -> Path | None:
    """Return the checkpoint directory to resume from, or None to start anew.

    Args:
        resume: false; "auto" or true for the newest whole checkpoint in `out_dir` (true insists on
            there being one); or a path to a directory or a file in it.
        out_dir: where the run saves.
        say: told about checkpoints that were passed over because they are not whole.
    """
    if resume is False or resume is None:
        return None
    if resume is not True and str(resume) != "auto":
        path = Path(resume)
        path = path.parent if path.is_file() else path
        if not path.is_dir():
            raise UserError(f"resume: there is no checkpoint {path}")
        read_manifest(path)
        return path
    for _, path in step_dirs(out_dir):
        try:
            read_manifest(path)
        except UserError as error:
            say(f"passing over a checkpoint: {error}")
            continue
        return path
    if resume is True:
        raise UserError(f"resume is true, but there is no whole checkpoint in {out_dir}")
    return None


def link(out_dir: Path, name: str, target: Path) -> None:
    """Point `out_dir/name` at a checkpoint beside it, in one step."""
    partial = out_dir / f".{name}{PARTIAL}{os.getpid()}"
    partial.unlink(missing_ok=True)
    os.symlink(target.name, partial, target_is_directory=True)
    try:
        os.replace(partial, out_dir / name)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"cannot link {out_dir / name}: something else of that name is there ({error.strerror})"
        ) from error


def refuse_later_steps(out_dir: Path, step: int) -> None:
    """Raise a `UserError` if `out_dir` holds checkpoints of later steps than this run starts from.

    They would be another run's: this one's newest would be pruned before them, and the next resume
    would take them for its own.
    """
    later = [path for number, path in step_dirs(out_dir) if number > step and is_whole(path)]
    if later:
        raise UserError(
            f"{out_dir} holds checkpoints beyond step {step}, where this run starts (up to "
            f"{later[0].name}); resume from them (--resume auto), remove them, or choose another "
            "out_dir"
        )


def prune(out_dir: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and those that a link points at."""
    for leftover in out_dir.glob(f".step-*{PARTIAL}removed"):  # of a run killed while pruning
        shutil.rmtree(leftover, ignore_errors=True)
    for leftover in out_dir.glob(f".*{PARTIAL}*"):  # of one killed while linking
        if leftover.is_symlink():
            leftover.unlink()
    kept = {
        (out_dir / os.readlink(path)).name
        for path in out_dir.iterdir()
        if path.is_symlink() and path.name != "latest"
    }
    for _, path in list(step_dirs(out_dir))[keep_last:]:
        if path.name not in kept:
            doomed = path.with_name(f".{path.name}{PARTIAL}removed")
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def best_so_far(out_dir: Path) -> float:
    """Return the held-out loss of the checkpoint linked as best, or infinity."""
    manifest = out_dir / "best" / MANIFEST
    if not manifest.is_file():
        return float("inf")
    loss = json.loads(manifest.read_text())["val_loss"]
    return float("inf") if loss is None else loss


def copy_as_final(checkpoint: Path, final: Path) -> None:
    """Make `final` a plain LitGPT checkpoint with the weights of `checkpoint`, sharing the
    bytes."""
    with staged_dir(final) as partial:
        for file in checkpoint.iterdir():
            if file.name in (STATE_FILE, MANIFEST) or file.name.startswith("shard-"):
                continue
            try:
                os.link(file, partial / file.name)
            except OSError:  # a file system without hard links
                shutil.copy2(file, partial / file.name)
