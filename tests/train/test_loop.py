"""The loop: accumulation, compilation, stopping, what is kept, and what it says of bad input."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from runs import assert_same_to_the_bit, losses, quiet_environment, rows, tensors

from phi_lit.errors import UserError

Train = Callable[..., Path]
NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
# Adam makes full steps of gradients that are only rounding (a key's bias has none but that), so
# runs that add in another order are compared with an optimizer that is linear in the gradient.
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}}


def weights(out_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(out_dir / "final" / "lit_model.pth", weights_only=True)["model"]


def assert_close(one: Path, other: Path, tolerance: float = 2e-6) -> None:
    first, second = weights(one), weights(other)
    for name, value in first.items():
        assert torch.allclose(value, second[name], rtol=0, atol=tolerance), name


def test_accumulating_micro_batches_equals_one_batch(tmp_path: Path, train: Train) -> None:
    runs = {
        micro: train(
            tmp_path / str(micro), optimizer=SGD, train={**NO_DROPOUT, "micro_batch_size": micro}
        )
        for micro in (8, 4, 1)
    }
    for micro in (4, 1):
        assert losses(runs[micro]) == pytest.approx(losses(runs[8]), abs=1e-5)
        assert_close(runs[micro], runs[8])


def test_activation_checkpointing_changes_nothing_with_dropout_on(
    tmp_path: Path, train: Train
) -> None:
    plain = train(tmp_path / "none")
    for mode in ("selective", "full"):
        other = train(tmp_path / mode, train={"activation_checkpointing": mode})
        assert losses(other) == losses(plain)
        assert_close(other, plain, tolerance=0)


def test_compiled_and_eager_runs_agree(tmp_path: Path, train: Train) -> None:
    eager = train(tmp_path / "eager", train={**NO_DROPOUT, "max_steps": 6})
    compiled = train(tmp_path / "compiled", train={**NO_DROPOUT, "max_steps": 6, "compile": "on"})
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-4)


@pytest.mark.slow
def test_blocks_with_bf16_weights_compile_on_a_cpu(tmp_path: Path, train: Train) -> None:
    """Without dropout: then both branches of a block have one gradient (`compile_options`)."""
    true = {"precision": "bf16-true", "optimizer": SGD}
    few = {**NO_DROPOUT, "max_steps": 4}
    eager = train(tmp_path / "eager", **true, train=few)
    compiled = train(tmp_path / "compiled", **true, train={**few, "compile": "on"})
    assert tensors(compiled / "latest")["training_state.pth.compiled"] is True
    assert losses(compiled) == pytest.approx(losses(eager), abs=2e-2)  # bf16 has 8 bits


def test_dropout_is_off_in_validation_and_absent_from_the_checkpoint(
    tmp_path: Path, train: Train
) -> None:
    out = train(tmp_path / "run", eval={"interval": 12, "initial_validation": True})
    again = train(
        tmp_path / "again", train=NO_DROPOUT, eval={"interval": 12, "initial_validation": True}
    )
    first = next(row["val_loss"] for row in rows(out) if "val_loss" in row)
    assert first == next(row["val_loss"] for row in rows(again) if "val_loss" in row)
    assert losses(out)[0] != losses(again)[0]
    config = (out / "final" / "model_config.yaml").read_text()
    assert "dropout" not in config
    assert not any("dropout" in name for name in weights(out))


def test_z_loss_adds_its_share(tmp_path: Path, train: Train) -> None:
    plain = train(tmp_path / "plain", train=NO_DROPOUT)
    z = train(tmp_path / "z", train={**NO_DROPOUT, "z_loss": 0.1, "max_steps": 1})
    held_out = [row["val_loss"] for row in rows(z) if "val_loss" in row][-1]
    assert held_out < losses(z)[0] - 1, "the held-out loss is the cross-entropy alone"
    # At the start the logits are near zero: log of the partition is ln 512.
    assert losses(z)[0] - losses(plain)[0] == pytest.approx(0.1 * math.log(512) ** 2, rel=0.02)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_steps": 9, "max_tokens": 8 * 64 * 3}, 3),
        ({"max_steps": 2, "max_tokens": 10**9}, 2),
        ({"max_steps": None, "max_tokens": 8 * 64 * 4 + 17}, 4),
    ],
)
def test_a_run_ends_at_the_nearest_of_its_limits(
    tmp_path: Path, train: Train, limits: dict, steps: int
) -> None:
    assert len(losses(train(tmp_path / "run", train=limits))) == steps


def test_named_best_and_newest_checkpoints_are_kept_and_no_others(
    tmp_path: Path, train: Train
) -> None:
    out = train(
        tmp_path / "run",
        train={"save_interval": 2, "keep_last": 2, "keep_best": True, "name_steps": {4: "base"}},
    )
    names = sorted(path.name for path in out.glob("step-*"))
    manifests = {name: json.loads((out / name / "checkpoint.json").read_text()) for name in names}
    assert (out / "base").resolve().name == "step-00000004"
    assert (out / "latest").resolve().name == "step-00000012"
    best = (out / "best").resolve().name
    assert set(names) == {"step-00000004", "step-00000010", "step-00000012", best}
    assert manifests[best]["val_loss"] == min(m["val_loss"] for m in manifests.values())


def test_a_checkpoint_is_one_of_litgpts(tmp_path: Path, train: Train) -> None:
    from litgpt import LLM

    out = train(tmp_path / "run")
    for name in ("final", "latest"):
        model = LLM.load(str(out / name))
        assert isinstance(model.generate("def ", max_new_tokens=3), str)
        assert type(model.prompt_style).__name__ == "Default"


def test_what_a_run_was_is_written_beside_its_weights_and_starts_it_again(
    tmp_path: Path, train: Train
) -> None:
    import litgpt.pretrain
    from jsonargparse import CLI

    out = train(tmp_path / "run", train={"name_steps": {4: "base"}})
    again = tmp_path / "again"
    written = str(out / "final" / "hyperparameters.yaml")
    CLI(litgpt.pretrain.setup, args=["--config", written, "--out_dir", str(again)])
    assert_same_to_the_bit(out / "latest", again / "latest")


def test_saving_in_the_background_saves_the_same(tmp_path: Path, train: Train) -> None:
    plain = train(tmp_path / "plain")
    background = train(tmp_path / "background", train={"async_save": True})
    for step in ("step-00000004", "step-00000008", "step-00000012"):
        assert_same_to_the_bit(plain / step, background / step)


def test_a_diverging_run_stops_and_names_the_last_good_checkpoint(
    tmp_path: Path, train: Train
) -> None:
    often = {"save_interval": 1, "max_norm": None, "lr_total_steps": 12}
    train(tmp_path / "run", train={**often, "max_steps": 4})
    with pytest.raises(UserError, match=r"diverged; .* Lower the learning rate") as stopped:
        go_on = {"resume": "auto", "train": {**often, "resume_changed": True}}
        wild = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e4}}
        train(tmp_path / "run", optimizer=wild, **go_on)
    named = re.search(r"checkpoint is (\S+);|checkpoint is (\S+)\.", str(stopped.value))
    assert named is not None
    good = tmp_path / "run" / Path(next(filter(None, named.groups()))).name.rstrip(".")
    values = [value for value in tensors(good).values() if isinstance(value, torch.Tensor)]
    assert all(value.isfinite().all() for value in values)
    # the checkpoint of the moment that gave the bad loss is there, and is not the one that is named
    bad = int(re.match(r"step (\d+):", str(stopped.value))[1]) - 1  # type: ignore[index]
    assert (tmp_path / "run" / f"step-{bad:08d}").is_dir()
    assert good.name < f"step-{bad:08d}"


def test_skipped_steps_are_counted_and_leave_the_weights_finite(
    tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e4}}
    out = train(tmp_path / "run", optimizer=wild, train={"on_nonfinite": "skip", "max_norm": None})
    assert "step skipped" in capsys.readouterr().err
    assert tensors(out / "latest")["training_state.pth.skipped"] > 0
    assert all(value.isfinite().all() for value in weights(out).values())


def test_a_loss_scale_is_lowered_saved_and_taken_up(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under 16-mixed on a GPU, by Fabric's own plugin on a CPU, where the loop refuses it."""
    from lightning import Fabric
    from lightning.fabric.plugins import MixedPrecision

    def scaled(**options: Any) -> Fabric:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=4)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        return Fabric(**{**options, "precision": None, "plugins": plugin})

    monkeypatch.setattr("phi_lit.train.launch.Fabric", scaled)
    whole = train(tmp_path / "whole")
    steps = [row for row in rows(whole) if "loss_scale" in row]
    assert steps[0]["loss_scale"] == 2.0**21  # the first gradients overflowed
    assert steps[-1]["skipped"] > 0
    scales = [row["loss_scale"] for row in steps]
    assert any(after > before for before, after in itertools.pairwise(scales))  # and it grew again
    assert all(value.isfinite().all() for value in weights(whole).values())
    half = train(tmp_path / "half", train={"max_steps": 8, "lr_total_steps": 12})
    train(half, resume="auto", train={"lr_total_steps": 12})
    assert [row["loss_scale"] for row in rows(half) if "loss_scale" in row] == scales
    assert_same_to_the_bit(half / "latest", whole / "latest")


