"""Every place where phi_lit reaches into LitGPT, as one table.

Each `Seam` names what it replaces, the signature that the replacement was written against, and why.
How they are applied is in `seams.py`. Nothing is imported here: a replacement is loaded together
with the module it goes into.
"""

from dataclasses import dataclass

LITGPT_VERSION = "0.5.13"
"""The LitGPT that the signatures below were read from."""

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
        "phi_lit.names:config_from_name",
        "an unknown model name is answered with the nearest ones",
    ),
    Seam(
        "litgpt.config",
        "Config.__post_init__",
        "self",
        "phi_lit.experts:config_post_init",
        "settings of experts that make no sense are told in one line",
    ),
    Seam(
        "litgpt.config",
        "Config.__init__.__annotations__",
        "dict",
        "phi_lit.experts:config_annotations",
        "`model_config:` in a YAML may say mlp_class_name: PhiMoE",
    ),
    Seam(
        "litgpt.prompts",
        "model_name_to_prompt_style",
        "model_name",
        "phi_lit.names:prompt_style_of_model",
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
                f"phi_lit.experts:{module.rpartition('.')[2]}_block_init",
                "a block learns which layer it is, and gets its experts after the MLP",
            ),
        )
    ),
    Seam(
        "litgpt.scripts.convert_lit_checkpoint",
        "copy_weights_phi",
        "config, state_dict, lit_weights, saver=",
        "phi_lit.experts:copy_phi_to_hub",
        "LitGPT's map of phi's weights has no experts",
    ),
    Seam(
        "litgpt.scripts.convert_hf_checkpoint",
        "copy_weights_phi",
        "config, qkv_weights, state_dict, hf_weights, saver=, dtype=, pbar=, progress_per_file=, "
        "debug_mode=",
        "phi_lit.experts:copy_phi_from_hub",
        "LitGPT's map of phi's weights has no experts",
    ),
    Seam(
        "litgpt.prompts",
        "load_prompt_style",
        "checkpoint_dir",
        "phi_lit.names:load_prompt_style",
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
