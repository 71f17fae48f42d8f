"""Questions with answers: which columns of a table, or which functions, make an example.

An `ExampleSource` is a `Source` whose rows are examples. As documents (a question and its answer,
one after the other) they go into a token store like any text; as examples their parts stay apart,
so that only the answer is learned. How they are encoded is in `example_store.py`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from phi_lit.data import documented
from phi_lit.data.presets import PRESETS, Preset
from phi_lit.data.sources import Document, NoText, Source, is_unicode
from phi_lit.data.tables import RowText
from phi_lit.data.trees import Skipped
from phi_lit.errors import UserError


class Example(NamedTuple):
    """A question and the answer to learn; `id` says where it came from."""

    id: str
    prompt: str
    answer: str
    system: str = ""
    """A message to the model before the question; none if empty."""
    has_doctest: bool = False
    """Whether the question shows calls with their results, by which an answer can be checked."""


class Columns(NamedTuple):
    """Which columns (or templates with `{column}`) hold an example's parts."""

    prompt: str
    answer: str
    system: str | None = None
    context: str | None = None
    """Follows the prompt after a blank line, in rows where it is not empty."""


KNOWN_COLUMNS = (
    Columns("problem", "solution"),
    Columns("question", "response", system="system_prompt"),
    Columns("question", "response"),
    Columns("prompt", "response"),
    Columns("prompt", "completion"),
    Columns("instruction", "output", context="input"),
    Columns("instruction", "output"),
    Columns("instruction", "response"),
    Columns("question", "answer"),
)
"""What is looked for where no column is named; the first whose columns are all there."""


class ExampleRows:
    """Makes examples of a table's rows; to a `Source` it is what `RowText` is for text.

    Args:
        label: what errors call the source.
        columns: where the parts are, or None to find them by `KNOWN_COLUMNS`.
        where: values that columns must have.
    """

    def __init__(self, label: str, columns: Columns | None, where: dict[str, Any]) -> None:
        self._label, self._columns, self._where = label, columns, where
        self._parts: tuple[RowText | None, ...] = ()
        if columns is not None:
            self._choose(columns)

    def _choose(self, columns: Columns) -> None:
        self._parts = tuple(
            None
            if part is None
            else RowText(self._label, template=part, where=self._where)
            if "{" in part
            else RowText(self._label, columns=part, where=self._where)
            for part in columns
        )

    def _find(self, names: Iterable[str]) -> None:
        """Choose the columns by the names that are there, unless they were given."""
        if self._parts:
            return
        has = sorted(names)
        for columns in KNOWN_COLUMNS:
            if all(part in has for part in columns if part is not None):
                self._choose(columns)
                return
        raise UserError(
            f"{self._label}: it has the columns {', '.join(has)}, of which none are known to hold "
            "a question and an answer; name them with `prompt` and `answer`."
        )

    def needed(self) -> list[str]:
        """Return the columns worth decoding, some of which a table may lack."""
        if not self._parts:
            known = [part for columns in KNOWN_COLUMNS for part in columns if part]
            return list(dict.fromkeys([*known, *self._where]))
        return [name for part in self._parts if part is not None for name in part.needed()]

    def keeps(self, row: dict[str, Any]) -> bool:
        """Tell whether the row has the values that `where` asks for."""
        return RowText(self._label, columns="", where=self._where).keeps(row)

    def check_names(self, names: Iterable[str]) -> None:
        """Raise a `UserError` unless the columns needed are among those that a table has."""
        has = list(names)
        self._find(has)
        for part in self._parts:
            if part is not None:
                part.check_names(has)

    def check_rows(self, rows: list[dict[str, Any]]) -> None:
        """Raise a `UserError` if a table's first rows hold no questions or no answers."""
        self.check_names({name: None for row in rows for name in row})
        for part in self._parts[:2]:
            assert part is not None
            part.check_rows(rows)

    def text(self, row: dict[str, Any]) -> str | None:
        """Return the row's example as one text, or None where a part is missing."""
        example = self.example("", row)
        return None if isinstance(example, str) else as_text(example)

    def example(self, identity: str, row: dict[str, Any]) -> Example | str:
        """Return the row's example, or why there is none."""
        self._find(row)
        prompt, answer, system, context = (
            None if part is None else part.text(row) for part in self._parts
        )
        for name, value in (("question", prompt), ("answer", answer)):
            if value is None:
                return f"without {name}"
            if not value.strip():
                return f"with an empty {name}"
        assert prompt is not None
        assert answer is not None
        if context and context.strip():
            prompt = f"{prompt}\n\n{context}"
        return Example(identity, prompt, answer, (system or "").strip())


