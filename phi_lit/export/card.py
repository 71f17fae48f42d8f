"""The model card: YAML front matter as the hub validates it, and what a reader wants to know.

Everything in it comes from `facts.py` or from the export itself.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from litgpt.config import Config

from phi_lit import __version__
from phi_lit.errors import UserError
from phi_lit.export.facts import HYPERPARAMETERS, Facts


@dataclass(frozen=True)
class Subject:
    """What a card is about."""

    name: str
    """The model's name: its hub id, or the directory's name."""
    config: Config
    architecture: str
    """The class in transformers."""
    parameters: int
    dtype: str
    licence: str
    """The model's own licence, as the hub spells it ("mit", "apache-2.0", "unknown")."""
    prompt: str
    """What the model wants to read, with `{prompt}` where the request goes."""
    has_chat_template: bool
    """Whether its tokenizer puts messages into that form by itself."""
    difference: float | None
    """Largest difference of a logit from LitGPT's, where it was measured."""


def check_licence(licence: str) -> None:
    """Raise a `UserError` unless a licence is spelled as the hub's identifiers are."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise UserError(
            f"license is {licence!r}; the hub spells licences mit, apache-2.0, cc-by-4.0, other, "
            "unknown"
        )


def model_card(subject: Subject, facts: Facts) -> str:
    """Return README.md: front matter and text."""
    return f"---\n{_front_matter(subject, facts)}\n---\n\n" + "\n".join(_text(subject, facts))


def _front_matter(subject: Subject, facts: Facts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out" if score.task == "held-out loss" else "lm-eval",
            dataset_name=score.where if score.task == "held-out loss" else score.task,
            metric_type="loss" if score.task == "held-out loss" else score.metric,
            metric_name=f"{score.task}, {score.metric}",
            metric_value=score.value,
        )
        for score in facts.scores
    ]
    return ModelCardData(
        license=subject.licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["litgpt", "phi_lit", "safetensors"],
        base_model=facts.base_model,
        datasets=sorted(set(facts.hub_datasets)) or None,
        model_name=subject.name.rpartition("/")[2],
        eval_results=results or None,
    ).to_yaml()


def _text(subject: Subject, facts: Facts) -> Iterator[str]:
    config = subject.config
    yield f"# {subject.name.rpartition('/')[2]}\n"
    yield (
        f"{subject.parameters:,} parameters ({subject.dtype}): {config.n_layer} layers, width "
        f"{config.n_embd}, {config.n_head} heads, context {config.block_size:,} tokens, vocabulary "
        f"{config.padded_vocab_size:,}. In [LitGPT](https://github.com/Lightning-AI/litgpt) it is "
        f"`{config.name}`, in transformers a `{subject.architecture}`, without remote code. "
        f"Exported by phi-lit {__version__}."
    )
    if subject.difference is not None:
        yield (
            f"Its logits were compared with LitGPT's in float32: they differ by at most "
            f"{subject.difference:.1e}."
        )
    yield "\n## Use\n\n```python\nfrom transformers import pipeline\n"
    yield f'write = pipeline("text-generation", "{subject.name}")'
    request = repr(subject.prompt.replace("{prompt}", "def is_prime(n):"))
    if subject.has_chat_template:
        request = '[{"role": "user", "content": "What is a prime number?"}]'
    yield f'print(write({request}, max_new_tokens=64)[0]["generated_text"])\n```\n'
    if subject.prompt != "{prompt}":
        yield f"It wants requests in this form:\n\n```\n{subject.prompt}\n```\n"
    yield "Back to LitGPT: `hf download` it, then `litgpt convert_to_litgpt DIRECTORY`.\n"
    yield from _data(facts)
    yield from _scores(facts)
    yield from _recipe(facts)


def _data(facts: Facts) -> Iterator[str]:
    yield "## Data\n"
    yield from (f"- {line}" for line in facts.data or ["not recorded"])
    yield ""


def _scores(facts: Facts) -> Iterator[str]:
    yield "## Measured\n"
    if not facts.scores:
        yield "Nothing was measured on this checkpoint.\n"
        return
    yield "| | | on |\n|---|---:|---|"
    for score in facts.scores:
        yield f"| {score.task}, {score.metric} | {score.value:.4f} | {score.where} |"
        if score.task == "held-out loss":
            yield f"| perplexity | {math.exp(min(score.value, 700)):.2f} | the same |"
    yield ""


def _recipe(facts: Facts) -> Iterator[str]:
    yield "## Recipe\n"
    if not facts.recipe:
        yield "Not recorded.\n"
        return
    done = "" if facts.step is None else f" This is step {facts.step:,}."
    yield f"All options are in [{HYPERPARAMETERS}]({HYPERPARAMETERS}).{done} Those that were set:\n"
    yield f"```yaml\n{yaml.safe_dump(_only_set(facts.recipe), sort_keys=False)}```\n"
    if facts.command == "pretrain":
        command = f"litgpt pretrain --config {HYPERPARAMETERS}"
    else:
        base = facts.recipe.get("checkpoint_dir", "CHECKPOINT")
        command = f"litgpt {facts.command} {base} --config {HYPERPARAMETERS}"
    if facts.command is not None:
        yield f"To train it again, with phi_lit {__version__} installed:\n\n```\n{command}\n```\n"


def _only_set(value: dict) -> dict:
    """Leave out options that are null or empty: they are as the command has them by default."""
    kept = {k: _only_set(v) if isinstance(v, dict) else v for k, v in value.items()}
    return {k: v for k, v in kept.items() if v is not None and v != {}}


def prompt_form(checkpoint_dir: Path) -> str:
    """Return how the model wants to be asked, with `{prompt}` where the request goes."""
    from litgpt.prompts import has_prompt_style, load_prompt_style

    if not has_prompt_style(checkpoint_dir):
        return "{prompt}"
    return load_prompt_style(checkpoint_dir).apply("{prompt}")
