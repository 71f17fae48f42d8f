"""`phi-lit generate`: prompts from a file or standard input, completions as JSON Lines.

`litgpt generate` stays LitGPT's own: one prompt, one sample at a time, printed.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from phi_lit.checks import check_inference
from phi_lit.generate.loading import (
    choose_precision,
    has_room_twice,
    load_model,
    open_checkpoint,
)
from phi_lit.generate.prompts import Prompt, read_prompts
from phi_lit.generate.request import encode_prompts, setting_faults
from phi_lit.generate.results import open_results, to_line
from phi_lit.generate.sampler import Completion, Sampler
from phi_lit.generate.sampling import Sampling
from phi_lit.progress import progress
from phi_lit.train.args import raise_together


def generate(
    checkpoint_dir: Path,
    prompts: str = "",
    prompt: str = "",
    samples: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    filter_thres: float | None = None,
    stop: list[str] | str = "",
    ignore_eos: bool = False,
    prompt_style: str | None = None,
    seed: int = 0,
    batch_size: int | Literal["auto"] = "auto",
    precision: str | None = None,
    quantize: str | None = None,
    out: Path | None = None,
) -> None:
    """Let a model continue many prompts, many times each, in batches; write JSON Lines.

    Args:
        checkpoint_dir: The checkpoint directory, or a model's name below checkpoints/.
        prompts: A file of prompts, or - for standard input. Either JSON Lines, {"prompt": "..."}
            in every line with whatever other fields (they go into the completions' lines), or one
            prompt per plain line. May be compressed (.gz).
        prompt: One prompt, instead of a file.
        samples: Completions of each prompt.
        max_new_tokens: Most tokens of a completion. The model's context may end it earlier.
        temperature: Divides the logits; 0 takes the likeliest token (greedy).
        top_k: Sample among the k likeliest tokens only.
        top_p: Sample among the likeliest tokens that together reach this probability; after top_k
            and temperature, as in LitGPT.
        filter_thres: Top-k as the Agora's wrappers say it: the share of the vocabulary that is cut
            away; 0.9 keeps the likeliest tenth.
        stop: Strings that end a completion. They are not part of it; what stands before them is
            kept to the letter, newlines too. In a shell: --stop '["\\nclass", "\\ndef"]'.
        ignore_eos: Go on after the end-of-text token.
        prompt_style: What is put around every prompt; the checkpoint's own by default, as in
            LitGPT. `default` takes prompts as they are.
        seed: Decides the samples, each with its numbers of prompt and sample: the same alone, in
            any batch, and after a resume (up to the rounding of the logits' last bits).
        batch_size: Samples at a time; auto takes as many as pay and fit into memory.
        precision: 32-true, bf16-true or 16-true. By default 32-true on a CPU, bf16-true on a GPU
            that has it.
        quantize: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8, as in `litgpt generate`.
        out: The file to write, one completion per line, sorted when it is finished. A file begun
            with the same settings is gone on with. Without it, standard output, as they finish.
    """
    stops = _stops(stop)
    sampling = Sampling(temperature, top_k, top_p, filter_thres)
    faults = setting_faults(samples, max_new_tokens, sampling, stops)
    if batch_size != "auto" and batch_size < 1:
        faults.append(f"batch_size is {batch_size}; choose at least 1, or auto")
    raise_together(faults)
    precision = choose_precision(precision)
    check_inference(
        checkpoint_dir, quantize=quantize, precision=precision, max_new_tokens=max_new_tokens
    )
    found = read_prompts(prompts, prompt)
    checkpoint = open_checkpoint(checkpoint_dir)
    style = checkpoint.prompt_style(prompt_style)
    texts = [style.apply(one.text) for one in found]
    encode_prompts(
        checkpoint.tokenizer, texts, checkpoint.config.block_size, [one.name for one in found]
    )
    pack = has_room_twice(checkpoint, precision, quantize)
    settings = {
        "samples": samples, "max_new_tokens": max_new_tokens, "temperature": temperature,
        "top_k": top_k, "top_p": top_p, "filter_thres": filter_thres, "stop": stops,
        "ignore_eos": ignore_eos, "seed": seed, "precision": precision, "quantize": quantize,
        "prompts": _hash(found, texts), "weights": checkpoint.fingerprint(),
    }  # fmt: skip

    def work(done: Collection[tuple[int, int]]) -> Iterator[Completion]:
        model = load_model(checkpoint, precision, quantize)
        rows = None if batch_size == "auto" else batch_size
        sampler = Sampler(model, checkpoint.tokenizer, batch_size=rows, pack=pack)
        del model  # the sampler has laid its weights out anew
        return sampler.sample(
            texts, samples=samples, max_new_tokens=max_new_tokens, sampling=sampling, stop=stops,
            seed=seed, ignore_eos=ignore_eos, done=done,
        )  # fmt: skip

    total = len(found) * samples
    if out is None:
        _write_all(work(()), found, total, 0, _print_line)
        return
    with open_results(out, settings, prompts=len(found), samples=samples) as results:
        if len(results.done) < total:
            _write_all(work(frozenset(results.done)), found, total, len(results.done), results.add)
        results.finish()
    print(f"{out}: {total:,} completions of {len(found):,} prompts", file=sys.stderr)


def _stops(stop: list[str] | str) -> list[str]:
    """Return the stop strings; warn of a backslash where a newline was meant."""
    stops = [text for text in ([stop] if isinstance(stop, str) else stop) if text]
    for text in stops:
        if "\\n" in text:
            print(
                f"phi_lit: note: the stop string {text} holds a backslash and an n, not a newline. "
                "A newline is written --stop '[\"\\ndef\"]'.",
                file=sys.stderr,
            )
    return stops


def _hash(found: list[Prompt], texts: list[str]) -> str:
    content = [[text, prompt.fields] for prompt, text in zip(found, texts, strict=True)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_all(
    completions: Iterator[Completion],
    found: list[Prompt],
    total: int,
    before: int,
    write: Callable[[dict[str, Any]], None],
) -> None:
    """Write every completion as it comes; Ctrl-C ends it in one line, with what is written kept."""
    tokens, began = 0, time.monotonic()
    with progress(total, "generate", "samples", initial=before) as bar:
        try:
            for completion in completions:
                write(result_line(found[completion.prompt], completion))
                tokens += len(completion.ids)
                bar.note(tokens=f"{tokens / (time.monotonic() - began):,.0f}/s")
                bar.update()
        except KeyboardInterrupt:
            bar.say(f"stopped: {bar.done:,} of {total:,} samples are written")
            raise SystemExit(130) from None


def result_line(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    """Return a completion's line: its prompt's other fields first, then ours."""
    return {
        **prompt.fields,
        "prompt": prompt.text,
        "prompt_index": completion.prompt,
        "sample": completion.sample,
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.ids),
    }


def _print_line(line: dict[str, Any]) -> None:
    """Write a line to standard output; a reader that has enough (`head`) ends the command."""
    try:
        sys.stdout.buffer.write(to_line(line))
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
