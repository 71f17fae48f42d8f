"""phi_lit: what "Textbooks Are All You Need" (arXiv 2306.11644) needs and LitGPT lacks.

Importing this package costs nothing: neither torch nor litgpt is loaded until one of the public
names below is used. The command-line side is reached through plain `litgpt` (see `autoload.py`)
and `phi-lit` (see `__main__.py`).
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "CodeExercises": "phi_lit.data.exercises",
    "CodeTextbook": "phi_lit.data.textbook",
    "Instruct": "phi_lit.data.instruct",
    "MODELS": "phi_lit.registry",
    "TokenStore": "phi_lit.data.tokens",
    "UserError": "phi_lit.errors",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'phi_lit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
