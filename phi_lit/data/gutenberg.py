"""What Project Gutenberg puts around a book: a header and a licence that are no part of the text.

Its files mark the book with lines such as `*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***`; the
wording changed over the decades, the first words did not. Files of the 1990s end their header with
the "small print" instead, and their book with a plain sentence.
"""

import re

_START = re.compile(
    r"^[ \t]*(?:\*{3} ?START OF .*|\*END[ *]*THE SMALL PRINT.*)$", re.MULTILINE | re.IGNORECASE
)
_END = re.compile(
    r"^[ \t]*(?:\*{3} ?END OF .*|End of (?:the |this )?Project Gutenberg.*)$",
    re.MULTILINE | re.IGNORECASE,
)


def strip_boilerplate(text: str) -> str:
    """Return the book alone: what lies between the markers, or the text itself where it has none.

    A marker on one side cuts that side only. Where a title is too long for a line, the marker's
    second line goes too.

    Args:
        text: a file of Project Gutenberg, or one that somebody stripped before.
    """
    starts = list(_START.finditer(text))
    end = _END.search(text, starts[0].end() if starts else 0)
    # A header may hold both the small print and today's marker: the book follows the last.
    before = [start for start in starts if end is None or start.end() <= end.start()]
    first = _end_of_marker(text, before[-1]) if before else 0
    book = text[first : end.start() if end else len(text)]
    return f"{book.strip()}\n" if starts or end else text


def _end_of_marker(text: str, marker: re.Match[str]) -> int:
    """Return where a start marker ends, on its own line or, unclosed, on the next."""
    if "*" in marker.group().strip().lstrip("*"):
        return marker.end()
    closing = re.compile(r"\n[^\n]*\*{3}[ \t\r]*(?=\n|$)").match(text, marker.end())
    return closing.end() if closing else marker.end()
