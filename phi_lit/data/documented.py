"""Exercises that are already there: the standard library's functions, docstring -> body.

Signature and docstring are the problem, the rest of the function is the solution, as in phi-1's
CodeExercises (arXiv 2306.11644, section 2.2), written by people. Methods count as functions, moved
to the left margin. Nothing is imported or run: the files are only parsed.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

from phi_lit.data.records import read_text
from phi_lit.data.standard_library import code_files
from phi_lit.data.trees import Skipped

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Exercise(NamedTuple):
    """A function cut in two after its docstring; both parts are whole lines."""

    id: str
    """`file:line`."""
    name: str
    """The function's own name."""
    problem: str
    """Decorators, signature and docstring."""
    solution: str
    """The body, indented as it stood."""
    has_doctest: bool
    """Whether the docstring holds an example that could be run."""


def exercises(skipped: Skipped) -> Iterator[Exercise]:
    """Yield the library's documented functions that do something, each text once, in file order."""
    seen = set()
    for file in code_files(skipped):
        if (text := read_text(file, skipped)) is None:
            continue
        try:
            found = list(exercises_in(text, file.name))
        except (SyntaxError, ValueError):
            skipped.add("not Python", file.name)
            continue
        for exercise in found:
            if (exercise.problem, exercise.solution) not in seen:
                seen.add((exercise.problem, exercise.solution))
                yield exercise


def exercises_in(text: str, name: str = "<text>") -> Iterator[Exercise]:
    """Yield the exercises of one file, in the order of their lines.

    Raises:
        SyntaxError, ValueError: it is not Python.
    """
    lines = text.splitlines(keepends=True)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, Function)]
    for node in sorted(functions, key=lambda node: node.lineno):
        if (cut := _cut(node)) is not None:
            first, end, last = cut
            moved = _moved_left(lines[first:last], node.col_offset)
            if moved is not None:
                yield Exercise(
                    id=f"{name}:{node.lineno}",
                    name=node.name,
                    problem="".join(moved[: end - first]),
                    solution="".join(moved[end - first :]).rstrip() + "\n",
                    has_doctest=">>>" in (ast.get_docstring(node, clean=False) or ""),
                )


def _cut(node: Function) -> tuple[int, int, int] | None:
    """Return the lines (from 0) where a function starts, its docstring ends and the function ends.

    None where there is no docstring, nothing after it, or one line holds parts of both.
    """
    if ast.get_docstring(node) is None or len(node.body) < 2:
        return None
    docstring, after = node.body[0], node.body[1]
    assert docstring.end_lineno is not None
    assert node.end_lineno is not None
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
    if docstring.lineno == node.lineno or after.lineno <= docstring.end_lineno:
        return None
    return first, docstring.end_lineno, node.end_lineno


def _moved_left(lines: list[str], columns: int) -> list[str] | None:
    """Return the lines without their first columns, or None where one has text in them."""
    moved = [line[columns:] if line.strip() else "\n" for line in lines]
    if any(line.strip() and line[:columns].strip() for line in lines):
        return None  # such as a string over several lines that starts at the margin
    return moved
