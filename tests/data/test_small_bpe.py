"""The trained tokenizer has the size asked for, codegen's layout, and the same bytes every time."""

import json

import pytest

from phi_lit.data.codegen import RUNS
from phi_lit.data.small_bpe import SMALLEST, train_bpe
from phi_lit.data.tokenizer import load_tokenizer
from phi_lit.errors import UserError


def test_it_has_the_size_asked_for_and_codegens_layout(small_dir):
    tokenizer = load_tokenizer(small_dir)
    assert tokenizer.vocab_size == 4096
    assert tokenizer.eot_id == 4096 - 1 - len(RUNS)
    assert tokenizer.engine == "tiktoken"
    runs = tokenizer.encode_batch(RUNS)
    assert [ids.tolist() for ids in runs] == [[i] for i in range(4096 - len(RUNS), 4096)]


def test_no_merge_learns_a_run(small_dir):
    model = json.loads((small_dir / "tokenizer.json").read_bytes())["model"]
    assert not [token for token in model["vocab"] if "ĠĠ" in token or "ĉĉ" in token]


def test_a_prefix_of_the_ids_is_a_smaller_training(small_dir, library_texts, tmp_path):
    """Merges are learned in order, so a smaller vocabulary is where a larger one began."""
    train_bpe(library_texts[::3], 600, tmp_path / "out")
    read = [json.loads((d / "tokenizer.json").read_bytes()) for d in (tmp_path / "out", small_dir)]
    small, large = (settings["model"]["merges"] for settings in read)
    assert small == large[: len(small)]
    assert len(small) == 600 - SMALLEST


def test_training_is_deterministic_across_processes(run_python, small_dir, tmp_path):
    code = (
        "import sys, sysconfig, pathlib\n"
        "from phi_lit.data.small_bpe import train_bpe\n"
        "files = sorted(pathlib.Path(sysconfig.get_path('stdlib')).glob('*.py'))\n"
        "train_bpe((f.read_text('utf-8') for f in files), 1500, pathlib.Path(sys.argv[1]))"
    )
    found = set()
    for seed, threads in ((1, "true"), (2, "false"), (3, "true")):
        out = tmp_path / str(seed)
        run_python("-c", code, out, PYTHONHASHSEED=str(seed), TOKENIZERS_PARALLELISM=threads)
        found.add((out / "tokenizer.json").read_bytes())
    assert len(found) == 1


def test_a_document_that_spells_the_end_of_text_teaches_nothing_special(tmp_path):
    texts = ["<|endoftext|> " * 50 + "some words and some more words " * 20] * 4
    train_bpe(texts, SMALLEST + 20, tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "out")
    ids = tokenizer.encode_batch(["<|endoftext|>"])[0]
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == "<|endoftext|>"


def test_too_little_text_says_what_it_is_enough_for(tmp_path):
    with pytest.raises(UserError, match=r"too few for 4096 ids: they gave (\d+)") as caught:
        train_bpe(["hello hello hello"], 4096, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    enough = int(str(caught.value).split("they gave ")[1].split(".")[0])
    train_bpe(["hello hello hello"], enough, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").vocab_size == enough


@pytest.mark.parametrize("size", [0, SMALLEST, 2**20 + 1])
def test_a_size_out_of_range_is_refused(tmp_path, size):
    with pytest.raises(UserError, match=f"vocab_size is {size}; choose 296 to 1048576"):
        train_bpe(["hello"], size, tmp_path / "out")


def test_an_error_in_the_texts_leaves_nothing_behind(tmp_path):
    def texts():
        yield "hello " * 10
        raise UserError("the corpus broke off")

    with pytest.raises(UserError, match="the corpus broke off"):
        train_bpe(texts(), 300, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_trains_on_what_it_is_given(run_python, tmp_path):
    (tmp_path / "a.py").write_text("def add(left, right):\n    return left + right\n" * 40)
    out = tmp_path / "out"
    arguments = ["--vocab_size", 310, "--sources", tmp_path / "a.py", "--out_dir", out]
    done = run_python("-m", "phi_lit", "tokenizer", "train", *arguments)
    assert f"{out}: 310 ids, end of text 271, engine tiktoken" in done.stdout
    assert load_tokenizer(out).vocab_size == 310


def test_the_command_stops_reading_at_the_limit(run_python, tmp_path):
    done = run_python(
        *("-m", "phi_lit", "tokenizer", "train", "--out_dir", tmp_path / "out"),
        *("--vocab_size", 600, "--max_mb", 1),
    )
    assert "600 ids" in done.stdout
    documents = int(done.stderr.split("reading: ")[1].split()[0].replace(",", ""))
    assert 5 < documents < 200
