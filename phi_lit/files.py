"""Writing so that a half-written file is never mistaken for a whole one.

Everything is written beside its destination, synced to the disk and renamed into place: a reader
sees the old content or the new, never a part. Leftovers of a killed writer carry `PARTIAL` in their
name and are removed by the next writer of the same path.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phi_lit.errors import UserError

PARTIAL = ".partial-"
"""Part of every unfinished name, `.<name>.partial-<process id>`: hidden from `step-*` globs."""


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}{PARTIAL}{os.getpid()}")


RETIRED = f"{PARTIAL}retired-"
"""Part of the name of a whole directory that is being replaced."""


def remove_leftovers(path: Path) -> None:
    """Remove what killed writers of `path` left beside it (a file or a directory).

    A writer killed between moving the old directory away and the new one in leaves no `path`: then
    the old one, which is whole, is put back first. While a living process writes `path`, nothing is
    touched.
    """
    if any(map(_in_use, path.parent.glob(f".{path.name}{PARTIAL}*"))):
        return
    retired = sorted(path.parent.glob(f".{path.name}{RETIRED}*"))
    if retired and not path.exists():
        os.rename(retired[0], path)
    for leftover in path.parent.glob(f".{path.name}{PARTIAL}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _in_use(partial: Path) -> bool:
    """Tell whether a process has locked this and lives (False where files cannot be locked)."""
    try:
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the lock that tells other processes that this is still being written."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        with suppress(OSError):  # this file system has none: then there is no telling
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Flush a file's, or a directory's entries', content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the disk's refusals while writing below `path` into a `UserError` of one line."""
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EFBIG: "the file size limit is reached",
            errno.EROFS: "the file system is read-only",
            errno.EACCES: "permission denied",
            errno.EPERM: "permission denied",
            errno.EEXIST: "a part of that path is a file, not a directory",
            errno.ENOTDIR: "a part of that path is a file, not a directory",
        }.get(error.errno or 0)
        if reason is None:
            raise
        raise UserError(
            f"cannot write {path}: {reason}. Nothing half-written was left behind; "
            "free some room or choose another directory."
        ) from error


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a small file whole or not at all (text as UTF-8).

    Raises:
        UserError: the disk is full, read-only or forbids it.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        partial = _partial(path)
        try:
            with open(partial, "wb") as file, _locked(partial):
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)


def refuse_current_directory(path: Path) -> None:
    """Raise a `UserError` if `path` is where this process, and most often a shell, stands."""
    if path.exists() and path.samefile(os.curdir):
        raise UserError(
            f"{path} is the current directory, which cannot be replaced while a shell is in it. "
            "Name a directory below it, or call from another one."
        )


def _move_in(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; what is there is moved away first and removed last."""
    if path.exists():
        retired = path.with_name(f".{path.name}{RETIRED}{os.getpid()}")
        os.rename(path, retired)
        os.rename(partial, path)
        shutil.rmtree(retired, ignore_errors=True)
    else:
        os.rename(partial, path)


@contextmanager
def staged_dir(path: Path) -> Iterator[Path]:
    """Build a directory beside `path`; on success sync it and rename it to `path`.

    A directory already at `path` is replaced, and is still whole if the process dies before the
    rename. On an exception nothing is left behind and `path` is as it was.

    Raises:
        UserError: the disk is full, read-only or forbids it, or `path` is the current directory.
    """
    refuse_current_directory(path)
    path = Path(os.path.abspath(path))  # "a/.." has no name to put the partial one beside
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        partial = _partial(path)
        partial.mkdir()
        try:
            with _locked(partial):
                yield partial
                for found in [*partial.rglob("*"), partial]:
                    sync(found)
                _move_in(partial, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync(path.parent)
