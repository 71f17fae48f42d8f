"""Dense MLP, experts instead of it, experts after it: same text, same tokens, same compute.

The comparison of the Phi-2 training README, at a size that a CPU trains. All variants have the
attention, the width, the vocabulary and the recipe in common, and the same arithmetic per token: an
inner width of 4 D in all that a token visits. Dense has it in one MLP. `instead` has 8 experts of
2 D, of which a token visits 2. `after` has an MLP of 2 D, and after it 8 experts of D, of which a
token visits 2. (Routers add 8 D multiplications per layer, 0.5 % of the block.) So experts differ
in the parameters they hold, not in the work they do.

Every run is one of `litgpt pretrain`'s, through the same function, so a killed study goes on where
it stopped: call it again. Seconds per step are measured apart, the variants taking turns in one
run, because the wall clock of a loaded machine tells nothing.

    python benchmarks/novels.py austen data/austen      # see there how to get the package
    python benchmarks/moe_study.py --novels data/austen --threads 1 --out_dir out/moe-study
    python benchmarks/moe_study.py --out_dir out/moe-study --only_report --json study.json
"""

import argparse
import json
import resource
import statistics
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import moe_step
from _measure import Contestant, compete, machine, median, print_table, ratio, write_json

LENGTH, ROWS = 256, 8
"""Tokens per row, rows per step."""
VOCABULARY = 2048
LAYERS, WIDTH, HEADS = 4, 128, 4
EXPERTS, KEPT = 8, 2
SEEDS = (1, 2, 3)
VALIDATIONS = 8
"""Held-out losses per run, evenly spaced."""
VALIDATED_ROWS = 96

BALANCE_LOSS, ROUTER_Z_LOSS = 0.01, 0.001
"""What the runs with experts add to the recipe (Switch Transformer's and ST-MoE's values)."""


def config_of(variant: str) -> Any:
    """Return the model of a variant: phi's block, with 4 D of inner width per token."""
    from litgpt.config import Config

    base: dict[str, Any] = dict(
        name=f"study-{variant}", hf_config={}, block_size=LENGTH, vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY, n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS,
        rotary_percentage=0.5, parallel_residual=True, shared_attention_norm=True, bias=True,
        lm_head_bias=True, gelu_approximate="tanh", mlp_class_name="GptNeoxMLP",
        intermediate_size=4 * WIDTH,
    )  # fmt: skip
    return Config(**{**base, **VARIANTS[variant]})


def _experts(inner: int, placement: str, **more: Any) -> dict[str, Any]:
    return dict(
        mlp_class_name="PhiMoE", n_expert=EXPERTS, n_expert_per_token=KEPT,
        moe_intermediate_size=inner, hf_config={"moe": {"placement": placement}}, **more,
    )  # fmt: skip


VARIANTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "instead": _experts(2 * WIDTH, "instead"),
    "after": _experts(WIDTH, "after", intermediate_size=2 * WIDTH),
}


# ------------------------------------------------------------------------------------------- runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out_dir", type=Path, default=Path("out/moe-study"))
    parser.add_argument("--novels", type=Path, help="the directory that novels.py wrote")
    parser.add_argument("--tokens", type=int, default=491_520, help="tokens of each run")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=35.0, help="CPU minutes of this call")
    parser.add_argument("--rounds", type=int, default=15, help="turns per variant in the timing")
    parser.add_argument("--only_report", action="store_true", help="only what is there already")
    parser.add_argument("--json", type=Path, help="write figures here, table and plot beside")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    if not arguments.only_report:
        train_all(arguments)
    report(arguments)


def train_all(arguments: argparse.Namespace) -> None:
    """Train what is not trained yet, seed by seed, so that an early stop leaves whole seeds."""
    sources = corpora(arguments)
    for seed in arguments.seeds:
        for corpus, source in sources.items():
            tokenizer = make_tokenizer(arguments.out_dir, corpus, source)
            for variant in VARIANTS:
                if cpu_minutes() > arguments.budget:
                    print(f"{cpu_minutes():.0f} CPU minutes used: call again to go on")
                    return
                train(arguments, corpus, source, tokenizer, variant, seed)


