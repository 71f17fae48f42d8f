"""What is recorded about a checkpoint: its recipe, its data and their licences, its scores.

Read from the files that training and evaluation leave: `hyperparameters.yaml`, `checkpoint.json`,
the run's `metrics.jsonl`, the token store's manifest and lm-eval's `results.json`. What is not
recorded is said to be unknown, never guessed. The words around it are in `card.py`.
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from phi_lit.errors import UserError
from phi_lit.train.checkpoint import MANIFEST
from phi_lit.train.monitor import read_record

if TYPE_CHECKING:
    from phi_lit.data.sources import Source

HYPERPARAMETERS = "hyperparameters.yaml"
SECRETS = ("access_token",)
"""Options that LitGPT records and nobody should publish."""

COMMANDS = {
    "lora_r": "finetune_lora",
    "adapter_prompt_length": "finetune_adapter",
    "checkpoint_dir": "finetune_full",
    "model_name": "pretrain",
}
"""The command that a recipe belongs to, by an option that only it has (the first that is there)."""


@dataclass(frozen=True)
class Score:
    """One measured figure."""

    task: str
    metric: str
    value: float
    where: str
    """What it was measured on, in words."""


@dataclass
class Facts:
    """Everything that is known about how a checkpoint came about."""

    recipe: dict[str, Any] = field(default_factory=dict)
    """The training command's options; empty where they were not recorded."""
    step: int | None = None
    """Optimizer steps done."""
    data: list[str] = field(default_factory=list)
    """A line for every source, with its licence."""
    hub_datasets: list[str] = field(default_factory=list)
    """Those of them that are data sets on the hub."""
    scores: list[Score] = field(default_factory=list)

    @property
    def command(self) -> str | None:
        """The LitGPT command that trained it."""
        return next((word for key, word in COMMANDS.items() if key in self.recipe), None)

    @property
    def base_model(self) -> str | None:
        """The hub id that it was finetuned from, where LitGPT downloaded that one."""
        parts = Path(str(self.recipe.get("checkpoint_dir", ""))).parts
        known = "checkpoints" in parts and len(parts) - parts.index("checkpoints") == 3
        return "/".join(parts[-2:]) if known else None


def gather(checkpoint_dir: Path) -> Facts:
    """Read what is recorded about a checkpoint."""
    facts = Facts(recipe=_recipe(checkpoint_dir / HYPERPARAMETERS))
    _add_loss(facts, checkpoint_dir)
    _add_harness(facts, checkpoint_dir / "evaluate" / "results.json")
    _add_data(facts)
    return facts


def _recipe(path: Path) -> dict[str, Any]:
    """Return the recorded options without secrets, the home directory written as `~`."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8").replace(f"{Path.home()}/", "~/")
    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is broken YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(recipe, dict):
        return {}
    return {key: value for key, value in recipe.items() if key not in SECRETS}


def _add_loss(facts: Facts, checkpoint_dir: Path) -> None:
    """Take the held-out loss from the checkpoint itself, or from the record of its run."""
    loss, measured = None, None
    manifest = checkpoint_dir / MANIFEST
    if manifest.is_file():
        content = json.loads(manifest.read_text(encoding="utf-8"))
        facts.step, loss = content["step"], content["val_loss"]
        measured = facts.step
    rows = read_record(checkpoint_dir.resolve().parent)
    if facts.step is None and rows and checkpoint_dir.resolve().name == "final":
        facts.step = rows[-1]["step"]
    if loss is None and facts.step is not None:
        held_out = [row for row in rows if "val_loss" in row and row["step"] <= facts.step]
        if held_out:
            loss, measured = held_out[-1]["val_loss"], held_out[-1]["step"]
    if loss is not None:
        where = f"held-out part of the training data, at step {measured:,}"
        facts.scores.append(Score("held-out loss", "nats per token", loss, where))


def _add_harness(facts: Facts, path: Path) -> None:
    """Take the scores that `litgpt evaluate` left (lm-eval's results)."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    for task, metrics in content.get("results", {}).items():
        shots = content.get("n-shot", {}).get(task)
        where = "lm-eval" if shots is None else f"lm-eval, {shots}-shot"
        for name, value in metrics.items():
            metric, _, form = name.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                metric = metric if form in ("", "none") else f"{metric} ({form})"
                facts.scores.append(Score(task, metric, value, where))


def _add_data(facts: Facts) -> None:
    """Describe the data with its licences, as far as the recipe names it."""
    data = facts.recipe.get("data")
    if not isinstance(data, dict):
        return
    arguments = data.get("init_args") or {}
    if arguments.get("store"):
        _add_store(facts, Path(arguments["store"]).expanduser() / "manifest.json")
    elif "sources" in arguments:
        _add_sources(facts, arguments["sources"])
    if not facts.data:
        name = str(data.get("class_path", "unknown")).rpartition(".")[2]
        where = arguments.get("json_path") or arguments.get("repo_id") or ""
        facts.data = [f"{name}{f' ({where})' if where else ''}: licence not recorded"]


def _add_store(facts: Facts, manifest: Path) -> None:
    if manifest.is_file():
        for source in json.loads(manifest.read_text(encoding="utf-8")).get("sources", []):
            facts.data.append(f"{source['name']}: licence {source['licence'] or 'not stated'}")


def _add_sources(facts: Facts, written: Any) -> None:
    for source in _open(written):
        facts.data.append(source.licence_line())
        if source.hub is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", source.hub):
            facts.hub_datasets.append(source.hub)


def _open(written: Any) -> "list[Source]":
    """Open a recipe's sources, of texts or of examples; none where it is another version's (its
    text is in the card all the same)."""
    from phi_lit.data.examples import ExampleSource
    from phi_lit.data.sources import Source, open_sources

    for kind in (Source, ExampleSource):
        with suppress(UserError):
            return open_sources(written, kind)
    return []
