"""A tiny model with a long context and a chat template, to talk to."""

import json
import shutil
from pathlib import Path

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def talker_dir(tmp_path_factory, tiny_tokenizer_dir) -> Path:
    """A checkpoint of phi1-test that attends to 2,048 tokens (bytes); random weights."""
    import torch
    from litgpt import GPT, Config
    from litgpt.utils import save_config

    directory = tmp_path_factory.mktemp("talker") / "phi-lit" / "phi1-test"
    shutil.copytree(tiny_tokenizer_dir, directory)
    config = Config.from_name("phi1-test", block_size=2048)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(GPT(config).state_dict(), directory / "lit_model.pth")
    save_config(config, directory)
    return directory


@pytest.fixture(scope="session")
def chatml_dir(tmp_path_factory, talker_dir) -> Path:
    """The same with ChatML's tokens, template and prompt style."""
    from litgpt.prompts import ChatML, save_prompt_style
    from tokenizers import AddedToken, Tokenizer

    directory = tmp_path_factory.mktemp("chatml") / "model"
    shutil.copytree(talker_dir, directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    marks = [AddedToken(text, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_special_tokens(marks)
    tokenizer.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    path.write_text(json.dumps(settings))
    save_prompt_style(ChatML(), directory)
    return directory


@pytest.fixture(scope="session")
def load_talker():
    """Return a function from a checkpoint directory to LitGPT's model and tokenizer, float32."""

    def load(directory: Path):
        import torch
        from litgpt import GPT, Config
        from litgpt.tokenizer import Tokenizer

        model = GPT(Config.from_file(directory / "model_config.yaml")).eval()
        model.load_state_dict(torch.load(directory / "lit_model.pth", mmap=True))
        return model, Tokenizer(directory)

    return load


@pytest.fixture(scope="session")
def speaker_of(load_talker):
    """Return a function from a checkpoint directory to a `Speaker`."""

    def make(directory: Path):
        import torch

        from phi_lit.chat.stream import Speaker

        model, tokenizer = load_talker(directory)
        return Speaker(model, tokenizer, torch.device("cpu"), model.config.block_size)

    return make


@pytest.fixture(scope="session")
def greedy(load_talker):
    """LitGPT's own greedy generation: from a directory, ids and a number to the new ids."""

    def generate(directory: Path, ids, new: int, eos_id=None) -> list[int]:
        import torch
        from litgpt.generate.base import generate as litgpt_generate

        model, _ = load_talker(directory)
        with torch.inference_mode():
            model.set_kv_cache(batch_size=1)
            prompt = torch.tensor(ids)
            out = litgpt_generate(model, prompt, len(ids) + new, temperature=0.0, eos_id=eos_id)
        return out[len(ids) :].tolist()

    return generate