def test_links_that_a_kill_prevented_are_made_by_the_next_session(
    tmp_path: Path, train: Train
) -> None:
    """As after a SIGKILL between a save's rename and its links, and in the middle of linking."""
    more = {"name_steps": {8: "base"}, "keep_best": True, "keep_last": 1}
    half = {**more, "max_steps": 8, "lr_total_steps": 12}
    out = train(tmp_path / "run", train=half)
    assert (out / "best").resolve().name == "step-00000008"
    for name in ("latest", "best", "base"):
        (out / name).unlink()
    os.symlink("step-00000004", out / ".latest.partial-1")
    train(out, resume="auto", train={**more, "lr_total_steps": 12})
    assert (out / "base").resolve().name == "step-00000008"
    assert (out / "latest").resolve().name == "step-00000012"
    assert (out / "best").is_dir()
    assert not list(out.glob(".*partial*"))


def test_resume_auto_takes_first_weights_where_nothing_is_saved_yet(
    tmp_path: Path, train: Train
) -> None:
    first = str(train(tmp_path / "first") / "final")
    given = {"initial_checkpoint_dir": first, "resume": "auto"}
    whole = train(tmp_path / "whole", initial_checkpoint_dir=first)
    half = {"max_steps": 8, "lr_total_steps": 12}
    train(tmp_path / "again", **given, train=half)
    again = train(tmp_path / "again", **given, train={"lr_total_steps": 12})
    assert_same_to_the_bit(again / "latest", whole / "latest")
    with pytest.raises(UserError, match="both given"):
        train(tmp_path / "again", initial_checkpoint_dir=first, resume=True)


