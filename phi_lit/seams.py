"""Every place where phi_lit reaches into LitGPT, as one table.

Each `Seam` names what it replaces, the signature that the replacement was written against, and why.
`autoload.py` has `apply_seams` called as soon as a named module has been imported; a LitGPT whose
signature differs is refused with a sentence that names both versions. Nothing heavy is imported
here: a replacement is loaded together with the module it goes into.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from phi_lit import __version__
from phi_lit.errors import UserError, did_you_mean, show_user_errors

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.model import Block
    from litgpt.prompts import PromptStyle

LITGPT_VERSION = "0.5.13"
"""The LitGPT that the signatures below were read from."""

MOE_CLASS = "PhiMoE"
"""`mlp_class_name` of models with the experts of `extensions/phi_moe`."""

LITGPT_COMMANDS = (
    "download", "chat", "finetune", "finetune_lora", "finetune_full", "finetune_adapter",
    "finetune_adapter_v2", "pretrain", "generate", "generate_full", "generate_adapter",
    "generate_adapter_v2", "generate_sequentially", "generate_speculatively", "generate_tp",
    "convert_to_litgpt", "convert_from_litgpt", "convert_pretrained_checkpoint", "merge_lora",
    "evaluate", "serve", "validate",
)  # fmt: skip
"""`litgpt.parser_config.parser_commands()`, known here so that `phi-lit --help` needs no torch."""


ABSENT = "absent"
"""The signature of an attribute that LitGPT does not have."""


@dataclass(frozen=True)
class Seam:
    """One attribute of LitGPT that we replace (a function), extend (a list or dict) or add."""

    module: str
    """The LitGPT module that holds the attribute."""
    attribute: str
    """Its name there, with dots where it sits in a class."""
    signature: str
    """What it was when the replacement was written, in the words of `signature_of`; `ABSENT` where
    LitGPT looks something up by name that we add."""
    replacement: str
    """Where ours lies, as `module:name`. In place of a dict's new entries it may be a function that
    is given LitGPT's dict and returns what changes in it."""
    why: str
    """What LitGPT cannot do without it."""
    wraps: bool = False
    """Whether the replacement is a function that is given LitGPT's and returns what takes its
    place (with the same signature)."""
    after: str = ""
    """The module after whose import the seam is applied, where that is not `module`: one that
    imports torch, and thereby us, before it is whole itself."""

    @property
    def name(self) -> str:
        """The attribute's full name, by which `stock` finds it."""
        return f"{self.module}.{self.attribute}"


BITSANDBYTES_USERS = (
    "litgpt.chat.base", "litgpt.generate.base", "litgpt.generate.full", "litgpt.generate.adapter",
    "litgpt.generate.adapter_v2", "litgpt.generate.sequentially", "litgpt.generate.tp",
    "litgpt.generate.speculative_decoding", "litgpt.finetune.lora", "litgpt.finetune.adapter",
    "litgpt.finetune.adapter_v2", "litgpt.finetune.lora_legacy", "litgpt.api",
)  # fmt: skip
"""The modules that quantize with a class of Lightning's that they have imported by name."""

GENERATORS = tuple(name for name in BITSANDBYTES_USERS if name.startswith("litgpt.generate."))
"""Those whose `main` is one of the `litgpt generate*` commands."""

_SAMPLING = "max_new_tokens=, top_k=, top_p=, temperature="
_FINETUNED = f"quantize=, {_SAMPLING}, precision="
_PARTS = f"sys_prompt=, num_samples=, {_SAMPLING}, quantize=, precision=, compile="
GENERATOR_SIGNATURES = (
    f"checkpoint_dir, prompt=, {_PARTS}",
    f"checkpoint_dir, prompt=, input=, sys_prompt=, finetuned_path=, {_FINETUNED}",
    f"checkpoint_dir, prompt=, input=, sys_prompt=, adapter_path=, {_FINETUNED}",
    f"checkpoint_dir, prompt=, input=, sys_prompt=, adapter_path=, {_FINETUNED}",
    f"checkpoint_dir, prompt=, {_PARTS}",
    f"checkpoint_dir, prompt=, {_PARTS}",
    "draft_model_checkpoint_dir, target_model_checkpoint_dir, prompt=, sys_prompt=, num_samples=, "
    "max_new_tokens=, speculative_k=, top_k=, top_p=, temperature=, quantize=, precision=, "
    "compile=",
)
"""Their parameters, in the same order."""

