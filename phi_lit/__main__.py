"""`phi-lit` and `python -m phi_lit`: our own commands; any other word of LitGPT's goes to LitGPT.

`phi-lit generate` is ours, `litgpt generate` stays LitGPT's. LitGPT's words work here even where
`TORCH_DEVICE_BACKEND_AUTOLOAD=0` keeps plain `litgpt` from knowing us. A command's module is
imported when the command runs, so that the overview is instant: its lines are read from the source
of the commands, not from the imported functions.
"""

import ast
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import get_origin, get_type_hints

from phi_lit import __version__
from phi_lit.autoload import hook_litgpt
from phi_lit.errors import did_you_mean, show_user_errors
from phi_lit.seam_table import LITGPT_COMMANDS

COMMANDS = {
    "prepare": "phi_lit.data.prepare:prepare",
    "tokenizer train": "phi_lit.data.tokenizer:train",
    "tokenizer codegen": "phi_lit.data.tokenizer:codegen",
    "tokenizer pad": "phi_lit.data.padding:pad",
    "generate": "phi_lit.generate.command:generate",
    "import-gguf": "phi_lit.gguf:import_gguf",
    "plan": "phi_lit.train.plan:plan",
    "upcycle": "phi_lit.upcycle:upcycle",
    "resize": "phi_lit.train.resize:resize",
    "stages": "phi_lit.stages:stages",
    "consolidate": "phi_lit.train.checkpoint:consolidate",
    "export": "phi_lit.export.command:export",
    "configs": "phi_lit.configs:configs",
}
"""Our commands, one word or two, and the function behind each as `module:function`."""


def main() -> int:
    """Run the command that `sys.argv` names and return the exit code.

    Raises:
        UserError: the user's to mend; uncaught, it ends the program as one line and exit code 1.
    """
    show_user_errors()
    hook_litgpt()
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"phi-lit {__version__}, litgpt {_version('litgpt')}, torch {_version('torch')}")
        return 0
    for command in COMMANDS:
        parts = command.split()
        if words[: len(parts)] == parts:
            _run(command, words[len(parts) :])
            return 0
    if words[0] in LITGPT_COMMANDS:
        from litgpt.__main__ import main as litgpt

        litgpt()
        return 0
    return _explain(words)


def overview() -> str:
    """Return the help of `phi-lit`: our commands with what they do, and LitGPT's words."""
    width = max(map(len, COMMANDS)) + 2
    ours = [f"  {name:<{width}}{first_line(place)}" for name, place in COMMANDS.items()]
    theirs, line = [], " "
    for word in (word for word in LITGPT_COMMANDS if word not in COMMANDS):
        if len(line) + len(word) > 96:
            theirs.append(line)
            line = " "
        line += f" {word}"
    return "\n".join(
        [
            "usage: phi-lit COMMAND [options]     (phi-lit COMMAND --help tells them)",
            "",
            "Commands of phi_lit:",
            *ours,
            "",
            "Commands of LitGPT, the same as in `litgpt COMMAND`:",
            *theirs,
            line,
        ]
    )


def first_line(place: str) -> str:
    """Return the first line of a function's docstring, from its source: nothing is imported.

    Args:
        place: the function as `module:function`.
    """
    module, _, name = place.partition(":")
    spec = find_spec(module)
    origin = spec.origin if spec else None
    assert origin, f"{module} is missing"
    for node in ast.parse(Path(origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    raise AssertionError(f"{module} has no function {name}")


def _run(command: str, arguments: list[str]) -> None:
    """Parse the arguments as LitGPT's commands do (options or a YAML --config) and call it."""
    from jsonargparse import CLI, set_parsing_settings

    set_parsing_settings(
        docstring_parse_attribute_docstrings=True, config_read_mode_urls_enabled=True
    )
    module, _, name = COMMANDS[command].partition(":")
    function = getattr(import_module(module), name)
    CLI(function, args=_gathered(function, arguments), prog=f"phi-lit {command}")


def _gathered(function: Callable[..., None], arguments: list[str]) -> list[str]:
    """Write `a b --x 1` as jsonargparse wants it where the first thing is a list: `[a,b] --x 1`."""
    first = next(iter(get_type_hints(function).values()))
    words = list(takewhile(lambda word: not word.startswith(("-", "[")), arguments))
    if get_origin(first) is not list or not words:
        return arguments
    return [f"[{','.join(words)}]", *arguments[len(words) :]]


def _explain(words: list[str]) -> int:
    """Say on standard error what is near to an unknown command; the exit code is 2."""
    group = [command for command in COMMANDS if command.split()[0] == words[0]]
    asked_for_help = bool(group) and words[1:2] in ([], ["-h"], ["--help"])
    if asked_for_help:
        lines = [f"  phi-lit {command:<20}{first_line(COMMANDS[command])}" for command in group]
        print("\n".join(["commands:", *lines]))
        return 0 if words[1:] else 2
    typed = " ".join(words[:2]) if group else words[0]
    options = group or [*COMMANDS, *LITGPT_COMMANDS]
    print(
        f"phi_lit: error: {typed!r} is not a command.{did_you_mean(typed, options)} "
        "`phi-lit --help` lists them.",
        file=sys.stderr,
    )
    return 2


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