def test_initial_checkpoint_gives_the_first_weights(tmp_path: Path, train: Train) -> None:
    first = train(tmp_path / "first")
    second = train(
        tmp_path / "second",
        initial_checkpoint_dir=str(first / "final"),
        train={"max_steps": 1},
        eval={"initial_validation": True, "interval": 1000},
    )
    before = [row["val_loss"] for row in rows(first) if "val_loss" in row][-1]
    after = next(row["val_loss"] for row in rows(second) if "val_loss" in row)
    assert after == before


@pytest.mark.parametrize(
    "optimizer", ["torch.optim.Muon", "torch.optim.NAdam", "bitsandbytes.optim.AdamW8bit"]
)
def test_other_optimizers_train_and_resume(tmp_path: Path, train: Train, optimizer: str) -> None:
    package, _, name = optimizer.rpartition(".")
    if not hasattr(pytest.importorskip(package), name):
        pytest.skip(f"this torch has no {optimizer}")
    spec = {"class_path": optimizer, "init_args": {"lr": 0.001}}
    whole = train(tmp_path / "whole", optimizer=spec)
    part = train(tmp_path / "part", optimizer=spec, train={"max_steps": 8, "lr_total_steps": 12})
    train(part, optimizer=spec, train={"lr_total_steps": 12}, resume="auto")
    assert_same_to_the_bit(part / "latest", whole / "latest")


