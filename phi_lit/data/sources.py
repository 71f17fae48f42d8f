"""Where text comes from: hub data sets, local files and trees, and Python's own standard library.

A source is written in YAML as a word or a mapping; `open_source` makes it a `Source`, which
describes itself (so that a store of tokens knows when it is stale) and yields documents in one
fixed order, one at a time. Nothing here knows about tokens. What a file holds is read by
`records.py`, public data sets by name are in `presets.py`.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import MISSING, dataclass, field, fields
from itertools import islice
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

from phi_lit.data import standard_library as python_library
from phi_lit.data.gutenberg import strip_boilerplate
from phi_lit.data.hub import read_hub
from phi_lit.data.presets import PRESETS, Preset, find_preset, refuse_ids_only
from phi_lit.data.records import column_names, is_table, read_rows, read_text, suffix
from phi_lit.data.tables import RowText
from phi_lit.data.trees import FoundFile, Skipped, find_files
from phi_lit.errors import UserError, did_you_mean

CHECKED_ROWS = 64
"""Rows of a table that are looked at before anything is written."""

Boilerplate = Literal["gutenberg"]

DEFAULT_SUFFIXES = [".py", ".md", ".rst", ".txt", ".parquet", ".jsonl", ".ndjson"]


class Document(NamedTuple):
    """One file, chapter or table row: `id` says where it came from, `text` is what it holds."""

    id: str
    text: str


class RowReader(Protocol):
    """What makes a document of a table's row, and knows which columns that takes."""

    def needed(self) -> list[str]:
        """Return the columns worth decoding, some of which a table may lack."""

    def keeps(self, row: dict[str, Any]) -> bool:
        """Tell whether the row is wanted."""

    def text(self, row: dict[str, Any]) -> str | None:
        """Return the row's document, or None where it has none."""

    def check_names(self, names: Iterable[str]) -> None:
        """Raise a `UserError` unless the columns needed are among those that a table has."""

    def check_rows(self, rows: list[dict[str, Any]]) -> None:
        """Raise a `UserError` if a table's first rows hold no text."""


class NoText(UserError):
    """The sources hold nothing that a store could be made of, however often it is tried."""


