"""With phi_lit installed LitGPT's own commands do what they did: compared with the hooks off."""

import csv
import json
import re
import sys

import pytest
import torch
import yaml

from phi_lit.seam_table import LITGPT_COMMANDS
from phi_lit.seams import stock

HELP = """
import contextlib, io, json, sys
from litgpt.__main__ import main
texts = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["litgpt", command, "--help"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main()
    texts[command] = out.getvalue()
print(json.dumps(texts))
"""

ROWS = '''
import torch
from litgpt.data import DataModule


class Rows(DataModule):
    """Rows of numbers that count upwards."""

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.batch_size, self.length = batch_size, max_seq_length + 1

    def rows(self, first):
        rows = torch.arange(first, first + 32 * 7, 7)[:, None] + torch.arange(self.length)
        return torch.utils.data.DataLoader(rows % 61, batch_size=self.batch_size)

    def train_dataloader(self):
        return self.rows(0)

    def val_dataloader(self):
        return self.rows(5)
'''

CONFIG = """
model_name: pythia-14m
model_config:
  name: pythia-14m
  block_size: 16
  n_layer: 2
  n_embd: 32
  n_head: 2
  vocab_size: 61
  padding_multiple: 64
out_dir: out
precision: 32-true
data:
  class_path: rows.Rows
train:
  global_batch_size: 4
  micro_batch_size: 2
  max_tokens: 1280
  max_norm: 1.0
  lr_warmup_steps: 4
  save_interval: 10
  log_interval: 1
eval:
  interval: 5
  max_iters: 2
  final_validation: true
optimizer:
  class_path: torch.optim.AdamW
  init_args:
    lr: 0.01
devices: 1
logger_name: csv
seed: 3
"""


@pytest.fixture(scope="module")
def help_texts(run_python):
    """The help of every LitGPT command, with the hooks on and off."""
    texts = [
        json.loads(run_python("-c", HELP, json.dumps(LITGPT_COMMANDS), autoload=on).stdout)
        for on in (True, False)
    ]
    assert all(set(text) == set(LITGPT_COMMANDS) for text in texts)
    return texts


def without_our_data_modules(text: str) -> str:
    """Drop ours from the lists of known data modules, and with them the breaks between lines."""
    return re.sub(r", phi_lit(\.\w+)+", "", " ".join(text.split()))


def options(text: str) -> set[str]:
    return {word.rstrip(",") for word in text.split() if word.startswith("--")}


TRAINING = {"resume", "strategy", "sharding", "cpu_offload"}
ADDED = {"chat": {"multi_turn", "sys_prompt"}, "serve": {"host"}}
"""The options of ours that stand beside LitGPT's in the help of its other commands."""


@pytest.mark.parametrize("command", LITGPT_COMMANDS)
def test_help_is_litgpts_and_ours_only_adds(help_texts, command):
    ours, theirs = (text[command] for text in help_texts)
    assert options(theirs)
    assert options(theirs) <= options(ours)
    added = {name.lstrip("-") for name in options(ours) - options(theirs)}
    if command == "pretrain" or command.startswith("finetune"):
        assert added
        assert all(name.startswith("train.") or name in TRAINING for name in added)
        return
    assert added == ADDED.get(command, set())
    if command not in ADDED and not command.startswith("generate"):  # these check `quantize`
        assert without_our_data_modules(ours) == " ".join(theirs.split())


@pytest.fixture(scope="module")
def runs(run_python, tmp_path_factory):
    """Run the same LitGPT-only config in two directories, with the hooks on and off."""
    directories = []
    for autoload in (True, False):
        directory = tmp_path_factory.mktemp("autoload" if autoload else "stock")
        (directory / "rows.py").write_text(ROWS, encoding="utf-8")
        (directory / "config.yaml").write_text(CONFIG, encoding="utf-8")
        done = run_python(
            "-m", "litgpt", "pretrain", "--config", "config.yaml",
            cwd=directory, autoload=autoload, OMP_NUM_THREADS="1",
        )  # fmt: skip
        (directory / "stdout").write_text(done.stdout, encoding="utf-8")
        directories.append(directory)
    return directories


def test_losses_of_a_litgpt_only_config_are_the_same(runs):
    def losses(directory):
        (path,) = directory.glob("out/logs/**/metrics.csv")
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [(row["step"], row["loss"], row["val_loss"], row["learning_rate"]) for row in rows]

    ours, theirs = map(losses, runs)
    assert len(theirs) >= 20
    assert ours == theirs


@pytest.mark.parametrize("name", ["model_config.yaml", "hyperparameters.yaml"])
@pytest.mark.parametrize("step", ["final", "step-00000010"])
def test_files_of_a_litgpt_only_checkpoint_are_the_same(runs, step, name):
    ours, theirs = (directory / "out" / step / name for directory in runs)
    assert ours.read_bytes() == theirs.read_bytes()
    assert {path.name for path in ours.parent.iterdir()} == {
        path.name for path in theirs.parent.iterdir()
    }


def test_weights_of_a_litgpt_only_run_are_the_same(runs):
    ours, theirs = (
        torch.load(directory / "out" / "final" / "lit_model.pth", weights_only=False)["model"]
        for directory in runs
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_litgpt_only_run_prints_the_same_options(runs):
    """What LitGPT prints first are its options; times and rates come after."""
    ours, theirs = (
        (directory / "stdout").read_text(encoding="utf-8").partition("Time to instantiate")[0]
        for directory in runs
    )
    assert "'train': {" in theirs
    assert ours == theirs


def test_saved_options_of_a_litgpt_run_leave_ours_out_even_if_typed(tmp_path, monkeypatch):
    import litgpt.pretrain

    typed = ["pythia-14m", "--train.max_tokens=100", "--optimizer.lr=0.5", "--seed=9"]
    monkeypatch.setattr(sys, "argv", ["litgpt", "pretrain", *typed])
    stock("litgpt.pretrain.save_hyperparameters")(stock("litgpt.pretrain.setup"), tmp_path)
    theirs = (tmp_path / "hyperparameters.yaml").read_bytes()
    ours_too = [*typed, "--train.lr_schedule=null", "--cpu_offload=false", "--strategy=null"]
    monkeypatch.setattr(sys, "argv", ["litgpt", "pretrain", *ours_too])
    litgpt.pretrain.save_hyperparameters(litgpt.pretrain.setup, tmp_path)
    assert (tmp_path / "hyperparameters.yaml").read_bytes() == theirs
    assert yaml.safe_load(theirs)["train"]["max_tokens"] == 100
