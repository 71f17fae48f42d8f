"""Useful tokens per second when examples are packed, and when they are padded as LitGPT pads them.

Every turn trains on the same examples, so every contestant sees the same useful tokens and the
ratio of times is that of useful tokens per second. Padded are micro-batches of a few examples, each
padded to its longest (`get_sft_collate_fn`); packed are rows of 2,048 by best fit, documents
masked. LitGPT's row is what `litgpt finetune_full` does with a micro-batch: its model, its chunked
head, its cross-entropy. Ours are Fabric, our loss, accumulation and the same clipping and AdamW.
Lengths are those of the standard library's functions, or drawn like Orca's (2.7 to a row).
Target: packed at least 2 times padded; at least 98 % of the positions useful.

    python benchmarks/packing.py                         # the standard library's functions
    python benchmarks/packing.py --lengths orca
    python benchmarks/packing.py --only ours --rounds 3 --json results/packing.json
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
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

VOCABULARY = 51_200
ROW = 2048
ADAMW = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
SIGMA, SHORTEST = 0.9, 16
"""Of the lognormal that stands for Orca's lengths; its mean gives 2.7 examples per 2,048."""


class Examples(list):
    """Examples as a data set: items with `input_ids` and `labels`."""


def make_examples(lengths: str, count: int) -> Examples:
    """Return examples of the standard library's functions, or of lengths like Orca's."""
    import numpy as np
    import torch

    if lengths == "stdlib":
        return functions(count)
    generator = np.random.default_rng(0)
    drawn = np.round(generator.lognormal(0, SIGMA, 4 * count) * 749).astype(int)
    drawn = drawn[(drawn >= SHORTEST) & (drawn <= ROW)][:count]
    found = Examples()
    for length in drawn.tolist():
        ids = torch.from_numpy(generator.integers(0, 50_000, length))
        labels = ids.clone()
        labels[: length // 3] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def functions(count: int) -> Examples:
    """Return some of the standard library's functions, with codegen's vocabulary."""
    from litgpt.tokenizer import Tokenizer

    from phi_lit.data.codegen import build_codegen
    from phi_lit.data.exercises import CodeExercises

    with TemporaryDirectory() as directory:
        build_codegen(Path(directory) / "tokenizer")
        module = CodeExercises(mode="sft", data_dir=Path(directory) / "examples")
        module.connect(Tokenizer(Path(directory) / "tokenizer"), 1, ROW)
        module.prepare_data()
        module.setup()
        step = len(module.train_dataset) // count
        return Examples(module.train_dataset[number * step] for number in range(count))


def micro_batches(kind: str, examples: Examples, batch: int) -> Iterator[Any]:
    """Yield the micro-batches that a contestant makes of some examples."""
    from types import SimpleNamespace

    from litgpt.data import get_sft_collate_fn

    from phi_lit.train.feed import pair
    from phi_lit.train.packed import PackedFeed

    if kind.startswith("packed"):
        feed = PackedFeed(
            SimpleNamespace(dataset=examples),  # type: ignore[arg-type]
            micro_batch=1, rank=0, world=1, seed=0, row_length=ROW, masked="unmasked" not in kind,
        )  # fmt: skip
        for _ in range(feed.rows_per_epoch or 0):
            yield feed.take()
        return
    collate = get_sft_collate_fn()
    counts = {"token_counts": {"raw": 0, "raw_plus_prompt_template": 0}}
    for start in range(0, len(examples), batch):
        padded = collate([{**each, **counts} for each in examples[start : start + batch]])
        yield padded if kind == "litgpt" else pair(padded)


def make_gpt() -> Any:
    """Build LitGPT's model with the weights that everyone starts from."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT

    torch.manual_seed(0)
    gpt = GPT(
        Config.from_name(
            "phi-1_5", n_layer=4, n_embd=256, n_head=8, intermediate_size=1024, block_size=ROW,
            padded_vocab_size=VOCABULARY, rotary_percentage=0.5,
        )
    )  # fmt: skip
    gpt.apply(gpt._init_weights)
    return gpt


def build(kind: str, file: Path, batch: int, count: int) -> Callable[[], float]:
    """Return one turn: a step over the next `count` examples, which gives its loss."""
    import torch
    from lightning import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    examples = torch.load(file)
    gpt = make_gpt()
    if kind == "litgpt":
        model: Any = fabric.setup_module(gpt)
    else:
        from phi_lit.train.documents import apply_document_mask
        from phi_lit.train.heap import keep_freed_memory
        from phi_lit.train.model import LossModel

        keep_freed_memory()
        apply_document_mask(gpt)
        model = fabric.setup_module(LossModel(gpt))
    optimizer = torch.optim.AdamW(gpt.parameters(), fused=kind != "litgpt", **ADAMW)
    turns = [0]

    def step() -> float:
        place = (turns[0] % 4) * count
        turns[0] += 1
        batches = list(micro_batches(kind, Examples(examples[place : place + count]), batch))
        loss = (_litgpts if kind == "litgpt" else _ours)(fabric, model, batches)
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def _litgpts(fabric: Any, model: Any, batches: list[Any]) -> float:
    """Accumulate as `litgpt finetune_full` does: the mean of the micro-batches' means."""
    from litgpt.utils import chunked_cross_entropy

    total = 0.0
    for batch in batches:
        logits = model(batch["input_ids"], lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, batch["labels"][..., 1:])
        fabric.backward(loss / len(batches))
        total += float(loss.detach()) / len(batches)
    return total


def _ours(fabric: Any, model: Any, batches: list[Any]) -> float:
    """Accumulate as our loop does: the mean over all targets."""
    total, targets = 0.0, sum(batch.n_targets for batch in batches)
    for batch in batches:
        loss = model(batch.inputs, batch.targets, targets, batch.documents)
        fabric.backward(loss)
        total += float(loss.detach())
    return total


def useful(kind: str, examples: Examples, batch: int) -> float:
    """Return the share of a contestant's positions that hold a token of an example."""
    positions = 0
    for found in micro_batches(kind, examples, batch):
        positions += (found["input_ids"][:, 1:] if kind == "litgpt" else found.inputs).numel()
    return sum(len(each["input_ids"]) - 1 for each in examples) / positions


def main() -> None:
    import torch

    parser = arguments(__doc__.split("\n")[0], rounds=3)
    parser.add_argument("--lengths", choices=("stdlib", "orca"), default="stdlib")
    parser.add_argument("--examples", type=int, default=96, help="examples in a turn")
    parser.add_argument("--batch", type=int, nargs="*", default=[4, 16], help="padded together")
    options = parser.parse_args()
    about = machine(options.threads)
    print_header(f"Packed and padded: {options.lengths}, rows of {ROW}", about)
    examples = make_examples(options.lengths, 4 * options.examples)
    rows = [("litgpt", f"LitGPT's loop, padded, {n} at a time", n) for n in options.batch]
    rows += [("padded", f"ours, padded, {n} at a time", n) for n in options.batch]
    rows += [("packed", "ours, packed", 1), ("packed, unmasked", "ours, packed, no mask", 1)]
    with TemporaryDirectory() as directory:
        shared = dict[str, Any](file=Path(directory) / "examples.pt", count=options.examples)
        torch.save(list(examples), shared["file"])
        contestants = [
            Contestant(name, build, dict(kind=kind, batch=batch, **shared))
            for kind, name, batch in rows
        ]
        running = chosen(contestants, options.only)
        compete(running, rounds=options.rounds, threads=options.threads, malloc=options.malloc)
    tokens = sum(len(each["input_ids"]) - 1 for each in examples) / 4
    report(running, {name: useful(kind, examples, batch) for kind, name, batch in rows}, tokens)
    write_json(
        options.json,
        {"machine": about, **vars(options), "json": None,
         "contestants": {c.name: {"times": c.times, **c.figures} for c in running}},
    )  # fmt: skip


def report(running: list[Contestant], shares: dict[str, float], tokens: float) -> None:
    """Print the table: useful share, useful tokens per second, and the ratios."""
    by_name = {contestant.name: contestant for contestant in running}
    first, packed = running[0], by_name.get("ours, packed")
    lines = []
    for each in running:
        seconds = median(each.times)
        lines.append(
            [
                each.name,
                f"{shares[each.name]:.1%}",
                each.failed or (tokens / seconds if seconds else None),
                ratio(first, each),
                ratio(each, packed) if packed else None,
                each.figures.get("memory", {}).get("peak"),
                each.figures.get("first"),
            ]
        )
    print_table(
        ["", "useful", "useful tokens/s", f"times {first.name}", "ours, packed, is times this",
         "peak MB", "first loss"],
        lines,
    )  # fmt: skip


if __name__ == "__main__":
    main()
