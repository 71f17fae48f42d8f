"""Every YAML parses, its header's arithmetic holds, and the published numbers are in it."""

import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from litgpt.config import Config

HUB = Path(__file__).parents[1] / "config_hub"
PRETRAIN = {"phi1": ("phi-1", 24), "phi1-small": ("phi1-small", 20)}
EXAMPLES_PER_ROW = Fraction("2.7")
"""How many of Orca's examples its packing put into 2,048 ids, on average (section 4.1)."""
FILES = sorted(path.stem for path in HUB.glob("*.yaml"))


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((HUB / f"{name}.yaml").read_text())


def header(name: str) -> dict[str, str]:
    """The five facts at the top: what, needs, batch, length, measured."""
    lines = (HUB / f"{name}.yaml").read_text().splitlines()
    found = [re.match(r"# (\w+): +(.*)", line) for line in lines[:5]]
    assert all(found), "the first five lines are: What, Needs, Batch, Length, Measured"
    return {match[1]: match[2] for match in found if match}


def numbers(text: str) -> list[int]:
    return [int(word.replace(",", "")) for word in re.findall(r"\d[\d,]*", text)]


def row_length(name: str) -> int:
    config = load(name)
    if "model_name" in config:
        return (
            config["train"].get("max_seq_length")
            or Config.from_name(config["model_name"]).block_size
        )
    return config["train"]["max_seq_length"]


@pytest.mark.parametrize("name", FILES)
def test_header_arithmetic_holds(name: str) -> None:
    facts, train = header(name), load(name)["train"]
    assert list(facts) == ["What", "Needs", "Batch", "Length", "Measured"]
    rows, length = train["global_batch_size"], row_length(name)
    assert numbers(facts["Batch"])[:3] == [rows, length, rows * length]
    if "max_steps" in train:
        steps = train["max_steps"]
        assert numbers(facts["Length"])[:2] == [steps, steps * rows * length]
    else:
        epochs, in_epoch, examples, _, _, steps, tokens = numbers(facts["Length"])
        assert epochs == train["epochs"]
        assert in_epoch == math.ceil(examples / EXAMPLES_PER_ROW)
        assert steps == epochs * in_epoch // rows  # as course.py counts
        assert tokens == steps * rows * length
    for step in train.get("name_steps", {}):
        assert step in numbers(facts["Length"])
        assert step * rows * length in numbers(facts["Length"])


@pytest.mark.parametrize("name", FILES)
def test_every_yaml_parses_with_the_command_it_is_for(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import litgpt.finetune.full
    import litgpt.pretrain
    from jsonargparse import ArgumentParser

    module = litgpt.pretrain if "model_name" in load(name) else litgpt.finetune.full
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(module.setup)
    parsed = parser.parse_args(["--config", str(HUB / f"{name}.yaml")])
    ready = parser.instantiate_classes(parsed)
    exercises = "CodeExercises" if name.endswith("-exercises") else "CodeTextbook"
    assert type(ready.data).__name__ == ("Instruct" if name.startswith("orca") else exercises)
    assert ready.train.check() == []


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_is_the_published_recipe(name: str) -> None:
    config = load(name)
    train, optimizer = config["train"], config["optimizer"]
    assert config["model_name"] == PRETRAIN[name][0]
    assert config["precision"] == "16-mixed"
    assert (train["global_batch_size"], row_length(name)) == (1024, 2048)
    assert (train["max_steps"], train["lr_warmup_steps"]) == (36_000, 750)
    assert list(train["name_steps"]) == [24_000]
    assert (train["lr_schedule"], train["min_lr"]) == ("linear", 0.0)
    assert (train["attention_dropout"], train["residual_dropout"]) == (0.1, 0.1)
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert (optimizer["init_args"]["lr"], optimizer["init_args"]["weight_decay"]) == (1e-3, 0.1)
    assert 24_000 % train["save_interval"] == 0


@pytest.mark.parametrize("name", [f"{name}-exercises" for name in PRETRAIN])
def test_finetuning_is_the_published_recipe(name: str) -> None:
    config = load(name)
    train, optimizer = config["train"], config["optimizer"]
    base = load(name.removesuffix("-exercises"))
    named = Path(base["out_dir"]) / base["train"]["name_steps"][24_000]
    assert Path(config["checkpoint_dir"]) == named
    assert (train["global_batch_size"], train["max_seq_length"]) == (256, 2048)
    assert (train["max_steps"], train["lr_warmup_steps"]) == (6_000, 50)
    assert (train["save_interval"], train["keep_best"]) == (1_000, True)
    assert train["lr_schedule"] == "linear"
    assert (optimizer["init_args"]["lr"], optimizer["init_args"]["weight_decay"]) == (1e-4, 0.01)


def test_orcas_stages_are_the_published_ones_and_follow_each_other() -> None:
    first, second = load("orca-1-flan-5m"), load("orca-2-flan-1m")
    assert Path(second["checkpoint_dir"]) == Path(first["out_dir"]) / "final"
    for config, preset in ((first, "flan-5m"), (second, "flan-1m")):
        train, data = config["train"], config["data"]["init_args"]
        assert data["sources"] == [{"preset": preset}]
        assert (train["epochs"], train["max_seq_length"], train["pack"]) == (4, 2048, True)
        assert "mask_prompt" not in data, "its default: loss only on the teacher's tokens"
        assert config["resume"] == "auto"
