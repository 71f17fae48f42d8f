"""Finetuning few parameters: LoRA and the two LLaMA adapters, through our loop.

Models, names and files are LitGPT's: a run leaves `lit_model.pth.lora`, `.adapter` or `.adapter_v2`
beside the config, and `litgpt merge_lora`, `generate_adapter` and `generate_adapter_v2` read it.
Here is what the methods differ in, and how a model for one of them is made ready to train.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from phi_lit.errors import UserError
from phi_lit.train import checkpoint

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.model import GPT

    from phi_lit.train.job import Job


@dataclass(frozen=True)
class Adaptation:
    """A way to finetune few parameters of a model whose others stay as they are."""

    command: str
    """LitGPT's name of it: lora, adapter, adapter_v2."""
    mark: str
    """The function of LitGPT's module that freezes the rest."""

    @property
    def module(self) -> Any:
        """LitGPT's module with its `Config` and `GPT`."""
        return import_module(f"litgpt.{self.command}")

    @property
    def weights_file(self) -> str:
        """The file that LitGPT's commands look for."""
        return f"{checkpoint.MODEL_FILE}.{self.command}"

    def configure(self, checkpoint_dir: Path, arguments: dict[str, Any]) -> "Config":
        """Return the base model's config with the method's own fields filled."""
        own = {name: value for name, value in arguments.items() if name.startswith("lora_")}
        return self.module.Config.from_file(checkpoint_dir / "model_config.yaml", **own)

    def build(self, config: "Config", base_dir: Path) -> "GPT":
        """Return the model with the base's weights, of which only the method's own train."""
        gpt = self.module.GPT(config)
        getattr(self.module, self.mark)(gpt)
        _load_base(gpt, base_dir)
        for each in gpt.modules():
            if hasattr(each, "lora_A"):
                each.matrices = ("lora_A", "lora_B")  # weight decay pulls these as it does linears
            if hasattr(each, "adapter_kv_cache"):
                each.register_forward_pre_hook(_forget_prefix)
        return gpt

    def faults(self, job: "Job") -> list[str]:
        """Return what this method cannot do of what a job asks, a sentence each."""
        faults, train = [], job.train
        if self.command != "lora":
            faults += [
                f"finetune_{self.command} has an attention of its own, which train.{name} does not "
                "reach; leave it out"
                for name in ("attention_dropout", "document_mask", "pack")
                if getattr(train, name)
            ]
            start = job.config.adapter_start_layer  # type: ignore[attr-defined]
            if job.config.n_layer <= start and self.command == "adapter":
                faults.append(
                    f"LitGPT's adapter begins at layer {start}, and {job.config.name} has "
                    f"{job.config.n_layer}: nothing would train; use finetune_lora"
                )
        elif not any(_lora_places(job.config)) or job.config.lora_r < 1:  # type: ignore[attr-defined]
            faults.append(
                "LoRA is asked for nowhere: set lora_r to 1 or more, and one of lora_query, "
                "lora_key, lora_value, lora_projection, lora_mlp or lora_head"
            )
        if job.arguments.get("strategy") == "deepspeed":
            faults.append(
                "strategy deepspeed is for whole models; this finetuning takes auto, ddp or fsdp"
            )
        if train.tie_embeddings:
            faults.append("train.tie_embeddings: embeddings stay as they are in this finetuning")
        if train.balance_bias_rate:
            faults.append(
                "train.balance_bias_rate moves what belongs to the base model, which this "
                "finetuning does not save; leave it out, or balance with train.balance_loss"
            )
        if train.checkpoint_format == "sharded":
            faults.append("train.checkpoint_format: these checkpoints are small and always whole")
        return faults


LORA = Adaptation("lora", "mark_only_lora_as_trainable")
ADAPTER = Adaptation("adapter", "mark_only_adapter_as_trainable")
ADAPTER_V2 = Adaptation("adapter_v2", "mark_only_adapter_v2_as_trainable")


def adaptation_of(module: str) -> Adaptation:
    """Return the method of a LitGPT module such as `litgpt.finetune.lora`."""
    methods = {method.command: method for method in (LORA, ADAPTER, ADAPTER_V2)}
    return methods[module.rpartition(".")[2]]


def _lora_places(config: Any) -> list[bool]:
    names = ("query", "key", "value", "projection", "mlp", "head")
    return [getattr(config, f"lora_{name}") for name in names]


def _load_base(gpt: "GPT", base_dir: Path) -> None:
    """Fill the frozen weights, under whatever names the method keeps them; nothing may be left
    over."""
    result = gpt.load_state_dict(checkpoint.weights_of(base_dir), strict=False)
    trains = {name for name, parameter in gpt.named_parameters() if parameter.requires_grad}
    missing = [name for name in result.missing_keys if name not in trains]
    wrong = [f"{name} is missing" for name in missing]
    wrong += [f"{name} is unknown to the model" for name in result.unexpected_keys]
    if wrong:
        raise UserError(
            f"{base_dir / checkpoint.MODEL_FILE} does not fit its model_config.yaml: {wrong[0]} "
            f"({len(wrong)} such differences)"
        )


def _forget_prefix(attention: nn.Module, _: Any) -> None:
    """Have the adapter's keys and values made anew in every forward pass.

    LitGPT keeps them from the first one on, and finetunes with a prefix that never changes.
    """
    attention.adapter_kv_cache = None


def trained_parameters(module: nn.Module) -> int:
    """Return how many numbers train."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def quantizer(quantize: str, precision: str) -> Any:
    """Return the precision plugin for `--quantize bnb.MODE`.

    Raises:
        UserError: mixed precision, or bitsandbytes cannot do it here.
    """
    from phi_lit.quantize import BitsandbytesPrecision

    dtypes = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "32-true": torch.float32}
    if precision not in dtypes:
        raise UserError(
            f"a quantized model computes in one number format: precision {precision} cannot be; "
            f"use {', '.join(dtypes)}"
        )
    return BitsandbytesPrecision(quantize.removeprefix("bnb."), dtypes[precision])
