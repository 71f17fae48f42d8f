"""`litgpt finetune_full` through the same loop: the paper's flat array, and masked examples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import litgpt.finetune.full
import pytest
import torch
import yaml
from jsonargparse import CLI
from runs import RECIPE, assert_same_to_the_bit, losses, merged, rows


@pytest.fixture
def finetune(corpus: Path, train: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Runs `litgpt finetune_full` on a small pretrained model; returns the output directory."""
    base = train(tmp_path / "base")

    def run(out_dir: Path, **changes: Any) -> Path:
        arguments = {key: value for key, value in RECIPE.items() if key != "model_name"}
        arguments = merged(
            arguments,
            {"checkpoint_dir": str(base / "final"), "out_dir": str(out_dir), "devices": 1},
        )
        arguments["data"]["init_args"] |= {
            "sources": [str(corpus / "text")],
            "data_dir": str(corpus / "tokens"),
        }
        config = out_dir.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(merged(arguments, changes)))
        CLI(litgpt.finetune.full.setup, args=["--config", str(config)])
        return out_dir

    return run


def test_papers_finetuning_goes_on_from_the_base_model(
    tmp_path: Path, finetune: Callable[..., Path]
) -> None:
    out = finetune(tmp_path / "tuned", train={"keep_best": True}, eval={"initial_validation": True})
    before = [row["val_loss"] for row in rows(tmp_path / "base") if "val_loss" in row][-1]
    held_out = [row["val_loss"] for row in rows(out) if "val_loss" in row]
    assert held_out[0] == before
    assert held_out[-1] < before
    best = json.loads((out / "best" / "checkpoint.json").read_text())
    assert best["val_loss"] == min(held_out[1:])


def test_masked_examples_train_on_their_answers_only_and_resume(
    tmp_path: Path, finetune: Callable[..., Path]
) -> None:
    examples = [
        {
            "instruction": f"add {n} and {n + 1}",
            "input": "",
            "output": f"{2 * n + 1}" + "!" * (n % 5),
        }
        for n in range(24)
    ]
    path = tmp_path / "examples.json"
    path.write_text(json.dumps(examples))
    data = {
        "class_path": "litgpt.data.JSON",
        "init_args": {
            "json_path": str(path),
            "val_split_fraction": 0.2,
            "mask_prompt": True,
            "prompt_style": {"class_path": "litgpt.prompts.Default"},
        },
    }
    changes: dict[str, Any] = {"data": data, "train": {"micro_batch_size": 2, "max_steps": 8}}
    whole = finetune(tmp_path / "whole", **changes)
    assert len(losses(whole)) == 8
    assert losses(whole)[-1] < losses(whole)[0]
    half = merged(changes, {"train": {"max_steps": 4, "lr_total_steps": 8}})
    part = finetune(tmp_path / "part", **half)
    finetune(part, **merged(changes, {"train": {"lr_total_steps": 8}}), resume="auto")
    assert_same_to_the_bit(part / "latest", whole / "latest")


def test_uneven_masks_weigh_by_token_not_by_micro_batch(
    tmp_path: Path, finetune: Callable[..., Path]
) -> None:
    """Micro-batches of 8, 2 and 1 give the same loss although their target counts differ."""
    examples = [
        {"instruction": "x", "input": "", "output": "word " * (1 + n % 7)} for n in range(30)
    ]
    path = tmp_path / "examples.json"
    path.write_text(json.dumps(examples))
    data = {
        "class_path": "litgpt.data.JSON",
        "init_args": {
            "json_path": str(path), "val_split_fraction": 0.2, "mask_prompt": True,
            "prompt_style": {"class_path": "litgpt.prompts.Default"},
        },
    }  # fmt: skip
    found = {
        micro: finetune(
            tmp_path / f"m{micro}",
            data=data,
            optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            train={
                "micro_batch_size": micro, "max_steps": 3,
                "attention_dropout": 0.0, "residual_dropout": 0.0,
            },
        )
        for micro in (8, 2, 1)
    }  # fmt: skip
    assert losses(found[2]) == pytest.approx(losses(found[8]), abs=1e-5)
    assert losses(found[1]) == pytest.approx(losses(found[8]), abs=1e-5)


def test_nothing_of_ours_asked_runs_litgpts_own_finetuning(
    tmp_path: Path, tiny_checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "examples.json"
    path.write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 12))
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["litgpt", "finetune_full", str(tiny_checkpoint_dir)])
    from litgpt.args import EvalArgs
    from litgpt.data import JSON

    from phi_lit.train.args import TrainArgs

    litgpt.finetune.full.setup(
        tiny_checkpoint_dir,
        out_dir=out,
        precision="32-true",
        data=JSON(json_path=path, val_split_fraction=0.2, num_workers=0),
        train=TrainArgs(
            global_batch_size=2, micro_batch_size=1, epochs=2, max_steps=2, lr_warmup_steps=1,
            max_seq_length=32, save_interval=1,
        ),
        eval=EvalArgs(interval=100, max_iters=1, max_new_tokens=2, final_validation=False),
    )  # fmt: skip
    state = torch.load(out / "step-000002" / "lit_model.pth", weights_only=False)
    assert "scheduler" in state, "LitGPT's own loop saves its scheduler; ours has none"
    assert not (out / "metrics.jsonl").exists()
