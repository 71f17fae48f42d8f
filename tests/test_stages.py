"""Stages: checked together, run in order, gone on with after an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from phi_lit import stages as staging
from phi_lit.__main__ import _gathered
from phi_lit.configs import packaged_configs
from phi_lit.errors import UserError
from phi_lit.stages import plan, stages


@pytest.fixture
def two_stages(tiny_checkpoint_dir: Path, tmp_path: Path) -> list[Path]:
    """Two finetunings of a tiny model, the second from what the first leaves."""
    rows = [{"question": f"{n}?", "response": f"{n}!"} for n in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    paths = []
    for number, start in enumerate([tiny_checkpoint_dir, tmp_path / "out-1" / "final"], start=1):
        config: dict[str, Any] = {
            "checkpoint_dir": str(start),
            "out_dir": str(tmp_path / f"out-{number}"),
            "precision": "32-true",
            "devices": 1,
            "resume": "auto",
            "data": {
                "class_path": "Instruct",
                "init_args": {
                    "sources": str(tmp_path / "rows.json"),
                    "data_dir": str(tmp_path / "data"),
                    "prompt_style": "default",
                },
            },
            "train": {
                "global_batch_size": 2, "micro_batch_size": 2, "epochs": 4, "max_seq_length": 32,
                "pack": True, "lr_warmup_steps": 1, "save_interval": 4, "compile": "off",
            },
            "eval": {"interval": 4, "max_iters": 1},
        }  # fmt: skip
        paths.append(tmp_path / f"stage-{number}.yaml")
        paths[-1].write_text(yaml.safe_dump(config))
    return paths


def test_a_stage_is_a_run_of_litgpt_itself(two_stages, tmp_path, capfd):
    stages(two_stages[:1])
    said = capfd.readouterr().out
    assert "stage 1 of 1: litgpt finetune_full" in said
    assert "of the positions useful" in said
    assert (tmp_path / "out-1" / "final" / "lit_model.pth").is_file()


@pytest.mark.slow
def test_stages_follow_each_other_and_a_second_call_has_nothing_to_do(two_stages, tmp_path, capfd):
    stages(two_stages)
    said = capfd.readouterr().out
    assert "stage 2 of 2: litgpt finetune_full" in said
    assert (tmp_path / "out-2" / "final" / "lit_model.pth").is_file()
    written = (tmp_path / "out-1" / "final" / "lit_model.pth").stat().st_mtime_ns
    stages(two_stages[:1])
    assert "nothing to do: this run already ended" in capfd.readouterr().out
    assert (tmp_path / "out-1" / "final" / "lit_model.pth").stat().st_mtime_ns == written


def test_a_failing_stage_ends_it_with_its_exit_code(two_stages, monkeypatch):
    ran = []

    def fail(command: str, path: Path) -> int:
        ran.append(path)
        return 7

    monkeypatch.setattr(staging, "run_one", fail)
    with pytest.raises(SystemExit) as caught:
        stages(two_stages)
    assert caught.value.code == 7
    assert ran == two_stages[:1]


def test_a_stopped_stage_is_not_followed_by_the_next(two_stages, monkeypatch):
    monkeypatch.setattr(staging, "run_one", lambda command, path: 0)  # as after a SIGTERM
    with pytest.raises(UserError, match=r"stage 1 .* was stopped before its end"):
        stages(two_stages)


def test_every_fault_of_every_stage_is_told_before_the_first_starts(two_stages, tmp_path):
    second = yaml.safe_load(two_stages[1].read_text())
    second |= {"checkpoint_dir": str(tmp_path / "nowhere"), "resume": False}
    two_stages[1].write_text(yaml.safe_dump(second))
    third = tmp_path / "third.yaml"
    third.write_text(yaml.safe_dump({**second, "out_dir": "x", "train": {"epoch": 4}}))
    with pytest.raises(UserError) as caught:
        stages([*two_stages, third, tmp_path / "missing.yaml"])
    said = str(caught.value)
    assert "nowhere is not there, nor any stage's" in said
    assert "add `resume: auto`" in said
    assert "epoch" in said
    assert "missing.yaml: " in said
    assert "\n" not in said


def test_orcas_stages_are_a_plan_once_the_first_checkpoint_is_there(tmp_path, monkeypatch):
    configs = [path for path in packaged_configs() if path.name.startswith("orca")]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"llama-13b-pad is not there"):
        plan(configs)
    Path("checkpoints/orca/llama-13b-pad").mkdir(parents=True)
    assert [(command, out_dir) for command, _, out_dir in plan(configs)] == [
        ("finetune_full", Path("out/orca-1")),
        ("finetune_full", Path("out/orca-2")),
    ]


def test_a_list_of_files_needs_no_brackets():
    assert _gathered(stages, ["a.yaml", "b.yaml", "--dry_run", "true"]) == [
        "[a.yaml,b.yaml]", "--dry_run", "true",
    ]  # fmt: skip
    assert _gathered(stages, ["[a,b]"]) == ["[a,b]"]
    assert _gathered(stages, ["--help"]) == ["--help"]
