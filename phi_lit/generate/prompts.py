"""Reading prompts: JSON Lines with a `prompt` in each, plain lines, or one text.

Everything that is wrong with a file is gathered and told at once, by line.
"""

import gzip
import json
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phi_lit.checks import fault_of_text
from phi_lit.errors import UserError

RESULT_FIELDS = (
    "prompt_index", "sample", "completion", "finish_reason", "prompt_tokens", "completion_tokens",
)  # fmt: skip
"""What a completion's line has beside the fields of its prompt's line."""

_SHOWN = 3
"""Faults that are told one by one."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    text: str
    name: str
    """What to call it in an error."""
    fields: dict[str, Any] = field(default_factory=dict)
    """What else its line holds (a `task_id`, say); goes into its completions' lines."""


def read_prompts(prompts: str, prompt: str = "") -> list[Prompt]:
    """Return the prompts of a command.

    Args:
        prompts: a file's name, or `-` for standard input; empty for none.
        prompt: one text; empty for none.

    Raises:
        UserError: both or none are given, the file cannot be read, or lines in it are no prompts.
    """
    if bool(prompts) == bool(prompt):
        raise UserError(
            "give either --prompts FILE (- for standard input) or --prompt TEXT, one of them, and "
            "not empty"
        )
    if prompt:
        if fault := fault_of_text(prompt):
            raise UserError(f"{fault}: there is nothing to continue")
        return [Prompt(prompt, "the prompt")]
    name = "standard input" if prompts == "-" else prompts
    lines = _read(prompts).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if lines and not lines[-1]:
        lines.pop()  # what a last newline leaves
    if not lines:
        raise UserError(f"{name} is empty: no prompt in it")
    as_json = lines[0].lstrip().startswith(b"{")
    found, faults = [], []
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            faults.append(f"line {number} is not UTF-8 (byte {error.start + 1} of the line)")
            continue
        try:
            one = (
                _json_line(text, number) if as_json else Prompt(text.rstrip("\r"), f"line {number}")
            )
        except ValueError as error:
            faults.append(f"line {number} {error}")
            continue
        if fault := fault_of_text(one.text, one.name):
            faults.append(fault)
        found.append(one)
    _raise(name, faults)
    return found


def _read(place: str) -> bytes:
    if place == "-":
        return sys.stdin.buffer.read()
    path = Path(place)
    if not path.is_file():
        raise UserError(f"there is no file {path}; --prompts names one, or - for standard input")
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _json_line(text: str, number: int) -> Prompt:
    """Parse one line of JSON Lines.

    Raises:
        ValueError: it is no object with a prompt; the message follows "line 7 ".
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from None
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise ValueError('has no "prompt" with a text: expected {"prompt": "..."} in every line')
    taken = [name for name in RESULT_FIELDS if name in content]
    if taken:
        raise ValueError(f"has a field {taken[0]!r}, which is a completion's; rename it")
    fields = {name: value for name, value in content.items() if name != "prompt"}
    return Prompt(content["prompt"], f"line {number}", fields)


def _raise(name: str, faults: list[str]) -> None:
    if faults:
        more = f"; and {len(faults) - _SHOWN:,} more" if len(faults) > _SHOWN else ""
        raise UserError(f"{name}: {'; '.join(faults[:_SHOWN])}{more}")
