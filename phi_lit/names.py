"""Names of models and prompt styles: what LitGPT's own look-ups say where they know too little.

Each function takes the place of one of LitGPT's (see `seam_table.py`).
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi_lit.errors import UserError, did_you_mean
from phi_lit.seams import stock

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.prompts import PromptStyle


def config_from_name(cls: "type[Config]", name: str, **kwargs: Any) -> "Config":
    """Replace `Config.from_name`: the same, but an unknown name is answered with near ones.

    Raises:
        UserError: the name is unknown (a ValueError, as in LitGPT, and its words come first).
    """
    try:
        return stock("litgpt.config.Config.from_name")(cls, name, **kwargs)
    except ValueError as error:
        if "is not a supported config name" not in str(error):
            raise
        raise UserError(
            f"{error}.{near_model_names(name)} `litgpt download list` shows them all."
        ) from None


def near_model_names(name: str) -> str:
    """Return " Did you mean ...?" with the models nearest to `name`, or nothing.

    Hub ids such as microsoft/phi-1 are offered where `name` has a slash.
    """
    from litgpt.config import configs, name_to_config

    if "/" not in name:
        return did_you_mean(name, name_to_config)
    hubs = [config["hf_config"] for config in configs]
    return did_you_mean(name, [f"{hub['org']}/{hub['name']}" for hub in hubs])


def prompt_style_of_model(model_name: str) -> "PromptStyle":
    """Replace `model_name_to_prompt_style`: our models continue the text as it is given."""
    from litgpt.prompts import Default

    from phi_lit.registry import MODELS

    if model_name in MODELS:
        return Default()
    return stock("litgpt.prompts.model_name_to_prompt_style")(model_name)


def load_prompt_style(checkpoint_dir: Path) -> "PromptStyle":
    """Replace `load_prompt_style`: the same, but only a class of prompt style is ever called.

    Raises:
        UserError: the checkpoint's prompt_style.yaml names something else.
    """
    import yaml
    from litgpt.prompts import PromptStyle

    path = checkpoint_dir / "prompt_style.yaml"
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    place = str(written.get("class_path")) if isinstance(written, dict) else str(written)
    module, _, name = place.rpartition(".")
    try:
        style = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{path} names {place}, which is not installed ({error})") from error
    if not (isinstance(style, type) and issubclass(style, PromptStyle)):
        raise UserError(
            f"{path} names {place}, which is no prompt style, and nothing else is ever called; "
            "litgpt.prompts has those that LitGPT knows, such as litgpt.prompts.Default"
        )
    return style()