@dataclass
class Source:
    """One place that text comes from. Exactly one of `preset`, `hub`, `path`, `stdlib` is given."""

    preset: str | None = None
    """A public data set by short name (`phi_lit.data.presets`); other keys refine it."""
    hub: str | None = None
    """A data set's id on the Hugging Face hub, or a local directory laid out like one."""
    path: str | list[str] | None = None
    """Files, directories or globs: .parquet, .json, .jsonl/.ndjson are tables of rows, everything
    else is one document a file; text formats may end in .gz or .zst."""
    stdlib: bool = False
    """Python's standard library and the prose of its language reference: no download."""
    name: str | None = None
    """What reports call this source."""
    weight: float = 1.0
    """How many times a pass over the training split reads this source: 2 reads every document
    twice, 0.5 keeps a fixed half of them (chosen by the text's hash). Documents held out for
    validation are never repeated."""
    columns: str | list[str] | None = None
    """The text columns of a table, joined by a blank line; by default `text` or `content`."""
    template: str | None = None
    """In place of `columns`: a text with `{column}` where a row's values go."""
    where: dict[str, Any] = field(default_factory=dict)
    """Keep only rows whose columns have these values (a list: any of them)."""
    strip: Boilerplate | None = None
    """What surrounds every text and is cut off: `gutenberg`, the header and the licence that
    Project Gutenberg puts around a book. A text without its markers stays as it is."""
    max_documents: int | None = None
    """Stop after that many documents."""
    suffixes: list[str] = field(default_factory=lambda: list(DEFAULT_SUFFIXES))
    """Which files of a directory are read (a file or a glob is taken at its word). `.json` is not
    among the defaults: in a tree of code such files are settings, not tables with a text column."""
    config: str | None = None
    """The hub data set's configuration."""
    split: str = "train"
    """The hub data set's split."""
    revision: str | None = None
    """A commit, tag or branch on the hub; a commit makes the tokens reproducible."""
    data_files: str | None = None
    """Files inside the hub repository, as a glob, in place of its configurations."""
    streaming: bool = True
    """Read the hub data set as it downloads, without storing it first."""
    licence: str | None = None
    """Its terms, for the reports."""

    skipped: Skipped = field(default_factory=Skipped, init=False, repr=False, compare=False)
    commit: str | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._note = ""
        if self.preset is not None:
            self._take_from_preset(self.preset)
        given = [key for key in ("hub", "path", "stdlib") if getattr(self, key)]
        if len(given) != 1:
            raise UserError(
                f"a source needs exactly one of preset, hub, path, stdlib; found "
                f"{' and '.join(given) or 'none'} in {self._written()}."
            )
        if self.hub is not None:
            refuse_ids_only(self.hub, self.config)
        if self.strip not in (None, *get_args(Boilerplate)):
            raise UserError(
                f"{self.label}: strip is {self.strip!r}; it can be "
                f"{' or '.join(get_args(Boilerplate))}."
            )
        self.rows = self._reader()
        if not 0 < self.weight <= 1000:
            raise UserError(f"{self.label}: weight is {self.weight}; choose above 0, at most 1000.")
        if self.max_documents is not None and self.max_documents < 1:
            raise UserError(f"{self.label}: max_documents is {self.max_documents}; at least 1.")
        if self.stdlib and self.licence is None:
            self.licence = python_library.LICENCE

    def _take_from_preset(self, name: str) -> None:
        preset = find_preset(name)
        for key in ("hub", "config", "data_files", "licence", "strip"):
            if getattr(self, key) is None:
                setattr(self, key, getattr(preset, key))
        self._take_columns(preset)
        self.where = {**preset.where, **self.where}
        self._note = preset.note

    def _take_columns(self, preset: Preset) -> None:
        if self.columns is None and self.template is None:
            self.columns, self.template = preset.columns, preset.template

    def _reader(self) -> "RowReader":
        """Return what makes documents of rows."""
        return RowText(self.label, self.columns, self.template, self.where)

    @property
    def label(self) -> str:
        """What reports and errors call this source."""
        if self.name:
            return self.name
        if self.stdlib:
            return "stdlib"
        if self.preset:
            return self.preset
        if self.hub:
            return f"{self.hub}/{self.config}" if self.config else self.hub
        return ", ".join(self._paths())

    def licence_line(self) -> str:
        """Return one line that says what this source is and under which terms."""
        where = f" ({self.hub})" if self.hub and self.hub != self.label else ""
        terms = self.licence or "not stated; yours to know"
        return f"{self.label}{where}: licence {terms}{f'; {self._note}' if self._note else ''}"

    # Describing

    def describe(self) -> dict[str, Any]:
        """Return everything that decides this source's documents, as JSON values.

        Local files are described by a digest of their names, sizes and modification times, so this
        walks them. A hub data set is described as it was asked for: pin `revision` to a commit if
        it must never change.
        """
        written = self._written()
        for key in ("name", "licence"):  # they decide no token
            written.pop(key, None)
        written = json.loads(json.dumps(written, default=str))  # YAML has dates, JSON has not
        if self.stdlib:
            written["python"] = ".".join(map(str, sys.version_info[:3]))
            return {**written, "files": _listing(python_library.code_files(Skipped()))}
        if self.hub is None:
            return {**written, "files": _listing(self._files(Skipped()))}
        if os.path.isdir(self.hub):
            return {**written, "files": _listing(find_files(self.hub, Skipped()))}
        return written

    def _written(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults."""
        written = {}
        for item in fields(self):
            default = item.default if item.default_factory is MISSING else item.default_factory()
            value = getattr(self, item.name)
            if item.init and value != default:
                written[item.name] = copy(value)
        return written

    # Reading

    def check(self) -> None:
        """Look at the first documents and raise if this source cannot be trained on.

        Raises:
            UserError: nothing there, a column is missing, holds no text or is empty in every row.
        """
        if self.stdlib:
            return
        if self.hub is None:
            self._check_paths()
        rows = [row for _, row in islice(self._rows(Skipped()), CHECKED_ROWS)]
        if rows:
            self.rows.check_rows(rows)
        elif next(self.documents(), None) is None:
            raise self.empty()

    def documents(self) -> Iterator[Document]:
        """Yield the documents, always in the same order; what is left out goes to `skipped`."""
        self.skipped = Skipped()
        found = 0
        for identity, text in self._texts():
            if text is not None and self.strip is not None:
                text = strip_boilerplate(text)
            if text is None:
                self.skipped.add("without text", identity)
            elif not text.strip():
                self.skipped.add("empty", identity)
            elif not is_unicode(text):
                self.skipped.add("not Unicode text", identity)
            else:
                yield Document(identity, text)
                found += 1
                if found == self.max_documents:
                    return

    def empty(self) -> NoText:
        """Return the error that says this source gave no document, and what it skipped."""
        why = f": it skipped {self.skipped}" if self.skipped.counts else ""
        names = f", such as {self.skipped.examples[0]}" if self.skipped.examples else ""
        filtered = f" (only rows with {self.where} are kept)" if self.where else ""
        return NoText(f"{self.label} holds no text to train on{filtered}{why}{names}.")

    def _texts(self) -> Iterator[tuple[str, str | None]]:
        """Yield a name and the text of everything here, None where it has none."""
        if self.stdlib:
            yield from self._file_texts(python_library.code_files(self.skipped))
            yield from python_library.chapters()
        elif self.hub is None:
            yield from self._file_texts(self._files(self.skipped))
        for identity, row in self._rows(self.skipped):
            if self.rows.keeps(row):
                yield identity, self.rows.text(row)

    def _file_texts(self, files: Iterator[FoundFile]) -> Iterator[tuple[str, str | None]]:
        for file in files:
            if not is_table(file.name) and (text := read_text(file, self.skipped)) is not None:
                yield file.name, text

    # Local files

    def _paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path or [])

    def _files(self, skipped: Skipped) -> Iterator[FoundFile]:
        for path in self._paths():
            yield from find_files(path, skipped, self._wants)

    def _wants(self, name: str) -> bool:
        return suffix(name) in self.suffixes

    def _check_paths(self) -> None:
        for path in self._paths():
            skipped = Skipped()
            if next(find_files(path, skipped, self._wants), None) is None:
                what = f" (it skipped {skipped}: {skipped.examples[0]})" if skipped.counts else ""
                only = f" with {' '.join(self.suffixes)}" if os.path.isdir(path) else ""
                raise UserError(
                    f"{path}: no file{only} found{what} (a source's `path`).{self._hint(path)}"
                )

    def _hint(self, path: str) -> str:
        """Return how to read the .json files of a directory, if it has any."""
        if not os.path.isdir(path):
            return ""
        tables = find_files(path, Skipped(), lambda name: suffix(name) == ".json")
        return " It has .json files: name `suffixes: [.json]` to read them." if any(tables) else ""

    def _rows(self, skipped: Skipped) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield a name and the columns of every row of the tables here."""
        if self.hub is not None:
            yield from read_hub(self)
        elif self.path is not None:
            for file in self._files(Skipped()):
                if is_table(file.name):
                    names = column_names(file)
                    if names is not None:
                        self.rows.check_names(names)
                    for number, row in enumerate(read_rows(file, skipped, self.rows.needed())):
                        yield f"{file.name}#{number}", row


def standard_library() -> Source:
    """Return the embedded default: Python's standard library and its language reference."""
    return Source(stdlib=True)


Spec = str | dict[str, Any] | Source
"""A source as `open_source` takes it."""

Kind = TypeVar("Kind", bound=Source)


def open_source(spec: Spec, kind: type[Kind] = Source) -> Kind:  # type: ignore[assignment]
    """Make a source of what a YAML says.

    Args:
        spec: `stdlib`; a preset's name; a path or glob; a hub id (`owner/name`); a mapping with the
            fields of `Source`; or a `Source`.
        kind: the class of source to make.

    Raises:
        UserError: an unknown word or key, or a source that holds no text.
    """
    if isinstance(spec, kind):
        return spec
    if isinstance(spec, str):
        return _from_word(spec, kind)
    if not isinstance(spec, dict):
        raise UserError(f"a source is a word or a mapping, not {type(spec).__name__}: {spec!r}.")
    allowed = [item.name for item in fields(kind) if item.init]
    unknown = [key for key in spec if key not in allowed]
    if unknown:
        raise UserError(
            f"a source has no key {unknown[0]!r}.{did_you_mean(str(unknown[0]), allowed)} "
            f"Keys: {', '.join(allowed)}."
        )
    _check_types(spec)
    return kind(**spec)


def open_sources(
    specs: Spec | Sequence[Spec],
    kind: type[Kind] = Source,  # type: ignore[assignment]
) -> list[Kind]:
    """Make sources of what a YAML says: one, which needs no brackets, or a list of them.

    Raises:
        UserError: see `open_source`.
    """
    if isinstance(specs, str | dict | Source):
        specs = [specs]
    return [open_source(spec, kind) for spec in specs]


def _from_word(word: str, kind: type[Kind]) -> Kind:
    if word == "stdlib":
        return kind(stdlib=True)
    if word in PRESETS:
        return kind(preset=word)
    if os.path.lexists(word) or word.startswith((".", "/", "~")) or set(word) & set("*?["):
        return kind(path=word)
    if word.count("/") == 1 and all(word.split("/")) and not suffix(word):
        return kind(hub=word)
    options = ["stdlib", *(key for key, preset in PRESETS.items() if not preset.refused)]
    raise UserError(
        f"source {word!r} is no path that exists here, no preset and no hub id (owner/name)."
        f"{did_you_mean(word, options)} Presets: {', '.join(options)}."
    )


_TYPES: dict[str, tuple[type, ...]] = {
    "path": (str, list),
    "stdlib": (bool,),
    "weight": (int, float),
    "columns": (str, list),
    "where": (dict,),
    "max_documents": (int,),
    "suffixes": (list,),
    "streaming": (bool,),
}


def _check_types(spec: dict[str, Any]) -> None:
    for key, value in spec.items():
        allowed = _TYPES.get(key, (str,))
        wrong = not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)
        if value is not None and wrong:
            names = " or ".join(kind.__name__ for kind in allowed)
            raise UserError(f"a source's {key} must be {names}, not {value!r}.")
        if isinstance(value, list | dict) and not all(isinstance(part, str) for part in value):
            parts = "keys that are" if isinstance(value, dict) else "only"
            raise UserError(f"a source's {key} must hold {parts} str, not {value!r}.")


def _listing(files: Iterator[FoundFile]) -> dict[str, Any]:
    """Return the number, bytes and a digest of names, sizes and times of files: constant size."""
    digest, count, size = hashlib.sha256(), 0, 0
    for file in files:
        status = os.stat(file.path)
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(*_NAMES))
        count += 1
        size += status.st_size
    return {"count": count, "bytes": size, "digest": digest.hexdigest()}


_NAMES = ("utf-8", "surrogateescape")  # a file's name may be any bytes


def is_unicode(text: str) -> bool:
    """Tell whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, as JSON's escapes can spell it
        return False
    return True
