"""How the table of `seam_table.py` is put into LitGPT, and what stood there before.

`autoload.py` has `apply_seams` called as soon as a named module has been imported; a LitGPT whose
signature differs is refused with a sentence that names both versions. Nothing heavy is imported
here: a replacement is loaded together with the module it goes into.
"""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from phi_lit import __version__
from phi_lit.errors import UserError, show_user_errors
from phi_lit.seam_table import ABSENT, DATA_MODULES, LITGPT_VERSION, SEAMS, Seam

_stock: dict[str, Any] = {}  # what stood at each applied seam before


def hooked_modules() -> list[str]:
    """Return the LitGPT modules that have seams, each once, in the order of the table."""
    return list(dict.fromkeys(seam.after or seam.module for seam in SEAMS))


def stock(name: str) -> Any:
    """Return LitGPT's own object behind a seam, such as `stock("litgpt.pretrain.setup")`.

    Functions of a class come unbound. Where no seam has been applied (the hooks are off), what
    LitGPT has there is returned. A list or dict is returned as it was before we extended it.

    Raises:
        KeyError: there is no seam of that name.
    """
    seam = {seam.name: seam for seam in SEAMS}[name]
    module = import_module(seam.module)  # applies its seams, if the hooks are on
    return _stock[name] if name in _stock else _original(_find(module, seam)[2])


def signature_of(thing: Any) -> str:
    """Describe what a seam depends on: a function's parameters, or a container's type.

    A parameter with a default ends in `=`: whether there is one matters, its value does not.
    """
    if thing is None:
        return ABSENT
    if not callable(thing):
        return type(thing).__name__
    marks: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    return ", ".join(
        marks.get(parameter.kind, "")
        + parameter.name
        + ("" if parameter.default is inspect.Parameter.empty else "=")
        for parameter in inspect.signature(thing).parameters.values()
    )


def apply_seams(module: ModuleType, seams: tuple[Seam, ...] = SEAMS) -> None:
    """Put our side into a LitGPT module that has just been imported (idempotent).

    Raises:
        UserError: LitGPT differs from the one that we were written against; nothing is replaced.
    """
    show_user_errors()
    due = [
        (sys.modules[seam.module] if seam.after else module, seam)
        for seam in seams
        if (seam.after or seam.module) == module.__name__ and seam.name not in _stock
    ]
    faults = [fault for holder, seam in due if (fault := _fault(holder, seam))]
    if faults:
        raise UserError(
            f"phi_lit {__version__} was written against litgpt {LITGPT_VERSION}, but litgpt "
            f"{metadata.version('litgpt')} is installed: {'; '.join(faults)}. "
            f"Install litgpt=={LITGPT_VERSION}, or a phi_lit that knows this litgpt."
        )
    for holder, seam in due:
        _apply(holder, seam)
    if module.__name__ == "litgpt.pretrain":
        for data_module in DATA_MODULES:
            import_module(data_module)


def _find(module: ModuleType, seam: Seam) -> tuple[Any, str, Any]:
    """Return the object that holds the seam's attribute, the last name, and the raw attribute."""
    *path, leaf = seam.attribute.split(".")
    holder: Any = module
    for name in path:
        holder = getattr(holder, name)
    if seam.signature == ABSENT:
        return holder, leaf, getattr(holder, leaf, None)
    raw = inspect.getattr_static(holder, leaf)
    return holder, leaf, getattr(holder, leaf) if inspect.isgetsetdescriptor(raw) else raw


def _original(raw: Any) -> Any:
    return raw.__func__ if isinstance(raw, classmethod) else raw


def _fault(module: ModuleType, seam: Seam) -> str | None:
    """Say how LitGPT differs from what the seam was written against."""
    try:
        _, _, raw = _find(module, seam)
    except AttributeError:
        return f"{seam.name} is missing"
    found = signature_of(_original(raw))
    if found != seam.signature:
        return f"{seam.name} is ({found}) where ({seam.signature}) was expected"
    ours = _load(seam.replacement) if isinstance(raw, dict) else None
    if isinstance(ours, dict) and (taken := sorted(ours.keys() & raw.keys())):
        return f"{seam.name} has its own {', '.join(taken)}"
    return None


def _apply(module: ModuleType, seam: Seam) -> None:
    holder, leaf, raw = _find(module, seam)
    ours = _load(seam.replacement)
    if isinstance(raw, list):  # extended in place: other modules may hold a reference
        _stock[seam.name] = list(raw)
        raw.extend(ours)
    elif isinstance(raw, dict):
        _stock[seam.name] = dict(raw)
        raw.update(ours(raw) if callable(ours) else ours)
    else:
        _stock[seam.name] = _original(raw)
        ours = ours(_original(raw)) if seam.wraps else ours
        setattr(holder, leaf, classmethod(ours) if isinstance(raw, classmethod) else ours)


def _load(place: str) -> Any:
    module_name, _, name = place.partition(":")
    module = import_module(module_name)
    assert hasattr(module, name), (
        f"{module_name} must not import the LitGPT module that it replaces a part of at its top: "
        f"{name} is not there yet. Use phi_lit.seams.stock inside the function."
    )
    return getattr(module, name)


def save_stock_hyperparameters(
    function: Callable, checkpoint_dir: Path, known_commands: list[str] | None = None
) -> None:
    """Replace `save_hyperparameters` in LitGPT's own loops: write what stock LitGPT would.

    `function` is the module's `setup`, which is ours and has more options; those are left out.
    """
    import yaml
    from jsonargparse import capture_parser
    from litgpt.parser_config import save_hyperparameters
    from litgpt.utils import CLI

    save_hyperparameters(function, checkpoint_dir, known_commands)
    path = checkpoint_dir / "hyperparameters.yaml"
    parser = capture_parser(lambda: CLI(_stock_of(function), args=[]))
    saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    known = _only_known(saved, parser.get_defaults().as_dict())
    parser.save(parser.parse_object(known), path, overwrite=True)


def _stock_of(function: Callable) -> Callable:
    """Return what stood where `function` now stands, or `function` if it replaced nothing."""
    for seam in SEAMS:
        if seam.name in _stock and _find(import_module(seam.module), seam)[2] is function:
            return _stock[seam.name]
    return function


def _only_known(values: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Drop the keys that LitGPT's parser lacks, also inside its dataclasses of arguments."""
    return {
        key: _only_known(value, known[key])
        if isinstance(value, dict) and isinstance(known[key], dict)
        else value
        for key, value in values.items()
        if key in known
    }
