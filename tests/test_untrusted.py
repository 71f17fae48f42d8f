"""No command runs code from a checkpoint: a file that would, unpickled, is refused by each."""

import json
import shutil
import sys

import pytest
import torch
import yaml
from checkpoints import Bomb, cut_short, plant

from phi_lit.errors import UserError
from phi_lit.seams import stock


@pytest.fixture
def litgpt(monkeypatch, one_thread, tmp_path):
    """Run `litgpt` or `phi-lit` with arguments in this process, in an empty directory."""
    from phi_lit.__main__ import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["phi-lit", *map(str, arguments)])
        main()

    monkeypatch.chdir(tmp_path)
    precision = torch.get_float32_matmul_precision()
    yield run
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def checkpoint(tiny_checkpoint_dir, tmp_path):
    """A checkpoint with everything that some command asks for, to be booby-trapped."""
    directory = tmp_path / "phi1-test"
    shutil.copytree(tiny_checkpoint_dir, directory)
    for kind in ("lora", "adapter", "adapter_v2"):
        torch.save({"x": torch.zeros(1)}, directory / f"lit_model.pth.{kind}")
    recorded = {"checkpoint_dir": str(tiny_checkpoint_dir), "lora_r": 2, "precision": None}
    (directory / "hyperparameters.yaml").write_text(yaml.safe_dump(recorded))
    return directory


@pytest.fixture(scope="module")
def instructions(tmp_path_factory):
    path = tmp_path_factory.mktemp("instructions") / "data.json"
    rows = [{"instruction": f"f{i}", "input": "", "output": f"return {i}"} for i in range(8)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


DATA = ("--data=JSON", "--data.json_path={data}", "--data.val_split_fraction=0.25", "--devices=1")
COMMANDS = {
    "generate": ("{dir}", "--prompt=x"),
    "generate_full": ("{dir}", "--finetuned_path={dir}/lit_model.pth"),
    "generate_adapter": ("{dir}", "--adapter_path={dir}/lit_model.pth.adapter"),
    "generate_adapter_v2": ("{dir}", "--adapter_path={dir}/lit_model.pth.adapter_v2"),
    "generate_speculatively": ("{dir}", "{dir}"),
    "chat": ("{dir}",),
    "serve": ("{dir}", "--accelerator=cpu"),
    "finetune_lora": ("{dir}", *DATA),
    "finetune_full": ("{dir}", *DATA),
    "finetune_adapter": ("{dir}", *DATA),
    "finetune_adapter_v2": ("{dir}", *DATA),
    "merge_lora": ("{dir}",),
    "convert_from_litgpt": ("{dir}", "{tmp}/converted"),
    "convert_pretrained_checkpoint": ("{dir}", "{tmp}/converted"),
    "evaluate": ("{dir}", "--tasks=arc_easy"),
    "export": ("{dir}", "--out_dir={tmp}/hub"),
}
ONE_LINE = set(COMMANDS) - {"convert_pretrained_checkpoint", "serve"}
"""Commands that say it in one line of ours: convert_pretrained_checkpoint reads with torch's own
restraint and lets torch explain, and the server's model is loaded by its worker process."""


def call(litgpt, command, checkpoint, data):
    places = {"dir": checkpoint, "tmp": checkpoint.parent, "data": data}
    if command == "serve":  # what a worker of the server calls: `setup` of LitGPT's own class
        from litgpt.deploy.serve import SimpleLitAPI

        pytest.importorskip("litserve")
        SimpleLitAPI(checkpoint, generate_strategy="sequential", api_path="/predict").setup("cpu")
        return
    litgpt(command, *(argument.format(**places) for argument in COMMANDS[command]))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_with_code_in_it_is_refused(command, litgpt, checkpoint, instructions):
    trace = checkpoint.parent / "ran"
    file = "lit_model.pth.lora" if command == "merge_lora" else "lit_model.pth"
    if command == "merge_lora":
        (checkpoint / "lit_model.pth").unlink()
    else:
        wrapped = {"model": torch.load(checkpoint / file)}  # as pretraining saves it
        torch.save(wrapped, checkpoint / file)
    plant(checkpoint / file, trace)
    expected = UserError if command in ONE_LINE else Exception
    with pytest.raises(expected, match=r"[Tt]ouch|pathlib|weights_only|WeightsUnpickler") as caught:
        call(litgpt, command, checkpoint, instructions)
    assert not trace.exists()
    if command in ONE_LINE:
        assert "code from a file is never run" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("command", sorted(ONE_LINE))
def test_a_checkpoint_cut_short_is_told_in_one_line(command, litgpt, checkpoint, instructions):
    if command == "merge_lora":
        (checkpoint / "lit_model.pth").unlink()
        cut_short(checkpoint / "lit_model.pth.lora")
    else:
        cut_short(checkpoint / "lit_model.pth")
    with pytest.raises(UserError, match=r"lit_model\.pth(\.lora)? cannot be read: it is cut short"):
        call(litgpt, command, checkpoint, instructions)


@pytest.mark.parametrize("kind", ["adapter", "adapter_v2"])
def test_an_adapter_with_code_in_it_is_refused(kind, litgpt, checkpoint):
    trace = checkpoint.parent / "ran"
    plant(checkpoint / f"lit_model.pth.{kind}", trace)
    path = checkpoint / f"lit_model.pth.{kind}"
    with pytest.raises(UserError, match="code from a file is never run"):
        litgpt(
            f"generate_{kind}", checkpoint, "--prompt=x", "--max_new_tokens=2",
            f"--adapter_path={path}",
        )  # fmt: skip
    assert not trace.exists()


def test_downloaded_bin_files_with_code_in_them_are_refused(litgpt, checkpoint):
    """What `litgpt download` converts: a stranger's pytorch_model.bin."""
    trace = checkpoint.parent / "ran"
    torch.save({"bomb": Bomb(trace)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(UserError, match="code from a file is never run"):
        litgpt("convert_to_litgpt", checkpoint)
    assert not trace.exists()


def test_a_sharded_resume_from_a_file_with_code_in_it_is_refused(tmp_path):
    import litgpt.utils  # noqa: F401 (puts the seam in)
    from lightning.fabric.strategies import FSDPStrategy

    torch.save({"bomb": Bomb(tmp_path / "ran")}, tmp_path / "lit_model.pth")
    with pytest.raises(UserError, match="code from a file is never run"):
        FSDPStrategy().load_checkpoint(tmp_path / "lit_model.pth", {"model": None})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("place", ["os.abort", "subprocess.Popen", "litgpt.prompts.Path"])
def test_a_prompt_style_that_is_none_is_not_called(place, litgpt, checkpoint):
    (checkpoint / "prompt_style.yaml").write_text(f"class_path: {place}\n")
    with pytest.raises(
        UserError, match=r"is no prompt style, and nothing else is ever called|not installed"
    ):
        litgpt("generate", checkpoint, "--prompt=x")


def test_without_the_seam_the_code_does_run(checkpoint, tmp_path):
    """The reason for all of the above: the day that this fails, the seams can go."""
    trace = tmp_path / "ran"
    plant(checkpoint / "lit_model.pth", trace)
    stock("litgpt.utils.lazy_load")(checkpoint / "lit_model.pth")
    assert trace.exists()
