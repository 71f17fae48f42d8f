"""The one kind of error that is the user's to mend, and how it reaches a terminal.

A `UserError` says in one line what was found, what is allowed and where to fix it. In a program it
is a ValueError like any other; on the command line `show_user_errors` makes it that one line on
standard error and exit code 1, because a traceback would only hide the sentence.
"""

import sys
from collections.abc import Iterable
from difflib import get_close_matches
from types import TracebackType


class UserError(ValueError):
    """Something the user can fix: the message is one line and says where."""

    for_users = True
    """By this mark an error is shown as its line alone; an extension's errors may carry it too."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return `" Did you mean 'a' or 'b'?"` for the options nearest to `word`, or nothing."""
    by_folded = {option.lower(): option for option in options}
    near = get_close_matches(word.lower(), by_folded, n=3, cutoff=0.6)
    if not near:
        return ""
    return f" Did you mean {' or '.join(repr(by_folded[match]) for match in near)}?"


def show_user_errors() -> None:
    """Make an uncaught `UserError` end the program as one line and exit code 1 (idempotent)."""
    if getattr(sys.excepthook, "shows_user_errors", False):
        return
    previous = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if getattr(kind, "for_users", False):
            print(f"phi_lit: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, traceback)

    hook.shows_user_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook
