"""The file of completions: written line by line, gone on with after a kill, sorted at the end.

Beside `out.jsonl` lies `out.jsonl.settings.json`, which says what its lines were made with: a later
command goes on only with the same. Whatever was interrupted, the finished file is the same.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from phi_lit.errors import UserError
from phi_lit.files import disk_errors, write_atomic


def settings_path(path: Path) -> Path:
    """Return where the settings of a file of completions lie."""
    return path.with_name(f"{path.name}.settings.json")


class ResultFile:
    """A file of completions, open for more; get one from `open_results`."""

    def __init__(self, path: Path, file: IO[bytes], done: set[tuple[int, int]]) -> None:
        self.path, self.done = path, done
        """`done`: the (prompt, sample) that are in the file."""
        self._file = file

    def add(self, line: dict[str, Any]) -> None:
        """Write one completion, so that a kill of this process cannot lose it."""
        with disk_errors(self.path):
            self._file.write(to_line(line))
            self._file.flush()
        self.done.add((line["prompt_index"], line["sample"]))

    def finish(self) -> None:
        """Put the lines in order, by prompt and sample."""
        self._file.flush()
        lines = self.path.read_bytes().split(b"\n")[:-1]
        lines.sort(key=_order)
        write_atomic(self.path, b"\n".join([*lines, b""]))


def to_line(content: dict[str, Any]) -> bytes:
    """Return one line of JSON Lines."""
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


@contextmanager
def open_results(
    path: Path, settings: dict[str, Any], *, prompts: int, samples: int
) -> Iterator[ResultFile]:
    """Open a file of completions: a new one, or one that the same settings began.

    Args:
        path: the file; half a line at its end is cut off.
        settings: all that decides what is in the lines.
        prompts: number of prompts.
        samples: samples of each.

    Raises:
        UserError: the file was begun with other settings, is damaged, not ours, or being written.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UserError(f"{path} is a directory; --out names a file")
        with open(path, "ab+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path} is being written by another process") from None
            if os.fstat(file.fileno()).st_size:
                _check_settings(path, settings)
            else:
                write_atomic(settings_path(path), json.dumps(settings, indent=1) + "\n")
            yield ResultFile(path, file, _read_done(path, file, prompts, samples))


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    beside = settings_path(path)
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{path} is there, but not {beside.name} with what it was made with: it cannot be gone "
            "on with. Choose another --out, or remove it."
        ) from None
    now = json.loads(json.dumps(settings))
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        shown = ", ".join(_change(name, before.get(name), now.get(name)) for name in changed)
        raise UserError(
            f"{path} was begun with other settings ({shown}). Choose another --out, or the same "
            "settings to go on."
        )


def _change(name: str, before: Any, now: Any) -> str:
    long = any(len(str(value)) > 40 for value in (before, now))
    return f"{name} differs" if long else f"{name} was {before}, is now {now}"


def _read_done(path: Path, file: IO[bytes], prompts: int, samples: int) -> set[tuple[int, int]]:
    """Cut half a line off the file's end; return what the whole lines hold."""
    file.seek(0)
    done: set[tuple[int, int]] = set()
    end = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            break
        place = _place(line, prompts, samples)
        if place is None or place in done:
            raise UserError(
                f"{path}: line {number} is no completion of this run; remove that line, or choose "
                "another --out"
            )
        done.add(place)
        end += len(line)
    os.truncate(file.fileno(), end)
    file.seek(0, os.SEEK_END)
    return done


def _order(line: bytes) -> tuple[int, int]:
    content = json.loads(line)
    return content["prompt_index"], content["sample"]


def _place(line: bytes, prompts: int, samples: int) -> tuple[int, int] | None:
    """Return (prompt, sample) of a line, or None where it is no completion within the bounds."""
    try:
        content = json.loads(line)
        place = content["prompt_index"], content["sample"]
    except (ValueError, KeyError, TypeError):
        return None
    if all(type(n) is int for n in place) and 0 <= place[0] < prompts and 0 <= place[1] < samples:
        return place
    return None