def test_tied_embeddings_stay_tied_and_resume(tmp_path: Path, train: Train) -> None:
    tied = {"tie_embeddings": True, "lr_total_steps": 12}
    whole = train(tmp_path / "whole", train=tied)
    found = weights(whole)
    assert torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])
    part = train(tmp_path / "part", train={**tied, "max_steps": 8})
    train(part, train=tied, resume="auto")
    assert_same_to_the_bit(part / "latest", whole / "latest")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"global_batch_size": 16}}, r"batch.global_batch_size was 8 and is 16"),
        ({"data": {"init_args": {"seed": 7}}}, r"data.seed was 42 and is 7"),
        ({"train": {"max_steps": 20}}, r"schedule.schedule_steps was 12 and is 20"),
        ({"model_name": "phi1-nano"}, r"model.n_layer was 2 and is 6"),
        ({"seed": 1}, r"seed was 42 and is 1"),
        ({"precision": "bf16-true"}, r"precision was '32-true' and is 'bf16-true'"),
    ],
)
def test_a_changed_run_says_what_differs_and_refuses_to_resume(
    tmp_path: Path, train: Train, changes: dict, message: str
) -> None:
    out = train(tmp_path / "run")
    with pytest.raises(UserError, match=message) as refused:
        train(out, **changes, resume="auto")
    assert "\n" not in str(refused.value)


def test_checkpoints_of_another_longer_run_are_not_mixed_with_this_ones(
    tmp_path: Path, train: Train
) -> None:
    out = train(tmp_path / "run")
    with pytest.raises(UserError, match=r"holds checkpoints beyond step 0"):
        train(out)
    with pytest.raises(UserError, match=r"holds checkpoints beyond step 4"):
        train(out, resume=str(out / "step-00000004"))


def test_changed_optimizer_settings_hold_after_a_resume_by_key(
    tmp_path: Path, train: Train
) -> None:
    out = train(tmp_path / "run", train={"max_steps": 8, "lr_total_steps": 12})
    changed = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "weight_decay": 0.7}}
    train(
        out, optimizer=changed, train={"lr_total_steps": 12, "resume_changed": True}, resume="auto"
    )
    group = "training_state.pth.optimizer.param_groups.0.weight_decay"
    assert tensors(out / "latest")[group] == 0.7


def test_a_full_disk_during_a_save_is_one_line_and_leaves_the_last_checkpoint_usable(
    tmp_path: Path, train: Train, recipe: Callable[..., dict[str, Any]]
) -> None:
    whole = train(tmp_path / "whole")
    train(tmp_path / "run", train={"max_steps": 4, "lr_total_steps": 12})
    config = tmp_path / "run.yaml"
    rest = recipe(tmp_path / "run", train={"lr_total_steps": 12}, resume="auto")
    config.write_text(yaml.safe_dump(rest))
    program = (
        "import resource, signal, sys\n"
        "import litgpt.pretrain, phi_lit.train.launch\n"
        "from jsonargparse import CLI\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "CLI(litgpt.pretrain.setup, args=['--config', sys.argv[1]])"
    )
    failed = subprocess.run(
        [sys.executable, "-c", program, str(config)],
        env=quiet_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert "phi_lit: error: cannot write" in failed.stderr.splitlines()[-1]
    assert not list((tmp_path / "run").glob(".step-*"))
    train(tmp_path / "run", train={"lr_total_steps": 12}, resume="auto")
    assert_same_to_the_bit(tmp_path / "run" / "latest", whole / "latest")


def test_a_changed_run_goes_on_by_key(tmp_path: Path, train: Train) -> None:
    out = train(tmp_path / "run")
    train(out, train={"max_steps": 14, "resume_changed": True}, resume="auto")
    assert len(losses(out)) == 14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_name": "phi1-smal"}, r"Did you mean 'phi1-small'"),
        ({"precision": "16-mixed"}, r"16-mixed needs a GPU"),
        ({"train": {"micro_batch_size": 3}}, r"micro_batch_size allowed here: 1, 2, 4, 8"),
        ({"train": {"attention_dropout": 1.0}}, r"attention_dropout is 1.0"),
        ({"train": {"max_seq_length": 65}}, r"max_seq_length is 65; phi1-test takes 1 to 64"),
        ({"train": {"max_steps": None, "max_tokens": 10}}, r"would end before its first step"),
        ({"strategy": "deepspeed", "sharding": "hybrid"}, r"sharding hybrid is fsdp's"),
        ({"train": {"name_steps": {4: "a/b"}}}, r"calls step 4 'a/b'; a name is"),
        ({"model_config": {"n_layer": 2}}, r"both given, and the name would be ignored"),
        ({"cpu_offload": True}, r"cpu_offload needs"),
        ({"optimizer": "AdamX"}, r"has no 'AdamX'.*Did you mean"),
        ({"resume": True}, r"there is no whole checkpoint"),
        ({"resume": "nowhere"}, r"there is no checkpoint nowhere"),
        ({"tokenizer_dir": "nowhere"}, r"nowhere"),
        ({"model_name": "phi-1"}, r"phi-1 means codegen's vocabulary of 50,295 ids"),
    ],
)
def test_bad_input_is_one_clear_line_before_training(
    tmp_path: Path, train: Train, changes: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        train(tmp_path / "run", **changes)
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "run").glob("step-*")) if (tmp_path / "run").exists() else True


