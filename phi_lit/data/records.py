"""What a file holds: one document of text, or a table's rows one after the other.

Tables are parquet, JSON and JSON Lines; any of the text formats may be compressed (.gz, .zst).
Everything is read piece by piece: no file is ever held whole, except a text file, which is one
document. A file or a row that cannot be read is counted, never fatal.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from phi_lit.data.trees import FoundFile, Skipped

PIECE = 1 << 20
"""Characters of a JSON file that are read at a time."""

LONGEST_ROW = 64 << 20
"""Characters of a JSON file after which a row that does not end is taken for damage."""

ROWS = 256
"""Rows of a parquet file that are decoded at a time."""

_COMPRESSIONS = (".gz", ".zst")


def suffix(name: str) -> str:
    """Return a file's kind: its last suffix in lower case, the compression's left out."""
    stem = name.lower()
    for ending in _COMPRESSIONS:
        stem = stem.removesuffix(ending)
    return os.path.splitext(stem)[1]


def is_table(name: str) -> bool:
    """Tell whether a file of that name holds rows with columns, not one document."""
    return suffix(name) in (".parquet", ".json", ".jsonl", ".ndjson")


def read_text(file: FoundFile, skipped: Skipped) -> str | None:
    """Return a file's text without a byte order mark, or None where it is not UTF-8 text."""
    try:
        with _open(file.path) as stream:
            content = stream.read()
    except (OSError, EOFError):
        skipped.add("unreadable", file.name)
        return None
    if b"\0" in content:
        skipped.add("binary", file.name)
        return None
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        skipped.add("not UTF-8", file.name)
        return None


def read_rows(
    file: FoundFile, skipped: Skipped, columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a table file's rows as dicts.

    Args:
        file: a file of which `is_table` is true.
        skipped: gets the file if it is damaged, or its rows that are not objects.
        columns: only these are decoded where the format allows it; those that a file lacks are
            left out.
    """
    kind = suffix(file.name)
    read = {".parquet": _parquet, ".json": _json}.get(kind, _json_lines)
    try:
        yield from read(file, skipped, columns)
    except (OSError, EOFError, ValueError, RecursionError):
        skipped.add("damaged", file.name)


def column_names(file: FoundFile) -> list[str] | None:
    """Return a parquet file's columns (None for other formats, which have no schema)."""
    if suffix(file.name) != ".parquet":
        return None
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(file.path).names)
    except (OSError, ValueError, pyarrow.ArrowException):
        return None


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    if path.lower().endswith(".gz"):
        try:
            with gzip.open(path, "rb") as stream:
                yield cast(IO[bytes], stream)
        except zlib.error as error:
            raise OSError(str(error)) from error
    elif path.lower().endswith(".zst"):
        import zstandard

        try:
            with open(path, "rb") as raw:
                reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                with io.BufferedReader(reader) as stream:
                    yield stream
        except zstandard.ZstdError as error:
            raise OSError(str(error)) from error
    else:
        with open(path, "rb") as stream:
            yield stream


def _parquet(
    file: FoundFile, skipped: Skipped, columns: list[str] | None
) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            names = table.schema_arrow.names
            kept = None if columns is None else [name for name in names if name in columns]
            for batch in table.iter_batches(batch_size=ROWS, columns=kept):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:  # only some of them are ValueErrors
        raise OSError(str(error)) from error


def _json_lines(
    file: FoundFile, skipped: Skipped, columns: list[str] | None
) -> Iterator[dict[str, Any]]:
    with _open(file.path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                skipped.add("not UTF-8", f"{file.name}:{number}")
                continue
            except (ValueError, RecursionError):  # the latter: nested too deeply
                skipped.add("not JSON", f"{file.name}:{number}")
                continue
            if isinstance(row, dict):
                yield row
            else:
                skipped.add("not an object", f"{file.name}:{number}")


def _json(file: FoundFile, skipped: Skipped, columns: list[str] | None) -> Iterator[dict[str, Any]]:
    """Read one array of objects, or objects one after the other, with whatever space between."""
    decoder = json.JSONDecoder()
    with _open(file.path) as stream, io.TextIOWrapper(stream, "utf-8-sig") as text:
        pending, number = text.read(PIECE), 0
        while True:
            pending = pending.lstrip(" \t\r\n,[]")  # what stands between rows
            try:
                row, end = decoder.raw_decode(pending)
            except ValueError:
                if len(pending) >= LONGEST_ROW:
                    raise
                piece = text.read(max(PIECE, len(pending)))  # doubling: a long row is not quadratic
                if not piece:
                    if pending:
                        raise
                    return
                pending += piece
                continue
            number += 1
            pending = pending[end:]
            if isinstance(row, dict):
                yield row
            else:
                skipped.add("not an object", f"{file.name}, row {number}")