_FINETUNE_START = "checkpoint_dir, out_dir=, precision=, quantize=, devices=, num_nodes=, "
_FINETUNE_END = "optimizer=, logger_name=, seed=, access_token="
ADAPTERS = {
    "litgpt.finetune.lora": f"{_FINETUNE_START}lora_r=, lora_alpha=, lora_dropout=, lora_query=, "
    "lora_key=, lora_value=, lora_projection=, lora_mlp=, lora_head=, data=, train=, log=, eval=, "
    f"{_FINETUNE_END}",
    "litgpt.finetune.adapter": f"{_FINETUNE_START}data=, train=, eval=, log=, {_FINETUNE_END}",
    "litgpt.finetune.adapter_v2": f"{_FINETUNE_START}resume=, data=, train=, eval=, log=, "
    f"{_FINETUNE_END}",
}
"""The commands that finetune few parameters, by module, with their `setup`'s parameters."""

FINETUNERS = ("litgpt.finetune.full", *ADAPTERS)
ADAPTER_GENERATORS = ("litgpt.generate.adapter", "litgpt.generate.adapter_v2")

SEAMS = (
    Seam(
        "litgpt.config",
        "configs",
        "list",
        "phi_lit.registry:CONFIGS",
        "our models in `litgpt download list`, and hub ids such as microsoft/phi-1",
    ),
    Seam(
        "litgpt.config",
        "name_to_config",
        "dict",
        "phi_lit.registry:MODELS",
        "our models by name, in `litgpt pretrain`, in the converters and in LLM.load",
    ),
    Seam(
        "litgpt.config",
        "Config.from_name",
        "cls, name, **kwargs",
        "phi_lit.seams:config_from_name",
        "an unknown model name is answered with the nearest ones",
    ),
    Seam(
        "litgpt.config",
        "Config.__post_init__",
        "self",
        "phi_lit.seams:config_post_init",
        "settings of experts that make no sense are told in one line",
    ),
    Seam(
        "litgpt.config",
        "Config.__init__.__annotations__",
        "dict",
        "phi_lit.seams:config_annotations",
        "`model_config:` in a YAML may say mlp_class_name: PhiMoE",
    ),
    Seam(
        "litgpt.prompts",
        "model_name_to_prompt_style",
        "model_name",
        "phi_lit.seams:prompt_style_of_model",
        "the style that LitGPT finds in the name phi-1 appends 'Answer:' to code",
    ),
    *(
        Seam(module, attribute, signature, replacement, why)
        for module, layer in (
            ("litgpt.model", "layer"),
            ("litgpt.lora", "lora"),
            ("litgpt.adapter_v2", "adapter_v2"),
        )
        for attribute, signature, replacement, why in (
            (
                "PhiMoE",
                ABSENT,
                f"extensions.phi_moe.{layer}:PhiMoE",
                "LitGPT finds the class of an MLP by its name in this module",
            ),
            (
                "Block.__init__",
                "self, config, block_idx",
                f"phi_lit.seams:{module.rpartition('.')[2]}_block_init",
                "a block learns which layer it is, and gets its experts after the MLP",
            ),
        )
    ),
    Seam(
        "litgpt.scripts.convert_lit_checkpoint",
        "copy_weights_phi",
        "config, state_dict, lit_weights, saver=",
        "phi_lit.seams:copy_phi_to_hub",
        "LitGPT's map of phi's weights has no experts",
    ),
    Seam(
        "litgpt.scripts.convert_hf_checkpoint",
        "copy_weights_phi",
        "config, qkv_weights, state_dict, hf_weights, saver=, dtype=, pbar=, progress_per_file=, "
        "debug_mode=",
        "phi_lit.seams:copy_phi_from_hub",
        "LitGPT's map of phi's weights has no experts",
    ),
    Seam(
        "litgpt.prompts",
        "load_prompt_style",
        "checkpoint_dir",
        "phi_lit.seams:load_prompt_style",
        "it calls whatever a checkpoint's prompt_style.yaml names; only prompt styles are called",
    ),
    Seam(
        "litgpt.pretrain",
        "setup",
        "model_name, model_config=, out_dir=, precision=, initial_checkpoint_dir=, resume=, data=, "
        "train=, eval=, log=, optimizer=, devices=, num_nodes=, tokenizer_dir=, logger_name=, "
        "seed=",
        "phi_lit.train.pretrain:setup",
        "our training options, and our loop where one of them is used",
    ),
    Seam(
        "litgpt.pretrain",
        "save_hyperparameters",
        "function, checkpoint_dir, known_commands=",
        "phi_lit.seams:save_stock_hyperparameters",
        "a run of LitGPT's own loop records LitGPT's own options, not ours",
    ),
    Seam(
        "litgpt.finetune.full",
        "setup",
        "checkpoint_dir, out_dir=, precision=, devices=, num_nodes=, resume=, data=, train=, "
        "eval=, log=, optimizer=, logger_name=, seed=, access_token=",
        "phi_lit.train.finetune:setup",
        "our training options, and our loop where one of them is used",
    ),
    Seam(
        "litgpt.finetune.full",
        "save_hyperparameters",
        "function, checkpoint_dir, known_commands=",
        "phi_lit.seams:save_stock_hyperparameters",
        "a run of LitGPT's own loop records LitGPT's own options, not ours",
    ),
    Seam(
        "litgpt.utils",
        "lazy_load",
        "filename",
        "phi_lit.tensors:lazy_load",
        "Lightning's unpickler behind it calls whatever a checkpoint names",
    ),
    Seam(
        "litgpt.utils",
        "check_valid_checkpoint_dir",
        "checkpoint_dir, model_filename=, verbose=, raise_error=, ignore_tokenizer_files=",
        "phi_lit.tensors:check_valid_checkpoint_dir",
        "weights that are cut short, or hold code, are told before a model is built; and LLM.load "
        "asks it before LLM's methods read with weights_only=False",
    ),
    Seam(
        "litgpt.utils",
        "FSDPStrategy.load_checkpoint",
        "self, path, state=, strict=, weights_only=",
        "phi_lit.tensors:fsdp_load_checkpoint",
        "the same unpickler, where a sharded run resumes from one file",
    ),
    Seam(
        "litgpt.scripts.convert_hf_checkpoint",
        "convert_hf_checkpoint",
        "checkpoint_dir, model_name=, dtype=, debug_mode=",
        "phi_lit.export.back:convert_hf_checkpoint",
        "what `phi-lit export` wrote comes back under the configuration it had, not a model name's",
    ),
    Seam(
        "litgpt.eval.evaluate",
        "convert_and_evaluate",
        "checkpoint_dir, tasks=, out_dir=, force_conversion=, num_fewshot=, batch_size=, device=, "
        "dtype=, limit=, seed=, save_filepath=, access_token=",
        "phi_lit.export.evaluate:convert_and_evaluate",
        "it needs a config.json, which checkpoints trained from scratch lack",
    ),
    Seam(
        "litgpt.chat.base",
        "main",
        "checkpoint_dir, max_new_tokens=, top_k=, top_p=, temperature=, quantize=, precision=, "
        "compile=, multiline=, access_token=",
        "phi_lit.chat.terminal:main",
        "conversations of several turns; what cannot work is told before weights load",
    ),
    Seam(
        "litgpt.chat.base",
        "interact",
        "multiline, model, tokenizer, prompt_style, fabric, temperature, max_new_tokens, top_k, "
        "top_p, stop_tokens",
        "phi_lit.chat.terminal:interact",
        "a long prompt, bytes that are no text, or Ctrl-C must not end the session",
    ),
    Seam(
        "litgpt.deploy.serve",
        "run_server",
        "checkpoint_dir, quantize=, precision=, temperature=, top_k=, top_p=, max_new_tokens=, "
        "devices=, accelerator=, port=, stream=, openai_spec=, access_token=, api_path=, timeout=, "
        "generate_strategy=",
        "phi_lit.chat.serve:run_server",
        "LitServe listens to everyone, counts no tokens, ignores stop strings and hung-up clients",
    ),
    *(
        Seam(
            module,
            "BitsandbytesPrecision",
            "mode, dtype=, ignore_modules=",
            "phi_lit.quantize:BitsandbytesPrecision",
            "Lightning quantizes on GPUs only, and leaves stacked experts as they are",
            after="litgpt.chat.base" if module == "litgpt.api" else "",
        )
        for module in BITSANDBYTES_USERS
    ),
    *(
        Seam(
            module,
            "main",
            signature,
            "phi_lit.checks:checked",
            "what cannot work (memory, prompt, quantizer) is told in one line before weights load",
            wraps=True,
        )
        for module, signature in zip(GENERATORS, GENERATOR_SIGNATURES, strict=True)
    ),
    *(
        Seam(module, attribute, signature, replacement, why, wraps=wraps)
        for module in FINETUNERS
        for attribute, signature, replacement, why, wraps in (
            (
                "generate_example",
                "fabric, model, tokenizer, eval, data",
                "phi_lit.mends:goes_on_training",
                "a prompt longer than the rows left the model in evaluation, without dropout",
                True,
            ),
            (
                "validate",
                "fabric, model, val_dataloader, eval, verbose=",
                "phi_lit.mends:over_targets",
                "one row whose answer is cut off made the held-out loss NaN",
                True,
            ),
            (
                "get_longest_seq_length",
                "data",
                "phi_lit.mends:get_longest_seq_length",
                "rows that are left without a target are counted and told",
                False,
            ),
        )
    ),
    *(
        Seam(
            module,
            "setup",
            signature,
            "phi_lit.train.finetune_adapted:extended",
            "our training options, and our loop where one of them is used",
            wraps=True,
        )
        for module, signature in ADAPTERS.items()
    ),
    *(
        Seam(
            module,
            "save_hyperparameters",
            "function, checkpoint_dir, known_commands=",
            "phi_lit.seams:save_stock_hyperparameters",
            "a run of LitGPT's own loop records LitGPT's own options, not ours",
        )
        for module in ADAPTERS
    ),
    Seam(
        "litgpt.scripts.merge_lora",
        "merge_lora",
        "checkpoint_dir, pretrained_checkpoint_dir=, precision=",
        "phi_lit.merge:merge_lora",
        "it cannot read the base checkpoints that `pretrain` and `finetune_full` save",
    ),
    *(
        Seam(
            module,
            "Tokenizer",
            "checkpoint_dir",
            "phi_lit.mends:ResponseTokenizer",
            "it looks for `### Response:` whatever the prompt style (IndexError)",
        )
        for module in ("litgpt.generate.full", *ADAPTER_GENERATORS)
    ),
    *(
        Seam(
            module,
            "lazy_load",
            "filename",
            "phi_lit.mends:load_weights",
            "it cannot read the base checkpoints that `pretrain` and `finetune_full` save",
        )
        for module in ADAPTER_GENERATORS
    ),
)

