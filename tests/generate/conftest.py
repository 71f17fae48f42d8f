"""The small model and the tokenizer that these tests sample with."""

import pytest
from litgpt import GPT, Config
from litgpt.tokenizer import Tokenizer
from small_models import random_gpt


@pytest.fixture
def tokenizer(tiny_tokenizer_dir) -> Tokenizer:
    return Tokenizer(tiny_tokenizer_dir)


@pytest.fixture
def gpt(one_thread) -> GPT:
    return random_gpt(Config.from_name("phi1-test", block_size=128, padded_vocab_size=257))
