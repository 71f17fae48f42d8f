"""Opening tokenizer directories: what is refused and how, what the fingerprint sees, pickling."""

import json
import pickle
import shutil

import numpy as np
import pytest

from phi_lit.data.tokenizer import load_tokenizer
from phi_lit.data.vocabulary import byte_of_char
from phi_lit.errors import UserError

TEXT = "def f(x):\n    return x  # it's 42\n\n\n\tclass\n"


def changed(directory, target, change):
    """Copy a tokenizer directory with its tokenizer.json changed in place by `change`."""
    shutil.copytree(directory, target)
    path = target / "tokenizer.json"
    settings = json.loads(path.read_bytes())
    change(settings)
    path.write_text(json.dumps(settings), encoding="utf-8")
    return target


# What is refused


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda d: d / "nowhere", r"nowhere does not exist; `phi-lit tokenizer codegen` or"),
        (lambda d: d / "some.txt", r"some\.txt is a file, not a directory"),
        (lambda d: d / "empty", r"is no tokenizer directory .* makes one"),
        (lambda d: d / "broken", r"tokenizer\.json is broken JSON"),
        (lambda d: d / "bytes", r"tokenizer\.json is broken JSON"),
        (lambda d: d / "list", r"holds a JSON list, not an object"),
        (lambda d: d / "other", r"is no tokenizer that `tokenizers` reads"),
    ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, make, sentence):
    (tmp_path / "some.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    contents = {"broken": b'{"model": ', "bytes": b"\xff\xfe\x00", "list": b"[]", "other": b"{}"}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        load_tokenizer(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_without_an_end_of_text_token(small_dir, tmp_path):
    def drop(settings):
        settings["added_tokens"] = settings["added_tokens"][1:]
        del settings["model"]["vocab"]["<|endoftext|>"]
        for token in settings["added_tokens"]:
            token["id"] -= 1

    target = changed(small_dir, tmp_path / "t", drop)
    with pytest.raises(UserError, match="has no end-of-text token"):
        load_tokenizer(target)


@pytest.mark.parametrize("written", ["</s>", {"content": "</s>"}])
def test_the_end_of_text_may_be_named_by_the_settings(small_dir, tmp_path, written):
    def rename(settings):
        settings["added_tokens"][0]["content"] = "</s>"
        vocab = settings["model"]["vocab"]
        vocab["</s>"] = vocab.pop("<|endoftext|>")

    target = changed(small_dir, tmp_path / "t", rename)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": written}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(target)
    assert tokenizer.eot_id == load_tokenizer(small_dir).eot_id
    assert tokenizer.eot_id not in tokenizer.encode_batch(["</s>"])[0]
    (target / "tokenizer_config.json").unlink()
    for eos in (tokenizer.eot_id, [tokenizer.eot_id]):
        (target / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert load_tokenizer(target).eot_id == tokenizer.eot_id


def test_an_end_of_text_that_documents_could_forge_is_refused(small_dir, tmp_path):
    def ordinary(settings):
        settings["added_tokens"][0]["special"] = False

    with pytest.raises(UserError, match="a document could forge a boundary"):
        load_tokenizer(changed(small_dir, tmp_path / "t", ordinary))


def test_a_config_that_litgpt_cannot_read_is_refused(small_dir, tmp_path):
    shutil.copytree(small_dir, tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no tokenizer_class"):
        load_tokenizer(tmp_path / "t")


# Text is only text


@pytest.mark.parametrize("kind", ["codegen_dir", "small_dir"])
def test_a_document_cannot_forge_a_boundary(request, kind):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    text = "<|endoftext|>a\n<|endoftext|><|endoftext|>"
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == text


def test_nothing_is_added_or_cut_whatever_the_file_asks_for(small_dir, tmp_path):
    def template(settings):
        eot = "<|endoftext|>"
        piece = [
            {"SpecialToken": {"id": eot, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ]
        settings["post_processor"] = {
            "type": "TemplateProcessing",
            "single": piece,
            "pair": piece,
            "special_tokens": {eot: {"id": eot, "ids": [4057], "tokens": [eot]}},
        }
        settings["truncation"] = {
            "direction": "Right",
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        settings["normalizer"] = {"type": "NFC"}  # so that `tokenizers` itself encodes

    plain = load_tokenizer(small_dir).encode_batch([TEXT])[0]
    tokenizer = load_tokenizer(changed(small_dir, tmp_path / "t", template))
    assert tokenizer.engine == "tokenizers"
    assert tokenizer.encode_batch([TEXT])[0].tolist() == plain.tolist()


@pytest.mark.parametrize("normalizer", [None, {"type": "NFC"}])
def test_lone_surrogates_become_replacement_characters(small_dir, tmp_path, normalizer):
    target = changed(small_dir, tmp_path / "t", lambda s: s.update(normalizer=normalizer))
    tokenizer = load_tokenizer(target)
    assert tokenizer.engine == ("tokenizers" if normalizer else "tiktoken")
    found = tokenizer.encode_batch(["a\ud800b", "\ud83d\ude00", "plain"])
    assert [tokenizer.decode(ids) for ids in found] == ["a\ufffdb", "😀", "plain"]


def test_ids_are_as_narrow_as_the_vocabulary_allows(small_dir, tmp_path):
    def widen(settings):
        last = {"id": 2**16, "content": "[PAD]", "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        settings["added_tokens"].append(last | flags)
        settings["model"]["vocab"]["[PAD]"] = 2**16

    narrow = load_tokenizer(small_dir)
    wide = load_tokenizer(changed(small_dir, tmp_path / "t", widen))
    assert narrow.encode_batch([TEXT])[0].dtype == np.uint16
    assert wide.encode_batch([TEXT])[0].dtype == np.uint32
    assert wide.vocab_size == 2**16 + 1
    assert wide.engine == "tiktoken"
    assert wide.decode(wide.encode_batch([TEXT])[0]) == TEXT


def test_no_text_gives_no_ids(small_dir):
    tokenizer = load_tokenizer(small_dir)
    assert tokenizer.encode_batch([]) == []
    (empty,) = tokenizer.encode_batch([""])
    assert (empty.shape, empty.dtype) == ((0,), np.uint16)


# The fingerprint


def same_ids(settings):
    settings["added_tokens"].append(
        {
            "id": 4096,
            "content": "[PAD]",
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    )
    settings["decoder"] = None
    settings["model"]["merges"] = [" ".join(pair) for pair in settings["model"]["merges"]]
    settings["model"]["unk_token"] = "<|endoftext|>"
    settings["pre_tokenizer"]["trim_offsets"] = False


def swap_merges(settings):
    merges = settings["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def swap_ids(settings):
    vocab = settings["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def drop_a_run(settings):
    settings["added_tokens"] = settings["added_tokens"][:-1]


def prefix_space(settings):
    settings["pre_tokenizer"]["add_prefix_space"] = True


def normalize(settings):
    settings["normalizer"] = {"type": "NFC"}


def test_the_fingerprint_sees_what_decides_the_ids_and_nothing_else(small_dir, tmp_path):
    plain = load_tokenizer(small_dir).fingerprint
    copy = changed(small_dir, tmp_path / "same", same_ids)
    assert load_tokenizer(copy).fingerprint == plain
    changes = [swap_merges, swap_ids, drop_a_run, prefix_space, normalize]
    found = {
        load_tokenizer(changed(small_dir, tmp_path / change.__name__, change)).fingerprint
        for change in changes
    }
    assert len(found | {plain}) == len(changes) + 1


# Other processes


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_a_worker_process_has_the_same_tokenizer(run_python, small_dir, tmp_path, start):
    """In a program of its own, since a fork inherits what pytest's process has done before."""
    code = (
        "import multiprocessing\n"
        "from phi_lit.data.tokenizer import load_tokenizer\n"
        "if __name__ == '__main__':\n"
        f"    tokenizer = load_tokenizer({str(small_dir)!r})\n"
        f"    with multiprocessing.get_context({start!r}).Pool(1) as pool:\n"
        f"        (ids,) = pool.apply(tokenizer.encode_batch, ([{TEXT!r}],))\n"
        "    print(*ids)"
    )
    (tmp_path / "worker.py").write_text(code)
    done = run_python(tmp_path / "worker.py")
    assert done.stderr == ""
    wanted = load_tokenizer(small_dir).encode_batch([TEXT])[0].tolist()
    assert [int(i) for i in done.stdout.split()] == wanted


def test_a_tokenizer_changed_meanwhile_is_noticed(small_dir, tmp_path):
    shutil.copytree(small_dir, tmp_path / "t")
    pickled = pickle.dumps(load_tokenizer(tmp_path / "t"))
    assert pickle.loads(pickled).vocab_size == 4096
    changed(small_dir, tmp_path / "other", swap_ids)
    shutil.copy(tmp_path / "other" / "tokenizer.json", tmp_path / "t")
    with pytest.raises(UserError, match="was changed while it was in use"):
        pickle.loads(pickled)


# Falling back


def test_without_tiktoken_the_ids_are_the_same_and_it_is_said_once(run_python, small_dir):
    code = (
        "import sys; sys.modules['tiktoken'] = None\n"
        "from phi_lit.data.tokenizer import load_tokenizer\n"
        "import pickle\n"
        f"tokenizer = load_tokenizer({str(small_dir)!r})\n"
        f"pickle.loads(pickle.dumps(tokenizer)); load_tokenizer({str(small_dir)!r})\n"
        f"print(tokenizer.engine, *tokenizer.encode_batch([{TEXT!r}])[0])"
    )
    done = run_python("-c", code)
    engine, *ids = done.stdout.split()
    assert engine == "tokenizers"
    assert [int(i) for i in ids] == load_tokenizer(small_dir).encode_batch([TEXT])[0].tolist()
    assert done.stderr.count("because tiktoken is not installed") == 1


def test_a_sentencepiece_directory_is_read_as_litgpt_does(library_texts, tmp_path, capsys):
    sentencepiece = pytest.importorskip("sentencepiece")
    from litgpt.tokenizer import Tokenizer

    lines = [line for text in library_texts[:40] for line in text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    tokenizer, theirs = load_tokenizer(tmp_path), Tokenizer(tmp_path)
    assert "using sentencepiece" in capsys.readouterr().err
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (500, theirs.eos_id)
    texts = ["def f(x): return x", "</s> <s>", *library_texts[:3]]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.tolist() == theirs.encode(text).tolist()
        assert tokenizer.eot_id not in ids
    assert tokenizer.decode(tokenizer.encode_batch(["def f(x)"])[0]) == "def f(x)"
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint == tokenizer.fingerprint


def test_a_broken_sentencepiece_model_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"tokenizer\.model (is no|needs) sentencepiece"):
        load_tokenizer(tmp_path)


def test_the_alphabet_is_gpt2s():
    from tokenizers import pre_tokenizers

    assert sorted(byte_of_char()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for char, byte in byte_of_char().items():
        if byte < 128:
            assert split.pre_tokenize_str(chr(byte))[0][0] == char