def corpora(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the sources by name: what `data.init_args.sources` would say."""
    found: dict[str, Any] = {"code": "stdlib"}
    if arguments.novels is not None:
        found = {"novels": {"path": str(arguments.novels), "strip": "gutenberg"}, **found}
    return found


def make_tokenizer(out_dir: Path, corpus: str, source: Any) -> Path:
    """Train the tokenizer of a corpus, unless it is there."""
    from phi_lit.data.sources import Source, open_source
    from phi_lit.data.tokenizer import train_bpe

    directory = out_dir / f"{corpus}-tokenizer"
    if not (directory / "tokenizer.json").is_file():
        texts = (document.text for document in open_source(source, Source).documents())
        train_bpe(texts, VOCABULARY, directory)
    return directory


def run_dir(out_dir: Path, corpus: str, variant: str, seed: int) -> Path:
    return out_dir / f"{corpus}-{variant}-{seed}"


def train(
    arguments: argparse.Namespace, corpus: str, source: Any, tokenizer: Path, variant: str,
    seed: int,
) -> None:  # fmt: skip
    """Do one run, or what is left of it, as `litgpt pretrain` would; its words go to a log."""
    from litgpt.args import EvalArgs

    from phi_lit.data.textbook import CodeTextbook
    from phi_lit.train.args import TrainArgs
    from phi_lit.train.pretrain import setup

    out = run_dir(arguments.out_dir, corpus, variant, seed)
    if (out / "final").is_dir():
        return
    steps = arguments.tokens // (ROWS * LENGTH)
    began = cpu_minutes()
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{out}.log", "a") as log, redirect_stdout(log), redirect_stderr(log):
        setup(
            model_name=f"study-{variant}",
            model_config=config_of(variant),
            out_dir=out,
            precision="32-true",
            resume="auto",
            data=CodeTextbook(
                sources=[source], data_dir=arguments.out_dir / "tokens", val_fraction=0.05,
                seed=seed, num_workers=1,
            ),
            train=TrainArgs(
                global_batch_size=ROWS, micro_batch_size=ROWS, max_tokens=None, max_steps=steps,
                lr_schedule="linear", lr_warmup_steps=steps // 20, min_lr=0.0, max_norm=1.0,
                weight_decay_on="matrices", init="normal", compile="off", keep_last=1,
                save_interval=max(steps // 3, 1),
                balance_loss=None if variant == "dense" else BALANCE_LOSS,
                router_z_loss=None if variant == "dense" else ROUTER_Z_LOSS,
            ),
            eval=EvalArgs(interval=max(steps // VALIDATIONS, 1), max_iters=VALIDATED_ROWS // ROWS),
            optimizer={"class_path": "torch.optim.AdamW",
                       "init_args": {"lr": 3e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
            devices=1, tokenizer_dir=tokenizer, logger_name="csv", seed=seed,
        )  # fmt: skip
    if not (out / "final").is_dir():  # asked to stop: the loop has saved and returned
        raise SystemExit(f"{out.name} is not finished; see {out}.log, and call again to go on")
    print(f"{out.name}: held-out loss {held_out(out)[-1][1]:.4f}, "
          f"{cpu_minutes() - began:.1f} CPU minutes", flush=True)  # fmt: skip


def cpu_minutes() -> float:
    """Return the minutes of processor time that this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return (used.ru_utime + used.ru_stime) / 60


def held_out(run: Path) -> list[tuple[int, float]]:
    """Return (tokens, held-out loss in nats per token) of a run, in order."""
    from phi_lit.train.monitor import read_record

    rows = read_record(run)
    return [(row["tokens"], row["val_loss"]) for row in rows if "val_loss" in row]


# ----------------------------------------------------------------------------------------- timing


def time_steps(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Let the variants take turns at one training step each, from trained weights on real rows.

    Returns:
        Per variant `seconds` (median) and `of_dense`, the median over rounds of how many times as
        fast as the dense one.
    """
    corpus = next(iter(corpora(arguments)))
    contestants = [
        Contestant(variant, step_of_run, dict(
            run=str(run_dir(arguments.out_dir, corpus, variant, arguments.seeds[0])),
            store=str(next((arguments.out_dir / "tokens").glob("*/manifest.json")).parent),
            variant=variant,
        ))
        for variant in VARIANTS
    ]  # fmt: skip
    compete(contestants, rounds=arguments.rounds, threads=arguments.threads)
    return {
        each.name: {
            "seconds": median(each.times),
            "of_dense": ratio(contestants[0], each),
            "failed": each.failed,
        }
        for each in contestants
    }


def step_of_run(run: str, store: str, variant: str) -> Any:
    """Return a training step of a trained run's model."""
    import numpy as np
    import torch

    from phi_lit.data.tokens import TokenStore

    tokens = TokenStore.open(Path(store), verify="sizes").split("train")
    rows = np.stack([tokens[row * LENGTH : row * LENGTH + LENGTH + 1] for row in range(ROWS)])
    return moe_step.build(
        config_of(variant), ROWS, "32-true", weights=f"{run}/final",
        ids=torch.from_numpy(rows.astype(np.int64)),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- report


def report(arguments: argparse.Namespace) -> None:
    """Print the tables of what is trained, and write figures and plot if asked."""
    results = {
        corpus: {
            variant: {
                seed: held_out(run_dir(arguments.out_dir, corpus, variant, seed))
                for seed in arguments.seeds
                if (run_dir(arguments.out_dir, corpus, variant, seed) / "final").is_dir()
            }
            for variant in VARIANTS
        }
        for corpus in corpora(arguments)
    }
    timing = arguments.out_dir / "timing.json"
    first = next(iter(results.values()))
    if not all(arguments.seeds[0] in by_seed for by_seed in first.values()):
        print("not one run of each variant is trained yet: nothing to time or compare")
        return
    if not timing.is_file() or not arguments.only_report:
        timing.write_text(json.dumps(time_steps(arguments), indent=2))
    times = json.loads(timing.read_text())
    about = machine(arguments.threads)
    rows = [row for corpus in results for row in table(corpus, results[corpus], times)]
    print_table(COLUMNS, rows)
    if arguments.json is not None:
        write_json(arguments.json, {
            "machine": about, "tokens": arguments.tokens, "rows per step": ROWS, "length": LENGTH,
            "timing": times, "held out": results, "columns": COLUMNS, "table": rows,
        })  # fmt: skip
        draw(results, times, arguments.json.with_suffix(".png"))
        with open(arguments.json.with_suffix(".md"), "w") as file, redirect_stdout(file):
            print_table(COLUMNS, rows)


COLUMNS = [
    "text", "variant", "parameters", "active", "seeds", "held-out loss", "minus dense",
    "seconds per step, dense = 1", "loss at the time dense needs",
]  # fmt: skip


def table(corpus: str, runs: dict[str, dict[int, Any]], times: dict[str, Any]) -> list[list[Any]]:
    """Return a row per variant: means over the seeds, with their standard deviation."""
    from phi_lit.train.flops import count_parameters

    rows = []
    for variant, by_seed in runs.items():
        if not by_seed:
            continue
        counted = count_parameters(config_of(variant))
        slower = 1 / times[variant]["of_dense"]
        paired = [
            curve[-1][1] - runs["dense"][seed][-1][1]
            for seed, curve in by_seed.items()
            if seed in runs["dense"]
        ]
        rows.append([
            corpus, variant, f"{counted.total:,}", f"{counted.active:,}", len(by_seed),
            spread([curve[-1][1] for curve in by_seed.values()]),
            "" if variant == "dense" else spread(paired, "+"),
            f"{slower:.2f}",
            spread([at(curve, curve[-1][0] / slower) for curve in by_seed.values()]),
        ])  # fmt: skip
    return rows


def spread(values: list[float], sign: str = "") -> str:
    """Write the mean and the standard deviation of a sample."""
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{deviation}"


def at(curve: list[tuple[int, float]], tokens: float) -> float:
    """Return the held-out loss after so many tokens, on the line between the two around it."""
    for (before, high), (after, low) in pairwise(curve):
        if tokens <= after:
            return high + (low - high) * (tokens - before) / (after - before)
    return curve[-1][1]


def draw(results: dict[str, Any], times: dict[str, Any], png: Path) -> None:
    """Draw held-out loss against tokens and against time: means, and each seed as a thin line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from phi_lit.train.plot import short_number

    colours = {"dense": "#4f5d75", "instead": "#2563ab", "after": "#d1495b"}
    figure = Figure(figsize=(11, 4.2 * len(results)), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(results), 2, squeeze=False)
    for (corpus, runs), (left, right) in zip(results.items(), panels, strict=True):
        for variant, by_seed in runs.items():
            curves = list(by_seed.values())
            if not curves:
                continue
            tokens = [place for place, _ in curves[0]]
            seconds = [place / (ROWS * LENGTH) * times[variant]["seconds"] for place in tokens]
            means = [statistics.mean(losses) for losses in zip(
                *([loss for _, loss in curve] for curve in curves), strict=True)]  # fmt: skip
            for axes, places in ((left, tokens), (right, seconds)):
                for curve in curves:
                    axes.plot(places, [loss for _, loss in curve], color=colours[variant],
                              linewidth=0.6, alpha=0.5)  # fmt: skip
                axes.plot(places, means, color=colours[variant], linewidth=1.8,
                          label=f"{variant} {means[-1]:.3f}")  # fmt: skip
        left.set_ylabel(f"held-out loss on {corpus} (nats per token)")
        left.set_xlabel("tokens")
        left.xaxis.set_major_formatter(short_number)
        right.set_xlabel("seconds of training (steps x median seconds per step)")
        left.legend(frameon=False)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e6e6e6", linewidth=0.8)
    figure.savefig(png)


if __name__ == "__main__":
    main()
