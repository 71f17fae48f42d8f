"""CodeExercises: functions out of files, in the flat array, and one by one with masked prompts."""

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from litgpt.data import SFTDataset
from litgpt.tokenizer import Tokenizer

from phi_lit.data.documented import exercises_in
from phi_lit.data.example_store import Encoder, open_examples, prepare_examples
from phi_lit.data.examples import ExampleSource
from phi_lit.data.exercises import CodeExercises
from phi_lit.data.packing import Packing
from phi_lit.data.sources import open_source
from phi_lit.data.supervised import IGNORE, ExampleDataset, held_out
from phi_lit.errors import UserError

QUESTIONS = [{"problem": f"What is {n} + 1?", "solution": f" {n + 1}"} for n in range(40)]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(QUESTIONS))
    return path


def connected(tokenizer_dir: Path, tmp_path: Path, max_seq_length: int = 64, **settings: Any):
    """A module, prepared as LitGPT's finetuning commands do it."""
    module = CodeExercises(**{"mode": "sft", "data_dir": tmp_path / "examples", **settings})
    module.connect(Tokenizer(tokenizer_dir), 4, max_seq_length)
    module.prepare_data()
    module.setup()
    return module


# --------------------------------------------------------------------------- functions out of files


def test_a_function_is_cut_after_its_docstring():
    text = textwrap.dedent('''
        class Stack:
            @property
            def top(self):
                """Return the last item.

                >>> Stack([1]).top
                1
                """
                # It is never empty.
                return self.items[-1]

            def nothing(self):
                """Only a docstring."""

            def one_line(self): "Too short."; return 1

            def undocumented(self):
                return 0

        async def wait(seconds):
            "Wait."
            await sleep(seconds)
    ''')
    first, second = exercises_in(text, "stack.py")
    assert first.problem == textwrap.dedent('''\
        @property
        def top(self):
            """Return the last item.

            >>> Stack([1]).top
            1
            """
    ''')
    assert first.solution == "    # It is never empty.\n    return self.items[-1]\n"
    assert (first.id, first.name, first.has_doctest) == ("stack.py:4", "top", True)
    assert second.problem == 'async def wait(seconds):\n    "Wait."\n'
    assert (second.solution, second.has_doctest) == ("    await sleep(seconds)\n", False)


def test_the_standard_library_gives_thousands_all_of_them_python(library_exercises):
    assert len(library_exercises) > 5500
    assert sum(one.has_doctest for one in library_exercises) > 200
    for one in library_exercises:
        compile(one.problem + one.solution, one.id, "exec", flags=0x400)  # parse only
        assert one.problem.endswith("\n")
    assert len({(one.problem, one.solution) for one in library_exercises}) == len(library_exercises)


