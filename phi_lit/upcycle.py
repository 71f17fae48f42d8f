"""`phi-lit upcycle`: a dense checkpoint becomes one with experts, which goes on where it stood.

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): experts instead of an MLP start as copies
of it, and a token's weights add up to one, so the model answers as before, up to the rounding of
that sum. Experts narrower than the MLP hold a part of it each: the experts of a group, one per
part, share a row of the router, so that a token visits whole groups (the virtual groups of arXiv
2410.07524), and their output counts as often as the MLP has parts. Experts after the MLP start with
a zero output projection: nothing is added, and the logits are the same to the bit. Equal experts
part by themselves, because each learns from other tokens.

Letters in tensor names: E experts, P parts of the MLP, F inner size of an expert, D hidden size.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import torch
from litgpt.config import Config, name_to_config
from litgpt.model import GPT
from litgpt.utils import check_valid_checkpoint_dir, extend_checkpoint_dir, save_config
from torch import Tensor, nn

from phi_lit.errors import UserError
from phi_lit.experts import MOE_CLASS
from phi_lit.files import staged_dir
from phi_lit.progress import progress
from phi_lit.train.args import raise_together
from phi_lit.train.checkpoint import MODEL_FILE, save_file, weights_of
from phi_lit.train.flops import count_parameters
from phi_lit.train.init import initialize

CARRIED = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json",
           "prompt_style.yaml")  # fmt: skip
"""What goes along as it is."""

EXPERT_FIELDS = {
    "name", "hf_config", "mlp_class_name", "n_expert", "n_expert_per_token", "n_shared_expert",
    "moe_intermediate_size", "routed_scaling_factor",
}  # fmt: skip
"""The fields of a config in which a model with experts may differ from the dense one."""

KINDS = {"GptNeoxMLP": "gelu", "LLaMAMLP": "swiglu"}
"""LitGPT's MLPs and the activation of the experts that can take their weights."""


def upcycle(
    checkpoint_dir: Path,
    out_dir: Path,
    model_name: str | None = None,
    n_expert: int | None = None,
    n_expert_per_token: int | None = None,
    placement: Literal["instead", "after"] | None = None,
    every: int | None = None,
    moe_intermediate_size: int | None = None,
    noise: float = 0.0,
    seed: int = 42,
) -> None:
    """Turn a dense checkpoint into experts, with the same logits at the start.

    Experts that together are as wide as the MLP cost a token what the MLP did.

    Args:
        checkpoint_dir: A LitGPT checkpoint directory of a dense model.
        out_dir: Where the new checkpoint goes; pretrain from it with --initial_checkpoint_dir, or
            finetune it.
        model_name: The model with experts, such as phi1-small-moe; where not given, the dense model
            gets 8 experts per layer, of which a token visits 2, together as wide as the MLP. The
            options below change either.
        n_expert: Experts per layer.
        n_expert_per_token: Experts that a token visits.
        placement: instead (of the MLP: each expert a copy of it, or of a part of it) or after (the
            MLP stays, and what the experts add to it starts at zero).
        every: Every how many layers have experts.
        moe_intermediate_size: Inner width of an expert.
        noise: Noise on each copy, as a share of its weights' standard deviation. The logits then
            differ from the dense model's; 0 keeps them.
        seed: Decides routers, noise, and the first layers of experts after the MLP.
    """
    checkpoint_dir = extend_checkpoint_dir(Path(checkpoint_dir))
    check_valid_checkpoint_dir(checkpoint_dir, ignore_tokenizer_files=True)
    dense = Config.from_file(checkpoint_dir / "model_config.yaml")
    if dense.n_expert:
        raise UserError(f"{checkpoint_dir} has {dense.n_expert} experts per layer already.")
    if dense.mlp_class_name not in KINDS:
        raise UserError(
            f"{checkpoint_dir} has MLPs of the kind {dense.mlp_class_name}; only "
            f"{' and '.join(KINDS)} can be upcycled."
        )
    changes = {
        "n_expert": n_expert, "n_expert_per_token": n_expert_per_token,
        "moe_intermediate_size": moe_intermediate_size,
    }  # fmt: skip
    config = target_config(
        dense, model_name, {key: value for key, value in changes.items() if value is not None},
        {"placement": placement, "every": every},
    )  # fmt: skip
    raise_together(faults(dense, config, checkpoint_dir, out_dir, noise))
    weights = weights_of(checkpoint_dir)
    check_weights(dense, weights, checkpoint_dir)
    gpt = grown(dense, config, weights, noise=noise, seed=seed)
    with staged_dir(out_dir) as partial:
        save_file(gpt.state_dict(), partial / MODEL_FILE)
        save_config(config, partial)
        for name in CARRIED:
            if (checkpoint_dir / name).is_file():
                shutil.copyfile(checkpoint_dir / name, partial / name)
    print(told(dense, config, out_dir, noise))


