"""The way back: `litgpt convert_to_litgpt` on what `phi-lit export` wrote, to the bit.

LitGPT configures the model by a name (the directory's, or --model_name), and a model with a resized
vocabulary or a shape of its own has none. An export carries its model_config.yaml: that is used.
"""

from dataclasses import asdict
from pathlib import Path

from phi_lit.export import EXPORT


def convert_hf_checkpoint(
    checkpoint_dir: Path,
    *,
    model_name: str | None = None,
    dtype: str | None = None,
    debug_mode: bool | None = False,
) -> None:
    """
    Convert a Hugging Face Transformers checkpoint into a LitGPT compatible checkpoint.

    Arguments:
        checkpoint_dir: Where to save the downloaded files.
        model_name: The existing config name to load. This is useful to download alternative weights of existing
            architectures.
        dtype: The data type to convert the checkpoint files to. If not specified, the weights will remain in the
            dtype they are downloaded in.
        debug_mode: Prints the individual layers being loaded instead of a progress bar, which can be useful when
            developing and adding new models to LitGPT.
    """  # noqa: E501 (LitGPT's own lines, so that --help reads the same)
    from litgpt.config import name_to_config
    from litgpt.utils import extend_checkpoint_dir

    from phi_lit.seams import stock

    convert = stock("litgpt.scripts.convert_hf_checkpoint.convert_hf_checkpoint")
    exported = _exported_config(extend_checkpoint_dir(Path(checkpoint_dir)))
    if exported is None or model_name not in (None, exported["name"]):
        convert(checkpoint_dir, model_name=model_name, dtype=dtype, debug_mode=debug_mode)
        return
    name = exported["name"]
    registered = name_to_config.get(name)
    name_to_config[name] = exported
    try:
        convert(checkpoint_dir, model_name=name, dtype=dtype, debug_mode=debug_mode)
    finally:
        if registered is None:
            del name_to_config[name]
        else:
            name_to_config[name] = registered


def _exported_config(directory: Path) -> dict | None:
    """Return the configuration that an export of ours carries, as keyword arguments of Config."""
    from litgpt.config import Config

    config = directory / "model_config.yaml"
    if not (directory / EXPORT).is_file() or not config.is_file():
        return None
    return asdict(Config.from_file(config))
