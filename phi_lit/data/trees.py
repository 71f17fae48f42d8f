"""Finding files: a path, a directory or a glob, walked in sorted order and never held as a list.

A directory tree on a disk may hold loops, dangling links, pipes and files without read permission:
they are counted by reason and named in a report, never fatal. What the files hold is read elsewhere
(`records.py`).
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from stat import S_ISREG
from typing import Any, NamedTuple

from phi_lit.errors import UserError

EXAMPLES_KEPT = 20
"""How many skipped things a report names; the rest are only counted."""

_MAGIC = re.compile(r"[*?\[]")


@dataclass
class Skipped:
    """What a source left out: how many for each reason, and the names of the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, name: str) -> None:
        """Count one more thing left out."""
        self.counts[reason] += 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{name} ({reason})")

    def report(self) -> dict[str, Any]:
        """Return the counts and names as plain JSON values."""
        return {"counts": dict(sorted(self.counts.items())), "examples": list(self.examples)}

    def __str__(self) -> str:
        return ", ".join(f"{n:,} {reason}" for reason, n in sorted(self.counts.items()))


class FoundFile(NamedTuple):
    """A regular file: `name` is its path below the directory asked for, with slashes."""

    name: str
    path: str


def find_files(
    entry: str, skipped: Skipped, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[FoundFile]:
    """Yield the files that `entry` means, sorted by their path parts.

    Args:
        entry: a file, a directory (all files below it) or a glob, in which `*` stays within one
            path part and `**` spans any number of them; `~` is the home directory.
        skipped: gets what could not be followed.
        wanted: which names of a directory's files to yield; a file or glob is taken at its word.

    Hidden directories and `__pycache__` are not entered, unless a glob names them.

    Raises:
        UserError: nothing is at that path, or the directory that the glob starts in is missing.
    """
    entry = os.path.expanduser(entry)
    if _MAGIC.search(entry):
        yield from _glob(entry, skipped)
    elif os.path.isdir(entry):
        yield from _walk(entry, "", skipped, wanted, hidden=False)
    elif os.path.lexists(entry):
        yield from _one(entry, os.path.basename(entry), skipped)
    else:
        raise UserError(f"{entry}: no such file or directory (a source's `path`).")


def _glob(pattern: str, skipped: Skipped) -> Iterator[FoundFile]:
    parts = PurePath(pattern).parts
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    base = os.path.join(*parts[:first]) if first else "."
    if not os.path.isdir(base):
        raise UserError(f"{pattern}: the directory {base} does not exist (a source's `path`).")
    rest = parts[first:]
    try:
        names = re.compile(_glob_regex(rest))
    except re.error as error:
        raise UserError(f"{pattern}: not a glob: {error.msg} (a source's `path`).") from None
    hidden = any(part.startswith(".") for part in rest)
    yield from _walk(base, "", skipped, lambda name: names.fullmatch(name) is not None, hidden)


def _glob_regex(parts: tuple[str, ...]) -> str:
    """Translate glob parts to a regular expression over names with slashes."""
    pieces: list[str] = []
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if part == "**":
            pieces.append(".*" if last else "(?:[^/]+/)*")
            continue
        for token in re.findall(r"\[(?!!\])[^\]]+\]|.", part, re.DOTALL):
            if token == "*":
                pieces.append("[^/]*")
            elif token == "?":
                pieces.append("[^/]")
            elif len(token) > 1:
                inner = re.sub(r"([\\^\[&~|])", r"\\\1", token[1:-1])
                pieces.append(f"(?!/)[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]")
            else:
                pieces.append(re.escape(token))
        if not last:
            pieces.append("/")
    return "(?s:" + "".join(pieces) + ")"


def _walk(
    directory: str,
    name: str,
    skipped: Skipped,
    wanted: Callable[[str], bool],
    hidden: bool,
    above: tuple[tuple[int, int], ...] = (),
) -> Iterator[FoundFile]:
    """Walk one directory; `above` are the device and inode numbers of those it lies in."""
    try:
        here = os.stat(directory)
        with os.scandir(directory) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        skipped.add("unreadable", name or directory)
        return
    identity = (here.st_dev, here.st_ino)
    if identity in above:
        skipped.add("symlink loop", name)
        return
    for entry in entries:
        below = f"{name}/{entry.name}" if name else entry.name
        try:
            is_directory = entry.is_dir()
        except OSError:  # ELOOP: a link that leads to itself
            skipped.add("symlink loop", below)
            continue
        if is_directory:
            if hidden or not (entry.name.startswith(".") or entry.name == "__pycache__"):
                yield from _walk(entry.path, below, skipped, wanted, hidden, (*above, identity))
        elif wanted(below):
            yield from _one(entry.path, below, skipped)


def _one(path: str, name: str, skipped: Skipped) -> Iterator[FoundFile]:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        skipped.add("unreadable", name)
        return
    if S_ISREG(mode):
        yield FoundFile(name, path)
    else:
        skipped.add("not a regular file", name)
