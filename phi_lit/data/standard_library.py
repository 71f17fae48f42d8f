"""The corpus that is already there: Python's standard library and the prose of its reference.

Some 11 MB of code by many careful hands, and the topics behind `help("...")` as short chapters of a
language reference. Nothing is downloaded, so a first model can be trained offline.
"""

import sysconfig
from collections.abc import Iterator
from pydoc_data.topics import topics

from phi_lit.data.trees import FoundFile, Skipped, find_files

LICENCE = "PSF-2.0"
"""The Python Software Foundation licence covers both the code and the reference."""

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def code_files(skipped: Skipped) -> Iterator[FoundFile]:
    """Yield the library's Python files, without its tests and without what pip installed.

    The module that holds the reference's prose is left out too: it is in `chapters`.
    """
    return find_files(sysconfig.get_path("stdlib"), skipped, _is_library_code)


def chapters() -> Iterator[tuple[str, str]]:
    """Yield a name and the prose of every topic of the language reference."""
    for topic in sorted(topics):
        yield f"pydoc_data.topics/{topic}", topics[topic].strip() + "\n"


def _is_library_code(name: str) -> bool:
    parts = name.split("/")
    return (
        name.endswith(".py") and _LEFT_OUT.isdisjoint(parts[:-1]) and name != "pydoc_data/topics.py"
    )
