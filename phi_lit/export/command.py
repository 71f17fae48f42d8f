"""`phi-lit export`: a LitGPT checkpoint as a directory that transformers and the hub read.

Here is the order of things only: everything that can be refused is refused before the weights are
touched, the directory is built beside its place, and it moves in when it is whole and proven.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from litgpt.config import Config

from phi_lit import __version__
from phi_lit.errors import UserError
from phi_lit.export import EXPORT
from phi_lit.files import staged_dir

WEIGHTS = "lit_model.pth"
LITGPT_FILES = ("model_config.yaml", "prompt_style.yaml")
"""Files that LitGPT alone reads; they make the way back exact."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Request:
    """What `phi-lit export` was asked for."""

    checkpoint_dir: Path
    out_dir: Path
    dtype: str | None
    max_shard_size: str
    licence: str
    name: str
    """What the model card calls the model: its hub id, or the directory's name."""
    verify: bool


def export(
    checkpoint_dir: Path,
    out_dir: Path | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    max_shard_size: str = "5GB",
    license: str = "unknown",
    verify: bool = True,
    overwrite: bool = False,
    push: str | None = None,
    private: bool = True,
    revision: str | None = None,
    dry_run: bool = False,
) -> None:
    """Write a checkpoint in the hub's format (safetensors, config.json, model card), and push it.

    Args:
        checkpoint_dir: A LitGPT checkpoint directory (lit_model.pth, model_config.yaml, tokenizer).
        out_dir: The directory to make; CHECKPOINT-hub beside the checkpoint by default.
        dtype: The type of the weights: fp32, bf16 or fp16; as in the checkpoint by default.
        max_shard_size: The largest weights file, such as 500MB or 5GB.
        license: The model's own licence for its card, as the hub spells it (mit, apache-2.0, ...).
        verify: Run checkpoint and export on the same tokens and refuse an export that differs.
        overwrite: Replace out_dir even if it is not an export.
        push: A model id on the hub, owner/name, to send the export to (made if need be).
        private: Whether a repository that is made is private.
        revision: The branch to push to; the main one by default.
        dry_run: Make the export and list what would be pushed, with sizes, but send nothing.
    """
    from litgpt.utils import extend_checkpoint_dir

    from phi_lit.export import push as hub
    from phi_lit.export.card import check_licence

    checkpoint_dir = extend_checkpoint_dir(Path(checkpoint_dir))
    out_dir = Path(out_dir or f"{checkpoint_dir.resolve()}-hub")
    request = Request(
        checkpoint_dir, out_dir, dtype, max_shard_size, license, push or out_dir.name, verify
    )
    _check_destination(checkpoint_dir, out_dir, overwrite)
    check_licence(license)
    if push is not None:
        hub.check_name(push)
    elif dry_run or revision is not None:
        raise UserError("dry_run and revision are about pushing: say where, with push OWNER/NAME")
    config = open_checkpoint(checkpoint_dir)
    if push is not None and not dry_run:
        hub.check_login(push)
    difference = make_export(request, config)
    proof = "" if difference is None else f", logits within {difference:.1e} of LitGPT's"
    print(f"{out_dir}: {_gigabytes(out_dir)}{proof}")
    if push is not None and dry_run:
        print(hub.listing(out_dir, push, revision))
    elif push is not None:
        print(f"pushed to {hub.push(out_dir, push, private=private, revision=revision)}")


def _check_destination(checkpoint_dir: Path, out_dir: Path, overwrite: bool) -> None:
    if out_dir.resolve() == checkpoint_dir.resolve():
        raise UserError(f"out_dir is the checkpoint itself ({out_dir}); choose another directory")
    if out_dir.resolve() in checkpoint_dir.resolve().parents:
        raise UserError(f"out_dir {out_dir} holds the checkpoint; choose another directory")
    occupied = out_dir.is_file() or (out_dir.is_dir() and any(out_dir.iterdir()))
    if occupied and not overwrite and not (out_dir / EXPORT).is_file():
        raise UserError(
            f"{out_dir} exists and is not an export of ours (it has no {EXPORT}); choose another "
            "out_dir, or pass --overwrite true to replace it"
        )
    if out_dir.is_file():
        raise UserError(f"{out_dir} is a file; choose a directory")


