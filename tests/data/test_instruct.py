"""Instruct: the Orca row with LLaMA's own tokenizer, and a padding token for any tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from litgpt.prompts import Default
from litgpt.tokenizer import Tokenizer
from tokenizers import Tokenizer as Processor

from phi_lit.data.examples import ExampleSource
from phi_lit.data.instruct import Instruct
from phi_lit.data.padding import PADDING, pad, padding_id, with_padding
from phi_lit.data.sources import open_source
from phi_lit.data.supervised import IGNORE
from phi_lit.data.tokenizer import load_tokenizer
from phi_lit.errors import UserError

ROWS = [
    {
        "id": f"flan.{n}",
        "system_prompt": "You are a helpful assistant." if n % 2 else "",
        "question": f"What is {n} times 1234?",
        "response": f"{n} times 1234 is {n * 1234}.",
    }
    for n in range(30)
]


@pytest.fixture
def flan(tmp_path: Path) -> Path:
    """Rows with OpenOrca's columns."""
    path = tmp_path / "flan.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="session")
def orca_tokenizer_dir(tmp_path_factory, llama_tokenizer_dir: Path) -> Path:
    """LLaMA's tokenizer with [[PAD]]."""
    directory = tmp_path_factory.mktemp("orca") / "tokenizer"
    pad(llama_tokenizer_dir, directory)
    return directory


def connected(tokenizer_dir: Path, tmp_path: Path, **settings: Any) -> Instruct:
    module = Instruct(data_dir=tmp_path / "instructions", **settings)
    module.connect(Tokenizer(tokenizer_dir), 3, 2048)
    module.prepare_data()
    module.setup()
    return module


# ------------------------------------------------------------------------------------- the Orca row


def test_orcas_vocabulary_has_32001_ids_and_splits_digits(orca_tokenizer_dir, llama_tokenizer_dir):
    tokenizer, before = Tokenizer(orca_tokenizer_dir), Tokenizer(llama_tokenizer_dir)
    assert load_tokenizer(orca_tokenizer_dir).vocab_size == 32_001
    assert padding_id(tokenizer) == 32_000
    assert padding_id(before) is None
    for text in ("", " a  b\n\tc", "1234", "Größe [PAD]", "def f(x):\n    return x"):
        assert tokenizer.encode(text).tolist() == before.encode(text).tolist()
    assert [tokenizer.decode(i) for i in tokenizer.encode("1234", bos=False)[1:]] == list("1234")


def test_system_message_and_question_come_first_and_the_answer_is_learned(
    orca_tokenizer_dir, flan, tmp_path
):
    module = connected(orca_tokenizer_dir, tmp_path, sources=str(flan))
    tokenizer = Tokenizer(orca_tokenizer_dir)
    learned = {}
    for item in [*module.train_dataset, *module.test_dataset]:
        hidden = item["labels"] == IGNORE
        assert item["input_ids"][0] == tokenizer.bos_id
        asked = tokenizer.decode(item["input_ids"][hidden])
        answer = item["labels"][~hidden]
        assert answer[-1] == tokenizer.eos_id
        learned[tokenizer.decode(answer)] = asked
    assert len(learned) == len(ROWS)
    for row in ROWS:
        asked = module.prompt_style.apply(row["question"], sys_prompt=row["system_prompt"])
        assert learned[row["response"]] == asked
        assert row["system_prompt"] in asked
    assert module.vocab_size == 32_001


def test_batches_are_padded_with_the_padding_token(orca_tokenizer_dir, flan, tmp_path):
    module = connected(orca_tokenizer_dir, tmp_path, sources=str(flan))
    for batch in module.train_dataloader():
        padded = batch["input_ids"] == 32_000
        assert (batch["labels"][padded] == IGNORE).all()
    assert padded.any()


def test_a_style_without_a_place_for_the_system_message_is_refused(
    orca_tokenizer_dir, flan, tmp_path
):
    with pytest.raises(UserError, match="Default has no place for it; choose another prompt_style"):
        connected(orca_tokenizer_dir, tmp_path, sources=str(flan), prompt_style=Default())
    plain = [{**row, "system_prompt": None} for row in ROWS]
    flan.write_text("".join(json.dumps(row) + "\n" for row in plain))
    connected(orca_tokenizer_dir, tmp_path, sources=str(flan), prompt_style=Default())


def test_the_presets_name_openorcas_columns_and_both_stages():
    files = {}
    for name in ("flan-5m", "flan-1m"):
        source = open_source(name, ExampleSource)
        assert (source.hub, source.prompt, source.answer, source.system) == (
            "Open-Orca/OpenOrca", "question", "response", "system_prompt",
        )  # fmt: skip
        files[name] = source.data_files
    assert files == {
        "flan-5m": "3_5M-GPT3_5-Augmented.parquet",
        "flan-1m": "1M-GPT4-Augmented.parquet",
    }


def test_a_local_copy_of_the_data_set_is_read_by_the_presets_file(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "1M-GPT4-Augmented.parquet")
    source = open_source({"preset": "flan-1m", "hub": str(tmp_path)}, ExampleSource)
    source.check()
    found = list(source.examples())
    assert [example.answer for example in found] == [row["response"] for row in ROWS]
    assert found[1].system == "You are a helpful assistant."


# ----------------------------------------------------------------------------------- padding tokens


def test_padding_can_be_added_to_any_tokenizer_and_twice_is_once(tiny_tokenizer_dir, tmp_path):
    out = tmp_path / "padded"
    pad(tiny_tokenizer_dir, out, token="<pad>")
    assert Processor.from_file(str(out / "tokenizer.json")).token_to_id("<pad>") == 257
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["pad_token"] == "<pad>"
    assert settings["eos_token"] == "<|endoftext|>"
    before = (out / "tokenizer.json").read_bytes()
    pad(out, token="<pad>")
    assert (out / "tokenizer.json").read_bytes() == before
    assert load_tokenizer(out).fingerprint == load_tokenizer(tiny_tokenizer_dir).fingerprint


def test_a_padding_token_that_is_there_with_another_id_is_named(tiny_tokenizer_dir, tmp_path):
    out = tmp_path / "padded"
    pad(tiny_tokenizer_dir, out, token="<pad>")
    with pytest.raises(UserError, match="already pads with '<pad>', id 257"):
        with_padding(out, PADDING)
    with pytest.raises(UserError, match=r"'a' is already id .* as ordinary text"):
        with_padding(tiny_tokenizer_dir, "a")


def test_a_directory_without_tokenizer_json_says_what_is_missing(llama_tokenizer_dir, tmp_path):
    shutil.copy(llama_tokenizer_dir / "tokenizer.model", tmp_path)
    with pytest.raises(UserError, match=r"only a tokenizer\.model, to which no token can be added"):
        with_padding(tmp_path)


def test_the_sentencepiece_model_gives_the_same_examples(llama_tokenizer_dir, flan, tmp_path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "model").mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(llama_tokenizer_dir / name, tmp_path / "model")
    one = connected(tmp_path / "model", tmp_path, sources=str(flan))
    other = connected(llama_tokenizer_dir, tmp_path, sources=str(flan))
    for ours, theirs in zip(one.train_dataset, other.train_dataset, strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])
