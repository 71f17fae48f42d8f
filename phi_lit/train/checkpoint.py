"""Checkpoints: either whole or not there, free of pickled code, readable by every `litgpt` command.

A checkpoint directory is a LitGPT checkpoint (`lit_model.pth`, `model_config.yaml`, tokenizer,
prompt style) with two files more: `training_state.pth` (optimizer, place, loss scale) and
`checkpoint.json` (sizes of all files, what the run was). It is built beside its place, synced and
renamed; `latest` is linked last. State is kept by parameter name and in whole tensors, so any
number of ranks can resume what any other number saved.
"""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phi_lit.errors import UserError
from phi_lit.files import PARTIAL, disk_errors, staged_dir, write_atomic
from phi_lit.tensors import load_file
from phi_lit.train.state import joined, parts_of

FORMAT = 1
MODEL_FILE = "lit_model.pth"
STATE_FILE = "training_state.pth"
MANIFEST = "checkpoint.json"
SHARD_FILE = "shard-{rank:05d}-of-{world:05d}.pth"


@dataclass
class Place:
    """Where a run is: everything beside the weights and the optimizer that a resume needs."""

    step: int = 0
    """Optimizer steps done."""
    rows: int = 0
    """Rows consumed by all ranks together."""
    skipped: int = 0
    """Steps left out because their loss, or under a loss scale their gradient, was not finite."""
    micro_batch_size: int = 0
    """Rows per forward pass, as resolved when `auto` was asked for."""
    compiled: bool = False
    """Whether the blocks run compiled, as decided when `auto` was asked for."""
    scaler: dict[str, Any] = field(default_factory=dict)
    """State of the fp16 loss scale."""
    val_loss: float | None = None
    """Held-out loss at this step, where it was measured."""


def save_file(content: Any, path: Path) -> None:
    """Write tensors and plain values.

    Raises:
        OSError: the disk refuses (torch alone says so as a RuntimeError without its number).
    """
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            file.flush()  # raises what the disk said, if that was it
            raise OSError(errno.ENOSPC, str(error).splitlines()[0]) from error


def weights_of(checkpoint_dir: Path) -> dict[str, Tensor]:
    """Return the model weights in a LitGPT checkpoint directory, by LitGPT's parameter names."""
    state = load_file(checkpoint_dir / MODEL_FILE)
    state = state.get("model", state)
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}