def target_config(
    dense: Config, model_name: str | None, changes: dict[str, Any], moe: dict[str, Any]
) -> Config:
    """Return the config with experts: a model by name, or the dense one with experts put in.

    Args:
        dense: the checkpoint's.
        model_name: a model with experts, or None.
        changes: fields of a config, to be set in either.
        moe: keys of `hf_config["moe"]`, likewise; those that are None say nothing.
    """
    if model_name is not None:
        base = asdict(Config.from_name(model_name))
    else:
        kept = changes.get("n_expert_per_token", 2)
        base = asdict(dense) | {
            "name": f"{dense.name}-moe", "mlp_class_name": MOE_CLASS, "n_expert": 8,
            "n_expert_per_token": kept,
            "moe_intermediate_size": dense.intermediate_size // max(kept, 1),
        }  # fmt: skip
    hf_config = dict(base["hf_config"] or {})
    extras = {key: value for key, value in moe.items() if value is not None}
    kind = {} if model_name else {"activation": KINDS.get(dense.mlp_class_name, "gelu")}
    hf_config["moe"] = {**kind, **hf_config.get("moe", {}), **extras}
    return Config(**{**base, **changes, "hf_config": hf_config})


def faults(
    dense: Config, config: Config, checkpoint_dir: Path, out_dir: Path, noise: float
) -> list[str]:
    """Return what keeps this dense model from becoming that one with experts, a sentence each."""
    if config.mlp_class_name != MOE_CLASS:
        return [f"{config.name} is a model without experts of phi_lit; phi1-nano-moe is one with"]
    from extensions.phi_moe import Settings

    settings = Settings.of(config)
    found = [
        f"{field.name} is {getattr(dense, field.name)} in {checkpoint_dir} and "
        f"{getattr(config, field.name)} in {config.name}"
        for field in fields(Config)
        if field.name not in EXPERT_FIELDS
        and getattr(dense, field.name) != getattr(config, field.name)
    ]
    if settings.activation != KINDS[dense.mlp_class_name]:
        found.append(
            f"hf_config.moe.activation is {settings.activation}, the checkpoint's MLP is "
            f"{dense.mlp_class_name}"
        )
    if settings.placement == "instead":
        found += _copy_faults(dense, config, settings)
    if not 0 <= noise < 1:
        found.append(f"noise is {noise}; it is a share, from 0 to below 1")
    if out_dir.exists():
        found.append(f"out_dir {out_dir} exists; choose a new one")
    return found


