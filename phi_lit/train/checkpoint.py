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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phi_lit.errors import UserError
from phi_lit.files import disk_errors, staged_dir, write_atomic
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


# --------------------------------------------------------------------------------- reading


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


def is_whole(directory: Path) -> bool:
    """Tell whether a directory is a whole checkpoint of this loop."""
    try:
        read_manifest(directory)
    except UserError:
        return False
    return True


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
