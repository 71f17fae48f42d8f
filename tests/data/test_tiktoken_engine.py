"""The fast engine's ids are those of `tokenizers`, on everything we could think of."""

import json
import random
import sys
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from phi_lit.data.codegen import byte_level_tokenizer, write_tokenizer
from phi_lit.data.tokenizer import load_tokenizer
from phi_lit.data.vocabulary import byte_of_char

SPACES = " \t\n\r\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u3000"


class Pair:
    """A tokenizer directory in both engines; `slow` is `tokenizers`, straight from the file."""

    def __init__(self, directory):
        self.fast = load_tokenizer(directory)
        assert self.fast.engine == "tiktoken", self.fast.why_slow
        self.slow = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.slow.encode_special_tokens = True

    def check(self, texts):
        """Assert that both give the same ids for every text; name the first that differs."""
        for start in range(0, len(texts), 256):
            part = texts[start : start + 256]
            wanted = self.slow.encode_batch_fast(part, add_special_tokens=False)
            for text, ids, right in zip(part, self.fast.encode_batch(part), wanted, strict=True):
                assert np.array_equal(ids, np.array(right.ids, dtype=ids.dtype)), text[:2000]


@pytest.fixture(scope="module", params=["codegen_dir", "small_dir", "plain_dir"])
def pair(request):
    return Pair(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def plain_dir(small_dir, tmp_path_factory):
    """GPT-2's kind without any added run, where BPE itself merges white space."""
    from tokenizers import trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "for a in b:\n    if a:\n        c()\n\n\n\t\tx = 1\n" * 9
    tokenizer.train_from_iterator(
        [text + repr(sys.copyright) + byte_level_tokenizer.__doc__], trainer
    )
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    directory = tmp_path_factory.mktemp("plain") / "tokenizer"
    write_tokenizer(tokenizer, "GPT2Tokenizer", directory)
    return directory


def test_equal_on_a_sample_of_the_standard_library(pair, library_texts):
    pair.check(random.Random(0).sample(library_texts, 150))


@pytest.mark.slow
def test_equal_on_the_whole_standard_library(pair, library_texts):
    pair.check(library_texts)


def test_equal_on_runs_of_every_length_in_every_context(pair):
    sides = ["", "a", "1", ".", "'", "\n", "\t", " ", "\xa0", "é"]
    fills = [" ", "\t", "\n"]
    texts = [
        left + fill * length + right
        for left, right, fill in product(sides, sides, fills)
        for length in range(71)
    ]
    runs = [" " * n for n in (1, 2, 3, 30, 31, 32, 33, 62, 63)] + ["\t" * n for n in (1, 2, 9, 10)]
    texts += [a + b + c for a, b, c in product([*runs, "\n", "\n\n", "\xa0", "x"], repeat=3)]
    pair.check(texts)


def test_equal_on_random_white_space(pair):
    draw = random.Random(1)
    chars = SPACES + "  \t\t\n\n" * 3 + "a1.'é"
    texts = ["".join(draw.choices(chars, k=draw.randrange(40))) for _ in range(6000)]
    texts += ["".join(draw.choices("  \n\tx", k=draw.randrange(60))) for _ in range(3000)]
    texts += ["".join(draw.choices(" \t", k=draw.randrange(80))) for _ in range(1000)]
    pair.check(texts)


def test_equal_on_random_unicode(pair):
    draw = random.Random(2)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    known = "  aZ09_'\"#.\n\té\u0301ßд中あ한🌍\u200d\ufe0f"

    def one():
        if draw.random() < 0.5:
            return draw.choice(known)
        return chr(draw.randrange(*draw.choice(ranges)))

    pair.check(["".join(one() for _ in range(draw.randrange(60))) for _ in range(6000)])


def test_equal_on_shuffled_pieces_of_code(pair, library_texts):
    """Real fragments in unreal orders: every kind of piece beside every other."""
    draw = random.Random(3)
    source = "".join(draw.sample(library_texts, 5))
    texts = []
    for _ in range(2000):
        starts = [draw.randrange(len(source) - 12) for _ in range(12)]
        texts.append("".join(source[s : s + draw.randrange(12)] for s in starts))
    pair.check(texts)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_equal_on_what_hypothesis_finds(both, text):
    for pair in both:
        pair.check([text, f"  {text}\n    {text}"])


@pytest.fixture(scope="module")
def both(codegen_dir, small_dir):
    return Pair(codegen_dir), Pair(small_dir)


@pytest.fixture(scope="module")
def revealing(tmp_path_factory):
    """Every high byte merges with an a, 1 or ! before it: ids show where pieces begin."""
    chars = byte_of_char()
    merges = [(left, char) for left in "a1!" for char, byte in chars.items() if byte > 127]
    tokens = [*chars, *(left + right for left, right in merges), "<|endoftext|>"]
    tokenizer = byte_level_tokenizer({token: i for i, token in enumerate(tokens)}, merges)
    directory = tmp_path_factory.mktemp("revealing") / "tokenizer"
    write_tokenizer(tokenizer, "GPT2Tokenizer", directory)
    return Pair(directory)


def test_the_revealing_tokenizer_reveals(revealing):
    letter, symbol = revealing.fast.encode_batch(["aé", "a€"])
    assert (len(letter), len(symbol)) == (2, 4)


def revealing_texts(points):
    """Return texts in which each character follows an a, a 1 and a !."""
    chars = [chr(i) for i in points if not 0xD800 <= i < 0xE000]
    lines = [f"a{char}1{char}!{char}" for char in chars]
    return ["\n".join(lines[start : start + 512]) for start in range(0, len(lines), 512)]


def test_code_points_are_the_same_kind_to_both(revealing):
    assigned = [range(0x33480), range(0xE0000, 0xE0200)]  # the planes between are empty
    revealing.check(revealing_texts([*assigned[0], *assigned[1], *range(0x33480, 0x110000, 97)]))


@pytest.mark.slow
def test_every_code_point_is_the_same_kind_to_both(revealing):
    revealing.check(revealing_texts(range(0x110000)))


@pytest.mark.parametrize("unit", ["\n", "\n \t", "\xa0", "\r\n", " ", "\t"])
def test_a_million_spaces_are_no_trouble(both, unit):
    """Here tiktoken's regular expressions may give up."""
    both[1].check([f"x{unit * (1_000_000 // len(unit))}y"])


@pytest.mark.parametrize("unit", ["a", "ab", "=", "7", "é", "🌍", "ab\n"])
def test_a_word_as_long_as_a_file_is_no_trouble(both, unit):
    both[1].check([f" {unit * (200_000 // len(unit))}", unit * 5000])


# What the engine must refuse


def save(directory, vocab, merges):
    write_tokenizer(byte_level_tokenizer(vocab, merges), "GPT2Tokenizer", directory)
    return load_tokenizer(directory)


def vocabulary(*merged):
    tokens = [*byte_of_char(), *merged, "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


def test_merges_that_joining_bytes_would_get_wrong_are_left_to_tokenizers(tmp_path):
    """`abc` is made of ab+c, but b+c comes first: tiktoken would join a+bc, which is no merge."""
    vocab = vocabulary("bc", "ab", "abc")
    tokenizer = save(tmp_path / "t", vocab, [("b", "c"), ("a", "b"), ("ab", "c")])
    assert tokenizer.encode_batch(["abc"])[0].tolist() == [vocab["a"], vocab["bc"]]
    assert tokenizer.engine == "tokenizers"
    assert "token 'abc' alone does not encode to itself" in tokenizer.why_slow


def test_two_ways_to_make_a_token_are_left_to_tokenizers(tmp_path):
    vocab = vocabulary("ab", "bc", "abc")
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    tokenizer = save(tmp_path / "t", vocab, merges)
    assert tokenizer.engine == "tokenizers"
    assert "two of its merges" in tokenizer.why_slow


def test_a_merge_before_its_parts_is_left_to_tokenizers(tmp_path):
    vocab = vocabulary("ab", "abc")
    tokenizer = save(tmp_path / "t", vocab, [("ab", "c"), ("a", "b")])
    assert tokenizer.engine == "tokenizers"
    assert "comes before its parts" in tokenizer.why_slow


def test_ids_in_another_order_than_the_merges_are_no_trouble(tmp_path, small_dir):
    """Ranks come from the merges, not from the ids."""
    read = json.loads((small_dir / "tokenizer.json").read_bytes())["model"]
    tokens = list(read["vocab"])
    random.Random(0).shuffle(tokens)
    vocab = {token: i for i, token in enumerate(tokens)}
    save(tmp_path / "t", vocab, [tuple(pair) for pair in read["merges"]])
    Pair(tmp_path / "t").check(["def f(x):\n    return x + 1\n" * 3, "import this  # that's it"])


def added(content, **flags):
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 4096, "content": content, **off, **flags}


def without(settings, content):
    kept = [token for token in settings["added_tokens"] if token["content"] != content]
    settings["added_tokens"] = kept


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.update(normalizer={"type": "NFC"}), "normalizes the text"),
        (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "as GPT-2 does"),
        (lambda s: s["pre_tokenizer"].update(use_regex=False), "as GPT-2 does"),
        (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "as GPT-2 does"),
        (lambda s: s["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda s: s["added_tokens"].append(added("return")), "'return' is no run"),
        (lambda s: s["added_tokens"].append(added("\n\n")), "is no run"),
        (lambda s: s["added_tokens"].append(added(" \t")), "is no run"),
        (lambda s: s["added_tokens"].append(added("\t" * 10, lstrip=True)), "surroundings"),
        (lambda s: s["added_tokens"].append(added(" " * 33, normalized=True)), "all lengths"),
        (lambda s: s["added_tokens"].append(added(" " * 32)), "two passes"),
        (lambda s: s["added_tokens"].append(added("<| x |>", special=True)), "white space"),
        (lambda s: without(s, " " * 5), "all lengths"),
    ],
)
def test_another_kind_of_tokenizer_is_left_to_tokenizers(
    small_dir, tmp_path, change, reason, capsys
):
    read = json.loads((small_dir / "tokenizer.json").read_bytes())
    change(read)
    (tmp_path / "tokenizer.json").write_text(json.dumps(read), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.engine == "tokenizers"
    assert reason in tokenizer.why_slow
    assert f"because {tokenizer.why_slow}" in capsys.readouterr().err
    slow = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    slow.encode_special_tokens = True
    text = "return  (x\t\t\n\n\n" + " " * 40 + "<|endoftext|> <| x |>\n)"
    assert tokenizer.encode_batch([text])[0].tolist() == slow.encode(text).ids


def test_fewer_run_lengths_are_no_trouble(small_dir, tmp_path):
    """Runs of 2 to 8 spaces only, no tabs: a longer run is several."""
    read = json.loads((small_dir / "tokenizer.json").read_bytes())
    for length in range(9, 32):
        without(read, " " * length)
    for length in range(2, 10):
        without(read, "\t" * length)
    (tmp_path / "tokenizer.json").write_text(json.dumps(read), encoding="utf-8")
    pair = Pair(tmp_path)
    pair.check([" " * n + right for n in range(40) for right in ("", "x", "\n", "\t\t\tx", "\n  ")])


def test_a_special_token_in_the_text_is_text(small_dir, tmp_path):
    read = json.loads((small_dir / "tokenizer.json").read_bytes())
    read["added_tokens"].append(added("<fim>", special=True))
    (tmp_path / "tokenizer.json").write_text(json.dumps(read), encoding="utf-8")
    pair = Pair(tmp_path)
    pair.check(["a<fim>b  <fim>  <|endoftext|>", "<|never asked for|>" * 3])
    assert 4096 not in pair.fast.encode_batch(["<fim>"])[0]