def load_weights(model: nn.Module, checkpoint_dir: Path) -> None:
    """Fill `model` from a LitGPT checkpoint directory, which must fit it exactly."""
    found, wanted = weights_of(checkpoint_dir), model.state_dict()
    faults = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    faults += [f"{name} is unknown to the model" for name in found.keys() - wanted.keys()]
    faults += [
        f"{name} is {tuple(found[name].shape)}, the model's is {tuple(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    if faults:
        raise UserError(
            f"{checkpoint_dir / MODEL_FILE} does not fit the model: {sorted(faults)[0]}"
            f" ({len(faults)} such differences); choose the model it was saved from"
        )
    model.load_state_dict(found)


# ------------------------------------------------------------------------------------------ saving


def _manifest(directory: Path, place: Place, identity: dict[str, Any], sharded: bool) -> str:
    sizes = {
        str(file.relative_to(directory)): file.stat().st_size
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    return json.dumps(
        {
            "format": FORMAT,
            "step": place.step,
            "rows": place.rows,
            "val_loss": place.val_loss,
            "sharded": sharded,
            "files": sizes,
            "run": identity,
        },
        indent=1,
    )


def write_whole(
    directory: Path,
    model_state: dict[str, Tensor],
    optimizer_state: dict[str, Any],
    place: Place,
    identity: dict[str, Any],
    write_side_files: Callable[[Path], None],
    *,
    weights_file: str = MODEL_FILE,
) -> None:
    """Write a checkpoint of whole tensors; called on rank 0 only."""
    with staged_dir(directory) as partial:
        save_file({"model": model_state}, partial / weights_file)
        save_file({"optimizer": optimizer_state, **vars(place)}, partial / STATE_FILE)
        write_side_files(partial)
        (partial / MANIFEST).write_text(_manifest(partial, place, identity, sharded=False))


def write_sharded(
    directory: Path,
    model_state: dict[str, Any],
    optimizer_state: dict[str, Any],
    place: Place,
    identity: dict[str, Any],
    write_side_files: Callable[[Path], None],
    *,
    rank: int,
    world: int,
    together: Callable[[Callable[[], None] | None], None],
) -> None:
    """Write one file of shards per rank; called on every rank (on a file system they share).

    `together` does this rank's part and waits for the others; where one fails, all end.
    """
    staging = directory.with_name(f".{directory.name}.shards")
    shard = {"model": parts_of(model_state), "optimizer": parts_of(optimizer_state)}

    def prepare() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)

    def write() -> None:
        with disk_errors(staging):
            save_file(shard, staging / SHARD_FILE.format(rank=rank, world=world))

    def finish() -> None:
        with staged_dir(directory) as partial:
            for file in staging.iterdir():
                os.rename(file, partial / file.name)
            save_file(vars(place), partial / STATE_FILE)
            write_side_files(partial)
            (partial / MANIFEST).write_text(_manifest(partial, place, identity, sharded=True))
        staging.rmdir()

    together(prepare if rank == 0 else None)
    together(write)
    together(finish if rank == 0 else None)


class Background:
    """At most one checkpoint being written by a thread; its error surfaces at the next `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Wait for the previous write, then start this one."""
        self.wait()

        def run() -> None:
            try:
                write()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint-writer")
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written, and raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


# --------------------------------------------------------------------------------- finding, reading


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest after checking that every file is there in full.

    Raises:
        UserError: it is no training checkpoint of ours, of another format, or cut short.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{directory} cannot be resumed from: it has no {MANIFEST}, so it is not a checkpoint "
            "of this loop. To start from its weights give it as initial_checkpoint_dir"
        )
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError:
        raise UserError(f"{path} is not whole") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has format {manifest.get('format')}; this version reads {FORMAT}")
    for name, size in manifest["files"].items():
        file = directory / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes of {size}"
            raise UserError(f"{directory} is not whole: {name} {state}")
    return manifest


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


def differences(saved: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Return what differs between two descriptions of a run, one phrase each."""
    found = []
    for key in sorted(saved.keys() | now.keys()):
        old, new = saved.get(key), now.get(key)
        name = f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name} was {old!r} and is {new!r}")
    return found


def read_state(
    directory: Path, manifest: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any], Place]:
    """Return (model state, optimizer state, place) of a checkpoint, tensors memory-mapped."""
    state = load_file(directory / STATE_FILE)
    if manifest["sharded"]:
        shards = [load_file(file) for file in sorted(directory.glob("shard-*.pth"))]
        model_state = joined([shard["model"] for shard in shards])
        optimizer_state = joined([shard["optimizer"] for shard in shards])
    else:
        (weights_file,) = (name for name in manifest["files"] if name.startswith(MODEL_FILE))
        model_state = load_file(directory / weights_file)["model"]
        optimizer_state = state.pop("optimizer")
    return model_state, optimizer_state, Place(**state)


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


def is_whole(directory: Path) -> bool:
    """Tell whether a directory is a whole checkpoint of this loop."""
    try:
        read_manifest(directory)
    except UserError:
        return False
    return True


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


def consolidate(checkpoint_dir: Path) -> None:
    """Join the shards of a checkpoint into one `lit_model.pth`, in place.

    Afterwards every litgpt command opens the directory; resuming from it still works.

    Args:
        checkpoint_dir: a directory saved with train.checkpoint_format: sharded.
    """
    checkpoint_dir = Path(checkpoint_dir)
    manifest = read_manifest(checkpoint_dir)
    if not manifest["sharded"]:
        print(f"{checkpoint_dir} already holds whole tensors: nothing to do")
        return
    model_state, _, place = read_state(checkpoint_dir, manifest)
    with staged_dir(checkpoint_dir / "joined") as partial:
        save_file({"model": model_state}, partial / MODEL_FILE)
    os.replace(checkpoint_dir / "joined" / MODEL_FILE, checkpoint_dir / MODEL_FILE)
    (checkpoint_dir / "joined").rmdir()
    write_atomic(
        checkpoint_dir / MANIFEST,
        _manifest(checkpoint_dir, place, manifest["run"], sharded=True),
    )
    print(f"{checkpoint_dir / MODEL_FILE}: {len(model_state)} tensors")
