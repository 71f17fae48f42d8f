"""LitGPT's commands on a model of ours, through LitGPT's own command line; and `phi-lit` itself."""

import shutil
import sys

import pytest
import torch
import yaml

from phi_lit import __version__
from phi_lit.__main__ import COMMANDS, first_line, main, overview
from phi_lit.seam_table import LITGPT_COMMANDS

FINETUNE = (
    "--precision=32-true", "--data.prompt_style=phi-2", "--data.num_workers=0",
    "--data.val_split_fraction=0.25", "--train.global_batch_size=1", "--train.micro_batch_size=1",
    "--train.epochs=1", "--train.max_steps=2", "--train.lr_warmup_steps=1",
    "--train.max_seq_length=64", "--eval.max_new_tokens=2", "--eval.max_iters=1", "--devices=1",
)  # fmt: skip
GENERATE = ("--prompt=def f(", "--max_new_tokens=8", "--precision=32-true")


@pytest.fixture
def phi_lit(monkeypatch, tmp_path):
    """Run `phi-lit <arguments>` in this process, in an empty directory; return the exit code."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["phi-lit", *map(str, arguments)])
        return main()

    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def alpaca_checkpoint_dir(tiny_tokenizer_dir, tmp_path):
    """A checkpoint with Alpaca's frame: `generate_full` and `generate_adapter*` cut their answer at
    its "### Response:" and fail with any other style, with LitGPT's models as with ours.

    Three layers, since adapters begin at the third; 512 positions, to have room for the frame.
    """
    from litgpt import GPT, Config
    from litgpt.prompts import save_prompt_style
    from litgpt.utils import save_config

    directory = tmp_path / "alpaca" / "phi1-test"
    shutil.copytree(tiny_tokenizer_dir, directory)
    config = Config.from_name("phi1-test", n_layer=3, block_size=512)
    torch.save(GPT(config).state_dict(), directory / "lit_model.pth")
    save_config(config, directory)
    save_prompt_style("alpaca", directory)
    return directory


def test_generate_continues_the_prompt_as_it_is_given(litgpt, tiny_checkpoint_dir, capsys):
    litgpt("generate", tiny_checkpoint_dir, *GENERATE)
    assert "\ndef f(" in capsys.readouterr().out  # not "Answer:", nor any other frame


def test_generate_speculatively_takes_our_model_as_draft_and_target(
    litgpt, tiny_checkpoint_dir, capsys
):
    litgpt(
        "generate_speculatively", tiny_checkpoint_dir, tiny_checkpoint_dir,
        "--speculative_k=2", *GENERATE,
    )  # fmt: skip
    assert "def f(" in capsys.readouterr().out


def test_chat_answers_and_ends(litgpt, tiny_checkpoint_dir, capsys, monkeypatch):
    lines = iter(["def f(", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    litgpt("chat", tiny_checkpoint_dir, "--max_new_tokens=4", "--precision=32-true")
    out = capsys.readouterr().out
    assert "Now chatting with phi1-test" in out
    assert ">> Reply: " in out


def test_llm_loads_and_generates(tiny_checkpoint_dir, tiny_tokenizer_dir):
    from litgpt import LLM

    loaded = LLM.load(str(tiny_checkpoint_dir))
    assert loaded.config.name == "phi1-test"
    assert isinstance(loaded.generate("def f(", max_new_tokens=4), str)
    fresh = LLM.load("phi1-test", init="random", tokenizer_dir=tiny_tokenizer_dir)
    assert type(fresh.prompt_style).__name__ == "Default"
    assert fresh.generate("x", max_new_tokens=3, return_as_token_ids=True).numel() >= 1


def test_lora_finetunes_merges_and_generates(
    litgpt, tiny_checkpoint_dir, instructions, tmp_path, capsys
):
    out = tmp_path / "lora"
    data = ("--data=JSON", f"--data.json_path={instructions}")
    litgpt("finetune", tiny_checkpoint_dir, *data, f"--out_dir={out}", *FINETUNE)
    merged = out / "final" / "lit_model.pth"
    first = torch.load(merged)
    merged.unlink()
    litgpt("merge_lora", out / "final")
    again = torch.load(merged)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    base = torch.load(tiny_checkpoint_dir / "lit_model.pth")
    assert any(not torch.equal(again[key], base[key]) for key in base)
    capsys.readouterr()
    litgpt("generate", out / "final", *GENERATE)
    assert "def f(" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("finetune", "generate", "weights"),
    [
        ("finetune_full", "generate_full", "lit_model.pth"),
        ("finetune_adapter", "generate_adapter", "lit_model.pth.adapter"),
        ("finetune_adapter_v2", "generate_adapter_v2", "lit_model.pth.adapter_v2"),
    ],
)
def test_finetuned_models_generate(
    litgpt, alpaca_checkpoint_dir, instructions, tmp_path, capsys, finetune, generate, weights
):
    out = tmp_path / "out"
    data = ("--data=JSON", f"--data.json_path={instructions}")
    litgpt(finetune, alpaca_checkpoint_dir, *data, f"--out_dir={out}", *FINETUNE)
    assert yaml.safe_load((out / "final" / "model_config.yaml").read_text())["name"] == "phi1-test"
    capsys.readouterr()
    option = "finetuned_path" if generate == "generate_full" else "adapter_path"
    litgpt(generate, alpaca_checkpoint_dir, f"--{option}={out / 'final' / weights}", *GENERATE)
    assert "tokens/sec" in capsys.readouterr().err


def test_convert_from_and_to_litgpt_by_name(litgpt, tiny_checkpoint_dir, tmp_path):
    hub = tmp_path / "phi-lit" / "phi1-test"  # the converter takes the name from the directory
    litgpt("convert_from_litgpt", tiny_checkpoint_dir, hub)
    (hub / "model.pth").rename(hub / "pytorch_model.bin")
    litgpt("convert_to_litgpt", hub)
    before, after = (torch.load(d / "lit_model.pth") for d in (tiny_checkpoint_dir, hub))
    assert all(torch.equal(after[key], before[key]) for key in before)
    litgpt("convert_to_litgpt", hub, "--model_name=phi-lit/phi1-test")


def test_convert_to_litgpt_answers_a_wrong_name_with_near_ones(litgpt, tiny_checkpoint_dir):
    with pytest.raises(ValueError, match="Did you mean 'phi1-test'"):
        litgpt("convert_to_litgpt", tiny_checkpoint_dir, "--model_name=phi1-tst")


def test_convert_pretrained_checkpoint_keeps_the_weights(litgpt, tiny_checkpoint_dir, tmp_path):
    pretrained = tmp_path / "pretrained"
    shutil.copytree(tiny_checkpoint_dir, pretrained)
    weights = torch.load(pretrained / "lit_model.pth")
    torch.save({"model": weights, "step_count": 3}, pretrained / "lit_model.pth")
    litgpt("convert_pretrained_checkpoint", pretrained, tmp_path / "converted")
    converted = torch.load(tmp_path / "converted" / "lit_model.pth")
    assert all(torch.equal(converted[key], weights[key]) for key in weights)


def test_validate_passes_our_checkpoint(litgpt, tiny_checkpoint_dir, capsys):
    litgpt("validate", tiny_checkpoint_dir)
    out, err = capsys.readouterr()
    assert "phi1-test" in out
    assert "✗" not in out + err


def test_download_list_shows_our_hub_ids(litgpt, capsys):
    litgpt("download", "list")
    lines = capsys.readouterr().out.splitlines()
    assert {"microsoft/phi-1", "phi-lit/phi1-small", "phi-lit/phi1-nano"} <= set(lines)


def test_pretrain_list_shows_our_names(litgpt, capsys):
    with pytest.raises(SystemExit) as caught:
        litgpt("pretrain", "list")
    assert not caught.value.code
    lines = capsys.readouterr().out.splitlines()
    assert {"phi-1", "phi1-small", "phi1-nano", "phi1-nano-codegen"} <= set(lines)


def test_serve_builds_its_model(tiny_checkpoint_dir):
    """The server's own code; only the web server around it (litserve) is not LitGPT's."""
    pytest.importorskip("litserve")
    from litgpt.deploy.serve import SimpleLitAPI

    api = SimpleLitAPI(tiny_checkpoint_dir, precision="32-true", max_new_tokens=4, api_path="/p")
    api.setup("cpu")
    assert isinstance(api.predict("def f("), str)


@pytest.mark.parametrize(
    ("module", "autoload", "knows"),
    [("litgpt", True, True), ("litgpt", False, False), ("phi_lit", False, True)],
)
def test_as_a_module_in_a_process_of_its_own(run_python, module, autoload, knows):
    done = run_python("-m", module, "download", "list", autoload=autoload)
    assert ("microsoft/phi-1" in done.stdout.splitlines()) is knows
    assert "microsoft/phi-1_5" in done.stdout.splitlines()


def test_a_yaml_names_our_data_module_by_its_bare_name(litgpt, capsys):
    with pytest.raises(SystemExit) as caught:
        litgpt("pretrain", "phi1-test", "--data=CodeTextbook", "--print_config")
    assert not caught.value.code
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["data"]["class_path"] == "phi_lit.CodeTextbook"


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_overview_names_every_command_with_its_first_line(phi_lit, capsys, words):
    assert phi_lit(*words) == 0
    out = capsys.readouterr().out
    for command, place in COMMANDS.items():
        line = next(line for line in out.splitlines() if line.startswith(f"  {command} "))
        assert line.endswith(first_line(place))
        assert len(first_line(place)) > 10
    assert set(LITGPT_COMMANDS) <= set(out.split())
    assert max(map(len, out.splitlines())) <= 120


def test_overview_is_read_from_source_without_torch(run_python):
    code = (
        "import sys; from phi_lit.__main__ import overview; overview(); "
        "assert not {'torch', 'litgpt', 'numpy'} & set(sys.modules)"
    )
    run_python("-c", code)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_a_config_option(phi_lit, capsys, command):
    with pytest.raises(SystemExit) as caught:
        phi_lit(*command.split(), "--help")
    assert not caught.value.code
    out = capsys.readouterr().out
    assert f"phi-lit {command}" in out
    assert "--config" in out


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["prepar"], "'prepare'"),
        (["pretran"], "'pretrain'"),
        (["tokenizer", "trian"], "'tokenizer train'"),
        (["tokeniser"], "tokenizer"),
        (["xyzzy"], "`phi-lit --help` lists them"),
    ],
)
def test_an_unknown_word_is_answered_with_near_ones_and_exit_code_2(phi_lit, capsys, words, near):
    assert phi_lit(*words) == 2
    err = capsys.readouterr().err
    assert near in err
    assert len(err.splitlines()) == 1


def test_a_group_of_commands_lists_its_members(phi_lit, capsys):
    assert phi_lit("tokenizer", "--help") == 0
    out = capsys.readouterr().out
    assert "phi-lit tokenizer train" in out
    assert "phi-lit tokenizer codegen" in out


def test_version_names_all_three(phi_lit, capsys):
    assert phi_lit("--version") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"phi-lit {__version__}, litgpt 0.5.13, torch ")


def test_configs_are_listed_and_copied_but_never_overwritten(phi_lit, tmp_path, capsys):
    from phi_lit.configs import packaged_configs

    names = {path.name for path in packaged_configs()}
    assert phi_lit("configs") == 0
    out = capsys.readouterr().out
    assert names
    assert all(name in out for name in names)
    kept = tmp_path / "mine" / sorted(names)[0]
    kept.parent.mkdir()
    kept.write_text("mine", encoding="utf-8")
    assert phi_lit("configs", "--copy_to", tmp_path / "mine") == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} == names
    assert kept.read_text(encoding="utf-8") == "mine"


def test_an_unknown_model_is_answered_in_one_line_with_exit_code_1(run_python):
    done = run_python("-m", "phi_lit", "pretrain", "phi1-nan", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("phi_lit: error: 'phi1-nan' is not a supported config name.")
    assert "'phi1-nano'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_overview_fits_a_terminal():
    assert len(overview().splitlines()) <= 24
