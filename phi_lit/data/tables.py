"""How a table's row becomes a document: which columns, joined how, kept when.

Tables that hold no text are refused here by what their first rows look like, before anything is
written; later rows that lack text are only counted.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from phi_lit.errors import UserError, did_you_mean

TEXT_COLUMNS = ("text", "content")
"""Where the text is looked for when no column is named."""


@dataclass(frozen=True)
class RowText:
    """Turns rows into text; see `phi_lit.data.sources.Source` for the three settings.

    Raises:
        UserError: `columns` and `template` are both given, or the template names no column.
    """

    label: str
    columns: str | list[str] | None = None
    template: str | None = None
    where: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.columns is not None and self.template is not None:
            raise UserError(f"{self.label}: give `columns` or `template`, not both.")
        named = [self.columns] if isinstance(self.columns, str) else list(self.columns or [])
        if self.template is not None:
            named = self._template_columns(self.template)
        object.__setattr__(self, "_named", named)

    _named: list[str] = field(init=False, repr=False, default_factory=list)

    def _template_columns(self, template: str) -> list[str]:
        try:
            names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        except ValueError as error:
            raise UserError(f"{self.label}: the template {template!r}: {error}.") from None
        if not names or not all(name.isidentifier() for name in names):
            raise UserError(
                f"{self.label}: the template {template!r} must hold columns by name, as in "
                "'{prompt}\\n{response}' (a literal brace is written twice)."
            )
        return list(dict.fromkeys(names))

    def needed(self) -> list[str]:
        """Return the columns worth decoding, some of which a table may lack."""
        return [*(self._named or TEXT_COLUMNS), *self.where]

    def keeps(self, row: dict[str, Any]) -> bool:
        """Tell whether the row has the values that `where` asks for."""
        return all(
            row.get(column) in (value if isinstance(value, list) else [value])
            for column, value in self.where.items()
        )

    def text(self, row: dict[str, Any]) -> str | None:
        """Return the row's document, or None where a part of it is missing or is not text."""
        columns = self._text_columns(row)
        values = [row.get(column) for column in columns]
        if self.template is not None:
            if not all(isinstance(value, str | int | float) for value in values):
                return None
            return self.template.format_map(dict(zip(columns, values, strict=True)))
        if not values or not all(isinstance(value, str) for value in values):
            return None
        return "\n\n".join(value for value in values if isinstance(value, str))

    def check_names(self, names: Iterable[str]) -> None:
        """Raise a `UserError` unless the columns needed are among those that a table has."""
        has = sorted(names)
        wanted = self._text_columns(has)
        if not wanted:
            raise UserError(
                f"{self.label}: no column named {' or '.join(TEXT_COLUMNS)}; it has "
                f"{', '.join(has)}. Name its text with `columns` or `template`; a data set that "
                "holds only identifiers cannot be trained on."
            )
        missing = [column for column in [*wanted, *self.where] if column not in has]
        if missing:
            raise UserError(
                f"{self.label}: no column {', '.join(missing)}; it has {', '.join(has)}."
                f"{did_you_mean(missing[0], has)}"
            )

    def check_rows(self, rows: list[dict[str, Any]]) -> None:
        """Raise a `UserError` if these, a table's first rows, hold no text where it should be."""
        types: dict[str, set[str]] = {}
        for row in rows:
            for column, value in row.items():
                types.setdefault(column, set()).add(type(value).__name__)
        self.check_names(types)
        allowed = {"str", "NoneType"} | ({"int", "float", "bool"} if self.template else set())
        wanted = self._text_columns(types)
        for column in wanted:
            wrong = sorted(types[column] - allowed)
            if wrong:
                raise UserError(
                    f"{self.label}: column {column} holds {' and '.join(wrong)}, not text; "
                    f"its columns are {', '.join(sorted(types))}."
                )
        kept = [row for row in rows if self.keeps(row)]
        if kept and not any((self.text(row) or "").strip() for row in kept):
            raise UserError(
                f"{self.label}: {' and '.join(wanted)} {'is' if len(wanted) == 1 else 'are'} empty "
                f"in all of the first {len(kept)} rows; its columns are "
                f"{', '.join(sorted(types))}."
            )

    def _text_columns(self, present: Iterable[str]) -> list[str]:
        """Return the columns that the text is in, given those that are there."""
        return self._named or [column for column in TEXT_COLUMNS if column in present][:1]