DATA_MODULES = ("phi_lit.data.textbook", "phi_lit.data.exercises", "phi_lit.data.instruct")
"""Where our data modules lie. They are imported with `litgpt.pretrain`, which every command line
loads, because jsonargparse finds a class by its bare name (`class_path: CodeTextbook`) only among
the imported subclasses of LitGPT's DataModule."""

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


def config_post_init(self: "Config") -> None:
    """Replace `Config.__post_init__`: experts are checked before LitGPT looks at the rest.

    Raises:
        UserError: the settings of experts make no sense; all that is wrong with them is told.
    """
    if self.mlp_class_name == MOE_CLASS:
        from extensions.phi_moe.settings import faults

        if wrong := faults(self):
            raise UserError(f"{self.name or 'model_config'}: {'; '.join(wrong)}")
    stock("litgpt.config.Config.__post_init__")(self)


def config_annotations(stocks: dict[str, Any]) -> dict[str, Any]:
    """Return the types of `Config`'s arguments that change: one more name of an MLP class."""
    from typing import Literal, get_args

    names = (*get_args(stocks["mlp_class_name"]), MOE_CLASS)
    return {"mlp_class_name": Literal[names]}


def _block_init(module: str) -> Callable[..., None]:
    """Return what replaces `Block.__init__` in a LitGPT module."""

    def __init__(self: "Block", config: "Config", block_idx: int) -> None:
        init = stock(f"{module}.Block.__init__")
        if config.mlp_class_name != MOE_CLASS:
            init(self, config, block_idx)
            return
        from extensions.phi_moe.placement import place_experts

        place_experts(self, config, block_idx, init)

    return __init__