def test_a_plan_that_cannot_fit_in_memory_is_refused_before_the_model_is_built(
    tmp_path: Path, train: Train
) -> None:
    huge = {
        "name": "phi1-test", "n_layer": 96, "n_embd": 12_288, "n_head": 96, "block_size": 64,
        "padded_vocab_size": 512, "vocab_size": 512,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"needs about [\d,.]+ GB on each device, and") as refused:
        train(tmp_path / "run", model_config=huge)
    assert "\n" not in str(refused.value)


def test_the_largest_micro_batch_that_fits_is_found_and_kept_on_resume(
    tmp_path: Path, train: Train
) -> None:
    whole = train(tmp_path / "whole", train={"micro_batch_size": "auto"})
    assert tensors(whole / "latest")["training_state.pth.micro_batch_size"] == 8
    half = {"micro_batch_size": "auto", "max_steps": 8, "lr_total_steps": 12}
    part = train(tmp_path / "part", train=half)
    train(part, train={"micro_batch_size": "auto", "lr_total_steps": 12}, resume="auto")
    assert_same_to_the_bit(part / "latest", whole / "latest")


def test_all_faults_are_told_at_once(tmp_path: Path, train: Train) -> None:
    with pytest.raises(UserError) as refused:
        train(tmp_path / "run", precision="16-mixed", train={"micro_batch_size": 3, "z_loss": -1.0})
    assert all(word in str(refused.value) for word in ("16-mixed", "micro_batch_size", "z_loss"))


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path, train: Train) -> None:
    other = train(tmp_path / "other")
    config = {
        "name": "phi1-test", "n_layer": 2, "n_embd": 128, "n_head": 2, "padded_vocab_size": 512,
        "vocab_size": 512, "block_size": 64,
    }  # fmt: skip
    with pytest.raises(UserError, match="does not fit the model"):
        train(tmp_path / "run", model_config=config, initial_checkpoint_dir=str(other / "final"))


def test_a_checkpoint_never_runs_code_when_it_is_read(tmp_path: Path, train: Train) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    out = train(tmp_path / "run")
    evil = out / "step-00000012" / "training_state.pth"
    torch.save({"optimizer": Evil()}, evil)
    manifest = out / "step-00000012" / "checkpoint.json"
    text = json.loads(manifest.read_text())
    text["files"]["training_state.pth"] = evil.stat().st_size
    manifest.write_text(json.dumps(text))
    with pytest.raises(UserError, match="cannot be read"):
        train(out, resume=str(out / "step-00000012"))
    assert not (tmp_path / "ran").exists()
