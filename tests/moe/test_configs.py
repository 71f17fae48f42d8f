"""The YAMLs with experts: their sources exist, and each differs from its dense twin on purpose."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from litgpt.config import Config

from phi_lit.data.sources import open_sources
from phi_lit.train.args import TrainArgs
from phi_lit.train.experts import KEYS, expert_faults

HUB = Path(__file__).parents[2] / "config_hub"
NAMES = sorted(path.stem for path in HUB.glob("*moe*.yaml"))


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((HUB / f"{name}.yaml").read_text())


def test_the_yamls_of_the_recipe_are_there() -> None:
    assert set(NAMES) >= {
        "phi1-nano-moe", "phi1-small-moe", "phi2-moe-gutenberg", "phi2-moe-redpajama",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_its_model_has_experts_that_follow_its_options(name: str) -> None:
    config = load(name)
    options = {key: config["train"][key] for key in KEYS if key in config["train"]}
    assert options, "experts without any balancing collapse"
    assert expert_faults(TrainArgs(**options), Config.from_name(config["model_name"])) == []


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("phi2")])
def test_text_comes_from_the_hub_or_as_the_comment_says_from_a_directory(name: str) -> None:
    (from_hub,) = open_sources(load(name)["data"]["init_args"]["sources"])
    assert from_hub.hub
    (comment,) = re.findall(r"# (sources: \{.*\})$", (HUB / f"{name}.yaml").read_text(), re.M)
    (local,) = open_sources(yaml.safe_load(comment)["sources"])
    assert str(local.path).startswith("data/")
    assert local.strip == from_hub.strip


@pytest.mark.parametrize("name", ["phi1-nano", "phi1-small"])
def test_the_twin_differs_in_experts_only(name: str) -> None:
    dense, moe = load(name), load(f"{name}-moe")
    own = {"balance_loss", "router_z_loss", "attention_dropout", "residual_dropout", "name_steps"}
    differing = {
        key for key in dense["train"].keys() | moe["train"].keys()
        if dense["train"].get(key) != moe["train"].get(key)
    }  # fmt: skip
    assert differing <= own
    assert {key for key in dense if dense[key] != moe[key]} <= {
        "model_name", "out_dir", "train", "precision",
    }  # fmt: skip
