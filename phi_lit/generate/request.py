"""What is asked of the sampler, checked before any work: settings, prompts, stop strings."""

from collections.abc import Sequence

from litgpt.tokenizer import Tokenizer

from phi_lit.generate.sampling import Sampling
from phi_lit.train.args import raise_together


def setting_faults(
    samples: int, max_new_tokens: int, sampling: Sampling, stop: Sequence[str]
) -> list[str]:
    """Return what is impossible in the settings, a sentence each."""
    faults = sampling.faults()
    if samples < 1:
        faults.append(f"samples is {samples}; choose at least 1")
    if max_new_tokens < 1:
        faults.append(f"max_new_tokens is {max_new_tokens}; choose at least 1")
    if not all(stop):
        faults.append("a stop string is empty; it would end every completion before it begins")
    return faults


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_seq_length: int,
    names: Sequence[str] | None = None,
) -> list[list[int]]:
    """Return each prompt's ids, as LitGPT's commands encode them.

    Args:
        tokenizer: the model's tokenizer.
        prompts: the texts.
        max_seq_length: the model's context.
        names: what to call each prompt in an error; "prompt 0" and so on by default.

    Raises:
        UserError: a prompt has no token, or leaves no room for one more.
    """
    encoded = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    faults = []
    for number, ids in enumerate(encoded):
        name = names[number] if names else f"prompt {number}"
        if not ids:
            faults.append(f"{name} is empty: there is nothing to continue")
        elif len(ids) >= max_seq_length:
            faults.append(
                f"{name} has {len(ids):,} tokens; the model's context holds {max_seq_length:,}, "
                "one of which at least must be left: shorten it"
            )
    raise_together(faults[:3] + ([f"and {len(faults) - 3:,} more like these"] * (len(faults) > 3)))
    return encoded


def special_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> set[int]:
    """Return the ids of stop strings that are special tokens, which decoding leaves out."""
    if tokenizer.backend != "huggingface":
        return set()
    ids = {tokenizer.processor.token_to_id(text) for text in stop}
    return {i for i in ids if i is not None and not tokenizer.processor.decode([i])}
