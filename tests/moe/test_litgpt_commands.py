"""Plain `litgpt` on models with experts: every command, from a name and from a checkpoint."""

import shutil

import pytest
import torch
import yaml
from litgpt import GPT, Config
from litgpt.data import DataModule
from litgpt.prompts import save_prompt_style
from litgpt.utils import save_config
from torch.utils.data import DataLoader

NAME = "phi1-test-moe-after"
FINETUNE = (
    "--precision=32-true", "--data=JSON", "--data.prompt_style=phi-2", "--data.num_workers=0",
    "--data.val_split_fraction=0.25", "--train.global_batch_size=1", "--train.micro_batch_size=1",
    "--train.epochs=1", "--train.max_steps=2", "--train.lr_warmup_steps=1",
    "--train.max_seq_length=64", "--eval.max_new_tokens=2", "--eval.max_iters=1", "--devices=1",
)  # fmt: skip
GENERATE = ("--prompt=def f(", "--max_new_tokens=4", "--precision=32-true")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_tokenizer_dir):
    """Both placements' layers are there: experts after the MLP in every second of three layers.

    Three layers, since adapters begin at the third; 512 positions, to have room for the frame that
    `generate_adapter` cuts its answer at.
    """
    directory = tmp_path_factory.mktemp("moe") / "phi-lit" / NAME
    shutil.copytree(tiny_tokenizer_dir, directory)
    moe = dict(placement="after", every=3)
    config = Config.from_name(
        NAME, n_layer=3, block_size=512, n_shared_expert=1, hf_config=dict(name=NAME, moe=moe)
    )
    torch.manual_seed(0)
    model = GPT(config)
    torch.nn.init.normal_(model.transformer.h[2].moe.experts.proj.weight, std=0.1)
    torch.save(model.state_dict(), directory / "lit_model.pth")
    save_config(config, directory)
    save_prompt_style("alpaca", directory)
    return directory


