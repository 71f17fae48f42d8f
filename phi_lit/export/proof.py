"""That an export computes what the checkpoint computes: both run on the same tokens, in float32.

The two models are loaded one after the other, so that only one is in memory at a time.
"""

import gc
from pathlib import Path

import torch
from litgpt import GPT
from litgpt.config import Config
from torch import Tensor

from phi_lit.errors import UserError

TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the logits' standard deviation: what other orders of
summation in float32 make; a wrong rotary base or activation makes hundreds of times as much."""
LENGTH = 128


def largest_difference(
    config: Config, lit: dict[str, Tensor], dtype: torch.dtype | None, directory: Path
) -> float:
    """Return the largest difference between a checkpoint's logits and its export's.

    Args:
        config: the model.
        lit: its tensors by LitGPT's names.
        dtype: what the export rounded them to; LitGPT's side is rounded the same.
        directory: the export.

    Raises:
        UserError: they differ by more than rounding.
    """
    ids = torch.randint(
        config.vocab_size,
        (1, min(LENGTH, config.block_size)),
        generator=torch.Generator().manual_seed(0),
    )
    ours = _litgpt_logits(config, lit, dtype, ids)
    gc.collect()
    theirs = _hub_logits(directory, ids)
    difference = (ours - theirs).abs().max().item()
    if not difference <= TOLERANCE * ours.std().item():
        raise UserError(
            f"the export would not compute what the checkpoint computes: logits differ by up to "
            f"{difference:.1e} (their standard deviation is {ours.std():.1e}). If the checkpoint "
            "directory holds a config.json, it is another model's: remove it. Nothing was "
            "written; --verify false writes it all the same"
        )
    return difference


@torch.inference_mode()
def _litgpt_logits(
    config: Config, lit: dict[str, Tensor], dtype: torch.dtype | None, ids: Tensor
) -> Tensor:
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict({n: t.to(dtype or t.dtype).float() for n, t in lit.items()}, assign=True)
    model.cos, model.sin = model.rope_cache()
    return model.eval()(ids)


@torch.inference_mode()
def _hub_logits(directory: Path, ids: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",  # the reference: others leave out soft-capping (Gemma 2)
            trust_remote_code=False,
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    return model.eval()(ids).logits
