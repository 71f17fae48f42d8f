"""The entry point that PyTorch calls at the end of every `import torch` (group `torch.backends`).

It registers post-import hooks for the LitGPT modules that `seam_table.py` names, and does nothing
else: LitGPT is not imported here, and no torch program that leaves LitGPT alone notices us. It uses
the standard library and wrapt only, because PyTorch passes an exception raised here on to whoever
imports torch.
"""

import sys
import warnings

_registered = False


def register() -> None:
    """Hook LitGPT's modules; whatever goes wrong becomes a warning, and torch goes on."""
    try:
        hook_litgpt()
    except Exception as error:
        _complain(
            f"phi_lit could not hook into LitGPT ({type(error).__name__}: {error}); "
            "its models and options are missing from `litgpt`, everything else works. "
            "Reinstall phi_lit, or uninstall it to be rid of this warning."
        )


def hook_litgpt() -> None:
    """Put a post-import hook on every LitGPT module that a seam names (once per process).

    A module that is already imported gets its seams now.
    """
    global _registered
    if _registered:
        return
    from wrapt import register_post_import_hook

    from phi_lit.seams import apply_seams, hooked_modules

    _registered = True
    for name in hooked_modules():
        register_post_import_hook(apply_seams, name)


def _complain(message: str) -> None:
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    except RuntimeWarning:  # `python -W error` must not make `import torch` fail either
        print(f"warning: {message}", file=sys.stderr)
