"""How many samples fit into memory, by arithmetic."""

import torch
from litgpt.config import Config

from phi_lit.checks import free_bytes
from phi_lit.errors import UserError

MOST_ROWS = {"cpu": 64, "cuda": 256}
"""Where more rows hardly pay: matrix products are at full speed."""

SHARE = 0.8
"""Of the free memory; the rest is for temporaries and for others."""


def row_bytes(config: Config, dtype: torch.dtype, tokens: int) -> int:
    """Return the bytes of one row: keys and values of `tokens`, and its logits with copies."""
    if config.latent_attention:
        heads, head = config.n_head, config.qk_head_dim + config.v_head_dim
    else:
        heads, head = config.n_query_groups, 2 * config.head_size
    kept = config.n_layer * heads * head * tokens * dtype.itemsize
    return kept + 4 * 4 * config.padded_vocab_size


def fitting_rows(
    config: Config,
    dtype: torch.dtype,
    device: torch.device,
    *,
    prompt_tokens: int,
    new_tokens: int,
    samples: int,
) -> int:
    """Return how many samples at a time pay and fit.

    Args:
        config: the model's.
        dtype: the type of keys and values.
        device: where they lie.
        prompt_tokens: of the longest prompt.
        new_tokens: most tokens of a completion.
        samples: samples that share a prompt.

    Raises:
        UserError: not even one fits.
    """
    prompt = row_bytes(config, dtype, prompt_tokens)
    own = row_bytes(config, dtype, new_tokens)
    # Rows of several prompts at a time: some prompts are there with their last few samples.
    each = own + prompt / max(1.0, samples / 4)
    free = SHARE * free_bytes(device.type)
    if own + prompt > free:
        raise UserError(
            f"not enough memory: one sample of {prompt_tokens + new_tokens:,} tokens needs "
            f"{(own + prompt) / 1e9:,.2f} GB and {free / 1e9:,.2f} GB are free; ask for fewer "
            "max_new_tokens, shorten the prompts, or choose precision bf16-true"
        )
    return max(1, min(MOST_ROWS.get(device.type, 64), int(free / each)))