def test_generate_and_chat_open_the_directory(litgpt, checkpoint, capsys, monkeypatch):
    litgpt("generate", checkpoint, *GENERATE)
    assert "def f(" in capsys.readouterr().out
    lines = iter(["def f(", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    litgpt("chat", checkpoint, "--max_new_tokens=4", "--precision=32-true")
    assert ">> Reply: " in capsys.readouterr().out


def test_quantized_generation_has_no_expert_left_in_full_precision(litgpt, checkpoint, capsys):
    pytest.importorskip("bitsandbytes")
    litgpt(
        "generate", checkpoint, "--prompt=def f(", "--max_new_tokens=4", "--quantize=bnb.nf4",
        "--precision=bf16-true",
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert "def f(" in out
    assert "tokens/sec" in err


@pytest.mark.parametrize(
    ("finetune", "generate", "option", "weights"),
    [
        ("finetune_full", "generate_full", "finetuned_path", "lit_model.pth"),
        ("finetune_adapter", "generate_adapter", "adapter_path", "lit_model.pth.adapter"),
        ("finetune_adapter_v2", "generate_adapter_v2", "adapter_path", "lit_model.pth.adapter_v2"),
    ],
)
def test_finetuned_models_generate(
    litgpt, checkpoint, instructions, tmp_path, capsys, finetune, generate, option, weights
):
    out = tmp_path / "out"
    path = f"--data.json_path={instructions}"
    litgpt(finetune, checkpoint, *FINETUNE, path, f"--out_dir={out}")
    saved = yaml.safe_load((out / "final" / "model_config.yaml").read_text())
    assert saved["mlp_class_name"] == "PhiMoE"
    assert saved["hf_config"]["moe"]["every"] == 3
    capsys.readouterr()
    litgpt(generate, checkpoint, f"--{option}={out / 'final' / weights}", *GENERATE)
    assert "tokens/sec" in capsys.readouterr().err


def test_lora_trains_the_experts_merges_and_generates(
    litgpt, checkpoint, instructions, tmp_path, capsys
):
    out = tmp_path / "lora"
    path = f"--data.json_path={instructions}"
    options = ("--lora_mlp=true", f"--out_dir={out}")
    litgpt("finetune", checkpoint, *FINETUNE, path, *options)
    base, merged = (torch.load(d / "lit_model.pth") for d in (checkpoint, out / "final"))
    assert base.keys() == merged.keys()
    for part in ("experts.fc.weight", "experts.proj.weight", "gate.weight"):
        assert not torch.equal(
            base[f"transformer.h.2.moe.{part}"], merged[f"transformer.h.2.moe.{part}"]
        )
    capsys.readouterr()
    litgpt("generate", out / "final", *GENERATE)
    assert "def f(" in capsys.readouterr().out


class Rows(DataModule):
    """Random ids, as a data module of somebody else's."""

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None) -> None:
        self.shape = (batch_size, max_seq_length + 1)

    def train_dataloader(self):
        ids = torch.randint(0, 257, (20, self.shape[1]), generator=torch.Generator().manual_seed(0))
        return DataLoader(ids, batch_size=self.shape[0])

    val_dataloader = train_dataloader


def test_litgpts_own_loop_pretrains_from_a_model_config_in_a_yaml(litgpt, tmp_path, monkeypatch):
    """Nothing of ours is asked but the class of the MLP: its options, its FLOP count, its loop."""
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    model = dict(
        name="phi-mine", block_size=16, n_layer=2, n_embd=32, n_head=2, vocab_size=257,
        padded_vocab_size=320, mlp_class_name="PhiMoE", n_expert=4, n_expert_per_token=2,
        moe_intermediate_size=64, hf_config=dict(moe=dict(placement="instead", every=2)),
    )  # fmt: skip
    config = dict(
        model_name="phi-mine", model_config=model, out_dir=str(tmp_path / "out"),
        logger_name="csv", precision="32-true",
        data=dict(class_path=f"{__name__}.Rows"),
        train=dict(global_batch_size=2, micro_batch_size=2, max_tokens=160, max_seq_length=16,
                   save_interval=1000, log_interval=1, lr_warmup_steps=1),
        eval=dict(interval=1000, max_iters=1, initial_validation=False, final_validation=False),
        devices=1,
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    litgpt("pretrain", "--config", tmp_path / "run.yaml")
    state = torch.load(tmp_path / "out" / "final" / "lit_model.pth", weights_only=False)
    saved = state["model"]  # LitGPT pickles the loader beside it
    experts = saved["transformer.h.1.mlp.experts.fc.weight"]
    assert experts.shape == (4, 64, 32)
    assert experts.std().item() == pytest.approx(0.02, rel=0.1)
    assert not saved["transformer.h.1.mlp.gate.selection_bias"].any()
    assert Config.from_file(tmp_path / "out" / "final" / "model_config.yaml").name == "phi-mine"


def test_a_dense_checkpoint_in_a_model_with_experts_is_one_line(run_python, tiny_checkpoint_dir):
    code = (
        "import torch; from litgpt import GPT, Config; "
        "GPT(Config.from_name('phi1-test-moe')).load_state_dict("
        f"torch.load({str(tiny_checkpoint_dir / 'lit_model.pth')!r}))"
    )
    done = run_python("-c", code, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("phi_lit: error: layer 0 of the checkpoint has an MLP without")
    assert len(done.stderr.splitlines()) == 1


def test_without_phi_lit_one_call_makes_litgpt_know_the_layer(run_python):
    code = """
import sys, torch, litgpt.lora
from litgpt import Config, GPT
from extensions.phi_moe import install
install(); install()
config = dict(name='phi-x', n_layer=2, n_embd=32, n_head=2, padded_vocab_size=64, n_expert=4,
    n_expert_per_token=2, mlp_class_name='PhiMoE', moe_intermediate_size=16)
hf_config = dict(moe=dict(placement='after', every=2))
names = set(GPT(Config(**config, hf_config=hf_config)).state_dict())
assert 'transformer.h.1.moe.experts.fc.weight' in names
assert not any('h.0.moe' in name for name in names)
lora = litgpt.lora.GPT(litgpt.lora.Config(**config, lora_r=2, lora_mlp=True))
assert 'transformer.h.0.mlp.experts.fc.lora_A' in lora.state_dict()
lora(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
assert not any(name.startswith('phi_lit') for name in sys.modules)
"""
    run_python("-c", code, autoload=False)
