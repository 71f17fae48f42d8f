"""Small things that LitGPT's own finetune and generate commands stumble over, put right.

Each function takes the place of one of LitGPT's (see `seam_table.py`), and where LitGPT's works the
result is the same.
"""

import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from litgpt.tokenizer import Tokenizer
from torch import Tensor

RESPONSE = "### Response:"
"""Where LitGPT's commands for finetuned models cut the text, whatever the prompt style."""


class ResponseTokenizer(Tokenizer):
    """LitGPT's tokenizer for commands that show only what follows `### Response:`."""

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Return the text; one of another prompt style counts as a response from its start."""
        text = super().decode(*args, **kwargs)
        return text if RESPONSE in text else f"{RESPONSE}{text}"


def load_weights(filename: Path | str) -> dict[str, Tensor]:
    """Replace `lazy_load` where a base model is read: the weights, also of a saved training."""
    from phi_lit.tensors import lazy_load

    found = lazy_load(filename)
    return found.get("model", found)


def goes_on_training(generate_example: Callable[..., None]) -> Callable[..., None]:
    """Wrap a finetuning's `generate_example`: the model trains afterwards, and keeps no cache.

    LitGPT leaves it in evaluation where the prompt is too long for the rows: dropout is off from
    then on.
    """

    @wraps(generate_example)
    def run(fabric: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        try:
            generate_example(fabric, model, *args, **kwargs)
        finally:
            model.clear_kv_cache()
            model.train()

    return run


def has_target(labels: Tensor) -> bool:
    """Tell whether anything is to be learned from labels (..., T): the first id is nobody's
    target."""
    return bool((labels[..., 1:] != -100).any())


def over_targets(validate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a finetuning's `validate`: batches without a target are counted, not averaged to NaN."""

    @wraps(validate)
    def run(
        fabric: Any, model: Any, val_dataloader: Any, eval: Any, verbose: bool = True
    ) -> Tensor:
        loss = validate(fabric, model, val_dataloader, eval, verbose)
        if not loss.isnan():
            return loss
        seen = [batch for _, batch in zip(range(eval.max_iters), val_dataloader, strict=False)]
        kept = [batch for batch in seen if has_target(batch["labels"])]
        if len(kept) == len(seen):  # then it is the model's
            return loss
        fabric.print(f"{len(seen) - len(kept)} of {len(seen)} validation batches have no target")
        return validate(fabric, model, kept, eval, verbose) if kept else loss

    return run


def get_longest_seq_length(data: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """Replace the scan before a finetuning: the same, and rows without a target are counted."""
    lengths, empty = [], 0
    for row in data:
        lengths.append(len(row["input_ids"]))
        empty += not has_target(torch.as_tensor(row["labels"]))
    if empty:
        print(
            f"{empty:,} of {len(lengths):,} examples have no target left and teach nothing; are "
            "their answers cut off by train.max_seq_length?",
            file=sys.stderr,
        )
    longest = max(lengths)
    return longest, lengths.index(longest)
