"""A text of the model's own now and then, so that one sees what a loss means."""

from collections.abc import Callable

import torch
from lightning import Fabric
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from litgpt.utils import select_sft_generate_example
from torch import Tensor

from phi_lit.data.supervised import Supervised
from phi_lit.errors import UserError
from phi_lit.train.job import Job
from phi_lit.train.model import LossModel


def sampler(job: Job, fabric: Fabric, model: LossModel) -> Callable[[], str] | None:
    """Return what lets the model continue `train.sample_prompt` (in finetuning also a question of
    the data), where it can.

    One process only: a sharded model has no place to keep a cache of keys and values.
    """
    given = job.train.sample_prompt
    if fabric.world_size > 1 and given is not None:
        fabric.print("train.sample_prompt: several processes share the model, so none writes")
    if job.tokenizer_dir is None or fabric.world_size > 1:
        return None
    tokenizer = Tokenizer(job.tokenizer_dir)
    prompt = tokenizer.encode(given) if given is not None else _example_of(job, tokenizer)
    if prompt is None:
        return None
    if len(prompt) >= job.length:
        if given is None:  # an example that leaves no room to answer
            return None
        raise UserError(f"train.sample_prompt is longer than a row of {job.length} tokens")
    new_tokens = job.eval.max_new_tokens or 100
    return lambda: sample_text(model.gpt, tokenizer, prompt, fabric.device, new_tokens)


def _example_of(job: Job, tokenizer: Tokenizer) -> Tensor | None:
    """Return the ids of a question of the data, or None where there is none: a flat array, or a
    data set that does not show its texts. LitGPT's data sets are asked as its finetuning does."""
    if isinstance(job.data, Supervised):
        return job.data.question()
    examples = getattr(getattr(job.data, "test_dataset", None), "data", None)
    style = getattr(job.data, "prompt_style", None)
    if job.command != "finetune" or not examples or style is None:
        return None
    return tokenizer.encode(style.apply(select_sft_generate_example(job.eval, job.data)))


@torch.no_grad()
def sample_text(
    gpt: GPT, tokenizer: Tokenizer, prompt: Tensor, device: torch.device, new_tokens: int = 100
) -> str:
    """Let `gpt` continue a prompt (T,), and leave it in training mode without a cache."""
    from litgpt.generate.base import generate

    encoded = prompt.to(device)
    gpt.eval()
    gpt.set_kv_cache(batch_size=1, device=device, dtype=gpt.transformer.wte.weight.dtype)
    try:
        # Every length would be compiled anew; for a few tokens that is the slow way.
        with torch.compiler.set_stance("force_eager"):
            written = generate(
                gpt,
                encoded,
                max_returned_tokens=min(len(encoded) + new_tokens, gpt.max_seq_length),
                temperature=0.8,
                top_k=50,
                eos_id=tokenizer.eos_id,
            )
    finally:
        gpt.clear_kv_cache()
        gpt.train()
    return tokenizer.decode(written)