def _copy_faults(dense: Config, config: Config, settings: Any) -> list[str]:
    """Return what keeps copies of the MLP from answering together as it does alone."""
    found = []
    kept, inner = config.n_expert_per_token, config.moe_intermediate_size
    whole = dense.intermediate_size
    fitting = [whole // n for n in range(1, kept + 1) if _are_parts(whole // n, dense, config)]
    if not _are_parts(inner, dense, config):
        found.append(
            f"moe_intermediate_size is {inner}: {config.n_expert} experts of that width, {kept} "
            f"per token, cannot stand for an MLP of {whole}; it can be "
            f"{' or '.join(map(str, fitting))}"
        )
    alone = settings.normalize == "auto" and config.n_expert_per_token == 1
    if settings.normalize == "all" or alone:
        found.append(
            "a token's weights are a softmax over all experts and do not add up to one (set "
            "hf_config.moe.normalize: kept, or keep more than one expert per token)"
        )
    if config.routed_scaling_factor != 1.0:
        found.append(f"routed_scaling_factor is {config.routed_scaling_factor}; only 1 keeps it")
    return found


def _are_parts(inner: int | None, dense: Config, config: Config) -> bool:
    """Tell whether groups of experts of that width make up the dense MLP for every token."""
    assert dense.intermediate_size is not None
    parts, rest = divmod(dense.intermediate_size, inner or config.intermediate_size or 1)
    return not rest and parts > 0 and not (config.n_expert_per_token % parts or
                                           config.n_expert % parts)  # fmt: skip


# ---------------------------------------------------------------------------------------- weights


def grown(
    dense: Config, config: Config, weights: dict[str, Tensor], *, noise: float, seed: int
) -> GPT:
    """Return the model with experts, filled from the dense one's weights, in their dtype.

    Args:
        dense: the config of `weights`.
        config: the config with experts.
        weights: by LitGPT's names.
        noise: on the copies, as a share of each tensor's standard deviation.
        seed: of everything that is drawn.
    """
    torch.manual_seed(seed)
    dtype = weights["lm_head.weight"].dtype
    with default_dtype(dtype):
        gpt = GPT(config)
        initialize(gpt, "normal")
    blocks = list(gpt.transformer.h)
    with progress(len(blocks), "upcycle", "layers") as bar, torch.no_grad():
        for name, tensor in gpt.state_dict().items():
            if name in weights:
                tensor.copy_(weights[name])
        for number, block in enumerate(blocks):
            if hasattr(block.mlp, "experts"):
                prefix = f"transformer.h.{number}.mlp."
                mlp = {n.removeprefix(prefix): w for n, w in weights.items() if prefix in n}
                fill_with_copies(block.mlp, mlp, noise)
            bar.update()
    return gpt


def check_weights(dense: Config, weights: dict[str, Tensor], checkpoint_dir: Path) -> None:
    """Raise a `UserError` if the weights are not those of the config beside them."""
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in GPT(dense).state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    if differing := {name for name, _ in found.items() ^ wanted.items()}:
        raise UserError(
            f"{checkpoint_dir / MODEL_FILE} is not of the model in its model_config.yaml: "
            f"{min(differing)} differs ({len(differing)} such tensors)"
        )


def fill_with_copies(layer: Any, mlp: dict[str, Tensor], noise: float) -> None:
    """Make a layer's experts copies of an MLP or of its parts, and its shared experts silent.

    Args:
        layer: experts instead of an MLP.
        mlp: its tensors by name: `fc.weight`, `proj.bias`, or LLaMA's `fc_1.weight`, `fc_2.weight`.
        noise: as a share of each tensor's standard deviation.
    """
    fc, proj = layer.experts.fc, layer.experts.proj
    n_expert, _, inner = proj.weight.shape
    parts = mlp["proj.weight"].shape[1] // inner
    firsts = ("fc_1", "fc_2") if "fc_1.weight" in mlp else ("fc",)

    def first(kind: str, part: int) -> Tensor:
        rows = slice(part * inner, (part + 1) * inner)
        return torch.cat([mlp[f"{name}.{kind}"][rows] for name in firsts])

    for expert in range(n_expert):
        part = expert % parts
        columns = slice(part * inner, (part + 1) * inner)
        fc.weight[expert] = first("weight", part)
        # A token's weights add up to one over all parts together, so each part weighs 1 / P.
        proj.weight[expert] = mlp["proj.weight"][:, columns] * parts
        if fc.bias is not None:
            fc.bias[expert] = first("bias", part)
            proj.bias[expert] = mlp["proj.bias"]
    for stack in (fc, proj) if noise else ():
        scale = noise * stack.weight.float().std().item()
        stack.weight.add_(torch.randn_like(stack.weight) * scale)
    groups = layer.gate.weight[::parts]
    layer.gate.weight.copy_(groups.repeat_interleave(parts, dim=0))
    if layer.shared_experts is not None:
        nn.init.zeros_(layer.shared_experts.proj.weight)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create tensors in another type for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def told(dense: Config, config: Config, out_dir: Path, noise: float) -> str:
    """Return what was made, and whether it answers as before."""
    counted = count_parameters(config)
    if config.hf_config["moe"].get("placement") == "after":
        logits = "are the dense model's to the bit: what the experts add starts at zero"
    elif noise:
        logits = f"differ from the dense model's: noise of {noise:g} was asked for"
    else:
        logits = "are the dense model's, up to the rounding of a weighted sum of equal copies"
    return (
        f"{out_dir}: {config.name}, {counted.total:,} parameters, of which a token visits "
        f"{counted.active:,}; {dense.name} has {count_parameters(dense).total:,}\n"
        f"its logits {logits}\n"
        f"train on: {_next_command(config, out_dir)} --train.balance_loss 0.01 ..."
    )


def _next_command(config: Config, out_dir: Path) -> str:
    """Return what trains on: pretraining where the model has a name, else any finetuning."""
    if config.name in name_to_config and Config.from_name(config.name) == config:
        return f"litgpt pretrain {config.name} --initial_checkpoint_dir {out_dir}"
    return f"litgpt finetune_full {out_dir}"