model_block_init = _block_init("litgpt.model")
lora_block_init = _block_init("litgpt.lora")
adapter_v2_block_init = _block_init("litgpt.adapter_v2")


def copy_phi_to_hub(
    config: "Config", state_dict: dict, lit_weights: dict, saver: Any = None
) -> None:
    """Replace `copy_weights_phi` of `litgpt convert_from_litgpt`: experts are copied too."""
    if config.mlp_class_name == MOE_CLASS:
        from litgpt.scripts.convert_hf_checkpoint import load_param

        from extensions.phi_moe.convert import copy_to_hub

        lit_weights = copy_to_hub(config, state_dict, lit_weights, saver, load_param)
    copy = stock("litgpt.scripts.convert_lit_checkpoint.copy_weights_phi")
    copy(config, state_dict, lit_weights, saver)


def copy_phi_from_hub(
    config: "Config",
    qkv_weights: dict,
    state_dict: dict,
    hf_weights: dict,
    saver: Any = None,
    dtype: Any = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Replace `copy_weights_phi` of `litgpt convert_to_litgpt`: experts are copied too."""
    if config.mlp_class_name == MOE_CLASS:
        from litgpt.scripts.convert_hf_checkpoint import load_param

        from extensions.phi_moe.convert import copy_from_hub

        hf_weights = copy_from_hub(config, state_dict, hf_weights, dtype, load_param)
    copy = stock("litgpt.scripts.convert_hf_checkpoint.copy_weights_phi")
    copy(config, qkv_weights, state_dict, hf_weights, saver, dtype, *args, **kwargs)


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