def as_text(example: Example) -> str:
    """Return an example as one document: its parts, with what separates them where nothing does."""
    system = f"{example.system}\n\n" if example.system else ""
    between = "" if example.prompt[-1].isspace() or example.answer[0].isspace() else "\n\n"
    return f"{system}{example.prompt}{between}{example.answer}"


@dataclass
class ExampleSource(Source):
    """A source of examples; `stdlib` are the standard library's functions, docstring -> body."""

    prompt: str | None = None
    """The column of the question, or a template with `{column}` where a row's values go. With
    neither `prompt` nor `answer` they are found by their usual names."""
    answer: str | None = None
    """The column (or template) of the answer."""
    system: str | None = None
    """The column (or template) of the message before the question; it may be empty."""
    suffixes: list[str] = field(default_factory=lambda: [".parquet", ".jsonl", ".ndjson", ".json"])
    """Which files of a directory are read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns is not None or self.template is not None:
            raise UserError(
                f"{self.label}: examples have no `columns` or `template`; name the column of the "
                "question as `prompt` and that of the answer as `answer`."
            )

    def _take_columns(self, preset: Preset) -> None:
        if not preset.example:
            usable = [name for name, each in PRESETS.items() if each.example]
            raise UserError(
                f"{self.preset} is text without questions and answers; presets that have them: "
                f"{', '.join(usable)}."
            )
        if self.prompt is None and self.answer is None:
            self.prompt, self.answer, *system = preset.example
            self.system = self.system or next(iter(system), None)

    def _reader(self) -> ExampleRows:
        if (self.prompt is None) != (self.answer is None):
            raise UserError(f"{self.label}: name both `prompt` and `answer`, or neither.")
        if self.prompt is None or self.answer is None:
            return ExampleRows(self.label, None, self.where)
        return ExampleRows(self.label, Columns(self.prompt, self.answer, self.system), self.where)

    def describe(self) -> dict[str, Any]:
        """Return everything that decides this source's examples, as JSON values."""
        return {**super().describe(), "as": "examples"}

    def documents(self) -> Iterator[Document]:
        """Yield the examples as documents of text."""
        for example in self.examples():
            yield Document(example.id, as_text(example))

    def examples(self) -> Iterator[Example]:
        """Yield the examples, always in the same order; what is left out goes to `skipped`."""
        self.skipped = Skipped()
        found = 0
        for identity, example in self._found():
            if isinstance(example, str):
                self.skipped.add(example, identity)
            elif not all(is_unicode(part) for part in example if isinstance(part, str)):
                self.skipped.add("not Unicode text", identity)
            else:
                yield example
                found += 1
                if found == self.max_documents:
                    return

    def empty(self) -> NoText:
        """Return the error that says this source gave no example, and what it skipped."""
        return NoText(str(super().empty()).replace("no text to train on", "no example"))

    def _found(self) -> Iterator[tuple[str, Example | str]]:
        """Yield a name and the example of everything here, or why it is none."""
        if self.stdlib:
            for one in documented.exercises(self.skipped):
                yield (
                    one.id,
                    Example(one.id, one.problem, one.solution, has_doctest=one.has_doctest),
                )
        rows = self.rows
        assert isinstance(rows, ExampleRows)
        for identity, row in self._rows(self.skipped):
            if rows.keeps(row):
                yield identity, rows.example(identity, row)
