"""The entry point that PyTorch calls at the end of `import torch`."""


def register() -> None:
    """Put post-import hooks on LitGPT's modules."""
