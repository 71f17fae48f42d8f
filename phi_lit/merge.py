"""`litgpt merge_lora`: LoRA's weights added into the base model's, as one ordinary checkpoint.

LitGPT's own reads base checkpoints that are a flat mapping only, not those that its `pretrain` and
`finetune_full` (and ours) save; ours reads both, gives the same weights, and writes them beside
their place first.
"""

from pathlib import Path
from typing import Any

from phi_lit.errors import UserError

LORA_FILE = "lit_model.pth.lora"


def merge_lora(
    checkpoint_dir: Path,
    pretrained_checkpoint_dir: Path | None = None,
    precision: str | None = None,
) -> None:
    """Merges the LoRA weights with the base model.

    See ``litgpt finetune lora``.

    Creates a new ``lit_model.pth`` file by merging the LoRA weights (``lit_model.pth.lora``)
    with the original checkpoint weights.

    Arguments:
        checkpoint_dir: Path to the checkpoint directory with trained LoRA weights, which is the output of
            ``litgpt finetune lora``.
        pretrained_checkpoint_dir: Optional path to the checkpoint directory with the weights of the base model
            corresponding to the LoRA checkpoint. By default, this will automatically be inferred from the metadata
            in the given `checkpoint_dir` directory. Only set this if the base model's checkpoint directory
            has moved or was renamed.
        precision: Optional precision setting to instantiate the model weights in. By default, this will
            automatically be inferred from the metadata in the given ``checkpoint_dir`` directory.
    """  # noqa: E501 (LitGPT's own lines, so that --help reads the same)
    from litgpt.scripts.merge_lora import load_lora_metadata
    from litgpt.utils import extend_checkpoint_dir

    checkpoint_dir = extend_checkpoint_dir(checkpoint_dir)
    if not (checkpoint_dir / LORA_FILE).is_file():
        raise UserError(
            f"checkpoint_dir: {checkpoint_dir} has no {LORA_FILE}; give a directory that `litgpt "
            "finetune_lora` saved, such as out/finetune/lora/final"
        )
    if (checkpoint_dir / "lit_model.pth").is_file():
        print("LoRA weights have already been merged in this checkpoint.")
        return
    settings, base_dir, _ = load_lora_metadata(checkpoint_dir)
    base_dir = extend_checkpoint_dir(pretrained_checkpoint_dir or base_dir)
    merge_into(checkpoint_dir, base_dir, settings)
    print(f"Saved merged weights to {str(checkpoint_dir / 'lit_model.pth')!r}")


def merge_into(checkpoint_dir: Path, base_dir: Path, settings: dict[str, Any]) -> None:
    """Write `lit_model.pth` into a directory of LoRA weights.

    Args:
        checkpoint_dir: holds the LoRA weights and the model's config.
        base_dir: holds the weights that they were trained beside.
        settings: lora_r and the like, by name.

    Raises:
        UserError: the base is not whole, or is not the base of these weights.
    """
    import os

    import torch
    from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights

    from phi_lit.train import checkpoint, foreign
    from phi_lit.train.args import raise_together

    raise_together(foreign.faults(base_dir, "the base model"))
    state = checkpoint.weights_of(base_dir)
    lora = checkpoint.load_file(checkpoint_dir / LORA_FILE)
    lora = lora.get("model", lora)
    with torch.device("meta"):
        model = GPT(Config.from_file(checkpoint_dir / "model_config.yaml", **settings))
        model.cos = model.sin = None  # nothing to merge there
    try:
        model.load_state_dict({**state, **lora}, assign=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise UserError(
            f"{base_dir} is not the base of the LoRA weights in {checkpoint_dir}: {first}"
        ) from error
    model.to(dtype=next(iter(lora.values())).dtype)  # as LitGPT: what was trained sets the type
    merge_lora_weights(model)
    merged = {
        name.replace("linear.", ""): tensor
        for name, tensor in model.state_dict().items()
        if not lora_filter(name, tensor)
    }
    partial = checkpoint_dir / f".lit_model.pth.{os.getpid()}"
    try:
        checkpoint.save_file(merged, partial)
        os.replace(partial, checkpoint_dir / "lit_model.pth")
    finally:
        partial.unlink(missing_ok=True)