def test_real_functions_fill_their_rows_when_packed(library_exercises):
    # Characters for tokens: what matters is the shape of the distribution.
    lengths = np.array([len(one.problem + one.solution) // 4 + 1 for one in library_exercises])
    lengths = lengths[lengths <= 2048]
    assert Packing(lengths, 2048, seed=0).useful >= 0.998


# --------------------------------------------------------------------------------------- flat array


def test_paper_mode_is_problems_and_solutions_in_one_flat_array(tiny_tokenizer_dir, tmp_path):
    path = tmp_path / "exercises.jsonl"
    rows = [
        {"problem": f'def f{n}():\n    """Return {n}."""\n', "solution": f"    return {n}\n"}
        for n in range(50)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = CodeExercises(sources=str(path), data_dir=tmp_path / "tokens", val_fraction=0.1)
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    for rows_at_a_time in (1, 4):  # as our loop does it: first to plan, then to train
        module.connect(tokenizer, rows_at_a_time, 64, tokenizer_dir=tiny_tokenizer_dir)
        module.prepare_data()
        module.setup()
    batch = next(iter(module.train_dataloader()))
    assert batch.shape == (4, 65)
    whole = "".join(row["problem"] + row["solution"] for row in rows)
    texts = ["".join("\0" if i == 256 else tokenizer.decode(i) for i in row) for row in batch]
    assert sum(text.count("\0") for text in texts) >= 4
    assert all(piece in whole for text in texts for piece in text.split("\0"))
    assert module.vocab_size == 257
    assert module.eot_id == 256
    assert module.identity()["row_length"] == 64
    assert module.unigram_entropy() > 1


def test_paper_mode_in_a_command_that_takes_examples_says_what_to_set(tiny_tokenizer_dir, tmp_path):
    module = CodeExercises(data_dir=tmp_path)
    with pytest.raises(UserError, match=r"data\.init_args\.mode: sft"):
        module.connect(Tokenizer(tiny_tokenizer_dir), 1, 64)  # as `litgpt finetune` does it


# ----------------------------------------------------------------------------- examples, one by one


@pytest.mark.parametrize("name", ["tiny", "codegen", "llama"])
def test_examples_are_litgpts_own_to_the_id(name, questions, tmp_path, request):
    """The same ids and labels as LitGPT's SFTDataset makes of the same rows."""
    directory = request.getfixturevalue(
        {"tiny": "tiny_tokenizer_dir", "llama": "llama_tokenizer_dir"}.get(name, f"{name}_dir")
    )
    tokenizer = Tokenizer(directory)
    module = connected(directory, tmp_path, sources=str(questions), prompt_style="alpaca",
                       max_seq_length=512)  # fmt: skip
    theirs = SFTDataset(
        [{"instruction": row["problem"], "output": row["solution"]} for row in QUESTIONS],
        tokenizer, module.prompt_style, mask_prompt=True,
    )  # fmt: skip
    expected = {tuple(item["input_ids"].tolist()): item["labels"] for item in theirs}
    ours = [*module.train_dataset, *module.test_dataset]
    assert len(ours) == len(expected) == 40
    for item in ours:
        assert torch.equal(item["labels"], expected[tuple(item["input_ids"].tolist())])
        assert item["input_ids"].dtype == torch.int64


def test_only_the_solution_and_its_end_are_learned(tiny_tokenizer_dir, questions, tmp_path):
    module = connected(tiny_tokenizer_dir, tmp_path, sources=str(questions))
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    learned = set()
    for item in [*module.train_dataset, *module.test_dataset]:
        labels = item["labels"][item["labels"] != IGNORE]
        assert labels[-1] == tokenizer.eos_id
        learned.add(tokenizer.decode(labels[:-1]))
    assert learned == {row["solution"] for row in QUESTIONS}
    unmasked = connected(tiny_tokenizer_dir, tmp_path, sources=str(questions), mask_prompt=False)
    assert all((item["labels"] != IGNORE).all() for item in unmasked.train_dataset)


def test_an_answer_that_spells_the_end_of_text_does_not_end(tiny_tokenizer_dir, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(
        json.dumps([{"prompt": f"q{n}", "response": "a<|endoftext|>b"} for n in (1, 2)])
    )
    module = connected(tiny_tokenizer_dir, tmp_path, sources=str(path))
    item = module.train_dataset[0]
    assert (item["input_ids"] == 256).sum() == 1
    assert item["input_ids"][-1] == 256


def test_batches_are_padded_as_litgpt_pads(tiny_tokenizer_dir, questions, tmp_path):
    module = connected(tiny_tokenizer_dir, tmp_path, sources=str(questions))
    batch = next(iter(module.train_dataloader()))
    assert batch["input_ids"].shape == batch["labels"].shape
    assert batch["token_counts"]["raw_plus_prompt_template"].shape == (4, 1)
    assert (batch["labels"][batch["input_ids"] == 0] == IGNORE).all()


def test_equal_texts_are_held_out_together_and_both_sides_have_one():
    hashes = np.repeat(np.random.default_rng(0).integers(0, 2**63, 100).astype(np.uint64), 2)
    held = held_out(hashes, 0.2, seed=1)
    assert (held[::2] == held[1::2]).all()
    assert 10 < held.sum() < 80
    assert (held_out(hashes, 0.2, seed=2) != held).any()
    assert 0 < held_out(hashes[:4], 1e-9, seed=0).sum() < 4
    assert 0 < held_out(hashes[:4], 1 - 1e-9, seed=0).sum() < 4


class TenIds:
    """A store of three examples, whose ids are 0, 1, 2, ...; questions of 3, 2 and 6 ids."""

    lengths = np.array([[3, 7], [2, 3], [6, 2]])
    starts = np.array([0, 10, 15, 23])

    def read(self, start: int, length: int) -> np.ndarray:
        return np.arange(start, start + length)


@pytest.mark.parametrize(
    ("too_long", "expected", "counts"),
    [
        ("drop", [([10, 11, 12, 13, 14], [12, 13, 14])], (2, 0)),
        (
            "truncate",
            [([0, 1, 2, 3, 4, 5], [3, 4, 5]), ([10, 11, 12, 13, 14], [12, 13, 14])],
            (2, 1),
        ),
        (
            "split",
            [
                ([0, 1, 2, 3, 4, 5], [3, 4, 5]),
                ([5, 6, 7, 8, 9], [6, 7, 8, 9]),
                ([10, 11, 12, 13, 14], [12, 13, 14]),
                ([20, 21, 22], [21, 22]),
            ],
            (2, 1),
        ),
    ],
)
def test_what_becomes_of_examples_longer_than_a_row(too_long, expected, counts):
    """Literal rows of at most 6 ids; "split" learns every id of the answers exactly once."""
    view = ExampleDataset(
        TenIds(), np.arange(3), max_length=6, too_long=too_long, mask_prompt=True  # type: ignore[arg-type]
    )  # fmt: skip
    found = [
        (item["input_ids"].tolist(), item["labels"][item["labels"] != IGNORE].tolist())
        for item in (view[number] for number in range(len(view)))
    ]
    assert found == expected
    assert (view.counts["longer than a row"], view.counts["left without a target"]) == counts
    assert view.n_targets == sum(len(labels) for _, labels in expected)


def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(
    tiny_tokenizer_dir, questions, tmp_path, monkeypatch
):
    from phi_lit.data import example_store

    def make(where: Path):
        source = open_source(str(questions), ExampleSource)
        encoder = Encoder(Tokenizer(tiny_tokenizer_dir), CodeExercises().prompt_style)
        return prepare_examples(where, [source], encoder, part_tokens=200, say=lambda text: None)

    monkeypatch.setattr(example_store, "BATCH", 4)
    whole = make(tmp_path / "whole")
    assert len(whole.manifest["parts"]) > 3

    class Killed(BaseException):
        pass

    write, written = example_store._Making._write, []

    def write_two(self: Any, name: str, *rest: Any) -> None:
        if len(written) == 2:
            raise Killed
        written.append(name)
        write(self, name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(example_store._Making, "_write", write_two)
        with pytest.raises(Killed):
            make(tmp_path / "part")
    resumed = make(tmp_path / "part")
    assert resumed.manifest == whole.manifest
    for name in whole.manifest["parts"]:
        for file in sorted((whole.path / name).iterdir()):
            assert file.read_bytes() == (resumed.path / name / file.name).read_bytes()
    assert resumed.read(0, 12).tolist() == whole.read(0, 12).tolist()
    assert len(open_examples(resumed.path)) == 40


# ---------------------------------------------------------------------------------------- bad input


def source_of(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> ExampleSource:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    return open_source({"path": str(path), **settings}, ExampleSource)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [{"task": "a", "code": "b"}],
            {},
            "it has the columns code, task, of which none are known",
        ),
        (
            [{"problem": "a", "solution": "b"}],
            {"prompt": "problem", "answer": "solutions"},
            r"no column solutions; it has problem, solution\. Did you mean 'solution'",
        ),
        (
            [{"problem": "a", "solution": None}],
            {},
            "solution is empty in all of the first 1 rows",
        ),
        ([{"problem": "a", "solution": " \n"}], {}, "solution is empty in all"),
        ([{"problem": "a", "solution": ["b"]}], {}, "solution holds list, not text"),
        ([{"problem": "a", "solution": "b"}], {"prompt": "problem"}, "name both"),
        ([{"text": "a"}], {"columns": "text"}, "examples have no `columns`"),
    ],
)
def test_rows_that_hold_no_examples_are_refused_in_one_line(tmp_path, rows, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        source_of(tmp_path, rows, **settings).check()
    assert "\n" not in str(caught.value)


def test_single_rows_without_an_answer_are_counted_not_learned(tmp_path):
    rows = [
        {"problem": "1", "solution": "a"},
        {"problem": "2", "solution": None},
        {"problem": "3", "solution": "  "},
        {"problem": None, "solution": "d"},
        {"problem": "5", "solution": "e"},
    ]
    source = source_of(tmp_path, rows)
    assert [example.prompt for example in source.examples()] == ["1", "5"]
    assert source.skipped.counts == {
        "without answer": 1, "with an empty answer": 1, "without question": 1,
    }  # fmt: skip


def test_templates_context_and_presets_name_the_parts(tmp_path):
    rows = [
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Ho"},
    ]
    assert [e.prompt for e in source_of(tmp_path, rows).examples()] == ["Add\n\n1, 2", "Hi"]
    named = source_of(tmp_path, rows, prompt="# {instruction}: {input}\n", answer="output")
    assert [e.prompt for e in named.examples()] == ["# Add: 1, 2\n", "# Hi: \n"]
    preset = open_source("code-exercises", ExampleSource)
    assert (preset.hub, preset.prompt, preset.answer) == (
        "jinaai/code_exercises", "problem", "solution",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"presets that have them: .*tiny-codes"):
        open_source("textbooks", ExampleSource)


def test_a_data_set_laid_out_like_the_hubs_is_read(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "set").mkdir()
    table = pa.table({"problem": ["a", "b"], "solution": [" 1", " 2"], "more": [1, 2]})
    pq.write_table(table, tmp_path / "set" / "train-00000-of-00001.parquet")
    source = open_source({"hub": str(tmp_path / "set")}, ExampleSource)
    source.check()
    assert [(e.prompt, e.answer) for e in source.examples()] == [("a", " 1"), ("b", " 2")]
    assert [document.text for document in source.documents()] == ["a 1", "b 2"]


def test_settings_that_cannot_be_are_told_together(tiny_tokenizer_dir, tmp_path):
    module = CodeExercises(mode="sft", val_fraction=2.0, too_long="cut")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"val_fraction is 2\.0.*too_long is 'cut'"):
        module.connect(Tokenizer(tiny_tokenizer_dir), 1, 64)
    with pytest.raises(UserError, match="Did you mean 'alpaca'"):
        CodeExercises(prompt_style="alpacca")
    with pytest.raises(UserError, match="mode is 'both'; choose paper or sft"):
        CodeExercises(mode="both").connect()  # type: ignore[arg-type]


def test_nothing_left_to_learn_names_the_row_length(tiny_tokenizer_dir, questions, tmp_path):
    with pytest.raises(UserError, match=r"no example is left in the train split of 40: .* longer"):
        connected(tiny_tokenizer_dir, tmp_path, sources=str(questions), max_seq_length=8)


def test_a_tokenizer_without_an_end_of_text_is_refused(tiny_tokenizer_dir, tmp_path):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    tokenizer.eos_id = None
    with pytest.raises(UserError, match="no end-of-text token, by which an answer ends"):
        Encoder(tokenizer, CodeExercises().prompt_style)


def test_a_yaml_names_it_by_its_bare_name():
    import litgpt.pretrain
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=litgpt.data.DataModule)
    parsed = parser.parse_args(["--data", "CodeExercises", "--data.mode", "sft"])
    assert parser.instantiate_classes(parsed).data.mode == "sft"