def open_checkpoint(checkpoint_dir: Path) -> Config:
    """Return the configuration of a checkpoint whose files are all there.

    Raises:
        UserError: it is none, or a kind that has to be merged, joined or loaded otherwise first.
    """
    if not checkpoint_dir.is_dir():
        raise UserError(f"there is no checkpoint directory {checkpoint_dir}")
    if not (checkpoint_dir / WEIGHTS).is_file():
        raise UserError(f"{checkpoint_dir} has no {WEIGHTS}{_what_it_is(checkpoint_dir)}")
    path = checkpoint_dir / "model_config.yaml"
    if not path.is_file():
        raise UserError(f"{checkpoint_dir} has no model_config.yaml: it is no LitGPT checkpoint")
    try:
        return Config.from_file(path)
    except (yaml.YAMLError, TypeError, ValueError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a model's configuration ({reason})") from error


def _what_it_is(directory: Path) -> str:
    if (directory / f"{WEIGHTS}.lora").is_file():
        return f": its LoRA weights are not merged yet. Run `litgpt merge_lora {directory}` first"
    if any(directory.glob("lit_model.pth.adapter*")):
        return ": it is an adapter, which no architecture of transformers computes"
    if any(directory.glob("shard-*.pth")):
        return f": it is in shards. Run `phi-lit consolidate {directory}` first"
    if (directory / "lit_model.pth").is_dir():
        return ": it was saved sharded by Fabric; save a full checkpoint"
    return ": it is no LitGPT checkpoint"


def make_export(request: Request, config: Config) -> float | None:
    """Build the export directory; return the largest difference of a logit if it was measured.

    Raises:
        UserError: the model cannot be exported, or would not compute the same; nothing is left.
    """
    _require_transformers()
    import torch

    from phi_lit.export import configuration, tokenizer, weights
    from phi_lit.export.proof import largest_difference
    from phi_lit.train.checkpoint import weights_of

    source = request.checkpoint_dir
    words = configuration.words_for(config, source)
    tokenizer.check_vocabulary(source, config.padded_vocab_size)
    special = tokenizer.special_ids(source)
    lit = weights_of(source)
    _check_weights(lit, config, source)
    dtype = getattr(torch, DTYPES[request.dtype]) if request.dtype else None
    layout = weights.plan(config, lit, dtype=dtype, max_shard_size=request.max_shard_size)
    hub_config = configuration.configure(words, layout, special)
    _check_room(request.out_dir, layout.bytes)
    with staged_dir(request.out_dir) as partial:
        tokenizer.write_tokenizer(source, partial)
        tokenizer.write_generation_config(source, partial, special)
        hub_config.save_pretrained(partial)
        weights.write(layout, partial)
        difference = largest_difference(config, lit, dtype, partial) if request.verify else None
        _write_words(request, config, hub_config, layout, difference, partial)
    return difference


def _require_transformers() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("transformers", "safetensors") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"exporting needs {' and '.join(missing)}: pip install 'phi-lit[hub]' brings them"
        )


def _check_weights(lit: dict[str, Any], config: Config, directory: Path) -> None:
    """Hold the weights' names and shapes against what the configuration says."""
    import torch
    from litgpt import GPT

    if any("lora_" in name for name in lit):
        raise UserError(
            f"{directory / WEIGHTS} holds unmerged LoRA weights. Run `litgpt merge_lora` first"
        )
    with torch.device("meta"):
        wanted = GPT(config).state_dict()
    faults = [f"{name} is missing" for name in wanted.keys() - lit.keys()]
    faults += [f"{name} is unknown" for name in lit.keys() - wanted.keys()]
    faults += [
        f"{name} is {tuple(lit[name].shape)}, there {tuple(wanted[name].shape)}"
        for name in wanted.keys() & lit.keys()
        if wanted[name].shape != lit[name].shape
    ]
    if faults:
        raise UserError(
            f"{directory / WEIGHTS} does not fit model_config.yaml beside it: {sorted(faults)[0]} "
            f"({len(faults)} such differences)"
        )


def _check_room(out_dir: Path, needed: int) -> None:
    parent = next(path for path in out_dir.resolve().parents if path.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed * 1.01:
        raise UserError(
            f"the export needs {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free at "
            f"{parent}. Free some room, or choose another out_dir or --dtype bf16"
        )


def _write_words(
    request: Request, config: Config, hub_config: Any, layout: Any, difference: float | None,
    partial: Path,
) -> None:  # fmt: skip
    """Write what is for people and for LitGPT: card, recipe, LitGPT's files, export.json."""
    from litgpt.prompts import PromptStyle, has_prompt_style, load_prompt_style

    from phi_lit.chat.conversation import was_taught
    from phi_lit.export.card import Subject, model_card, prompt_form
    from phi_lit.export.facts import HYPERPARAMETERS, gather
    from phi_lit.export.tokenizer import has_chat_template

    source = request.checkpoint_dir
    facts = gather(source)
    styled = has_prompt_style(source)
    style = load_prompt_style(source) if styled else PromptStyle.from_config(config)
    subject = Subject(
        name=request.name,
        config=config,
        architecture=hub_config.architectures[0],
        parameters=sum(tensor.numel() for tensor in layout.tensors.values()),
        dtype=str(hub_config.dtype).removeprefix("torch."),
        licence=request.licence,
        prompt=prompt_form(source),
        has_chat_template=has_chat_template(partial) and not was_taught(source, style),
        difference=difference,
    )
    (partial / "README.md").write_text(model_card(subject, facts), encoding="utf-8")
    if facts.recipe:
        text = yaml.safe_dump(facts.recipe, sort_keys=False)
        (partial / HYPERPARAMETERS).write_text(text, encoding="utf-8")
    for name in LITGPT_FILES:
        if (request.checkpoint_dir / name).is_file():
            shutil.copyfile(request.checkpoint_dir / name, partial / name)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    record = {"phi_lit": __version__, "litgpt_name": config.name, "files": sizes}
    (partial / EXPORT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _gigabytes(directory: Path) -> str:
    files = [path.stat().st_size for path in directory.iterdir()]
    return f"{len(files)} files, {sum(files) / 1e9:.3f} GB"
