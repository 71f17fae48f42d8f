"""Tokens to text: pieces join to the whole, and what stands before a stop string is kept."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi_lit.generate.text import StopText, TextStream, whole_text


@pytest.fixture(scope="module")
def decode(tiny_tokenizer_dir):
    from litgpt.tokenizer import Tokenizer

    return Tokenizer(tiny_tokenizer_dir).processor.decode


@pytest.fixture(scope="module")
def encode(tiny_tokenizer_dir):
    from litgpt.tokenizer import Tokenizer

    processor = Tokenizer(tiny_tokenizer_dir).processor
    return lambda text: processor.encode(text).ids


@given(st.lists(st.integers(0, 256), max_size=40), st.lists(st.integers(0, 256), max_size=9))
@settings(max_examples=120, deadline=None)
def test_pieces_of_any_bytes_join_to_the_whole(decode, ids, context):
    stream = TextStream(decode, context)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == whole_text(decode, context, ids)


@given(st.text(max_size=30))
@settings(max_examples=80, deadline=None)
def test_a_character_is_given_out_whole_and_at_once(decode, encode, text):
    text = text.replace("\ufffd", "?")
    stream, so_far = TextStream(decode, encode("x")), ""
    for token in encode(text):
        so_far += stream.push(token)
        assert text.startswith(so_far)
    assert so_far == text


def stopped(decode, ids, stops):
    watched = StopText(TextStream(decode), stops)
    for count, token in enumerate(ids, start=1):
        if watched.push(token):
            return watched.text, count
    watched.flush()
    return watched.text, None


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("    return x\n\ndef g():", ["\ndef"], "    return x\n"),
        ("    return x\n\n\n\nclass", ["\nclass"], "    return x\n\n\n"),
        ("a\n\nb", ["\n\n"], "a"),
        ("  \n x", ["x"], "  \n "),
        ("naïve é stop", ["é"], "naïve "),
        ("aaab", ["aab"], "a"),
        ("xyz", ["z", "y"], "x"),
        ("stop", ["stop"], ""),
        ("🙂🙃 end", ["🙃"], "🙂"),
        ("no stop at all\n", ["\n\n"], None),
    ],
)
def test_text_before_a_stop_string_is_kept_to_the_letter(decode, encode, text, stops, kept):
    found, count = stopped(decode, encode(text), stops)
    assert found == (text if kept is None else kept)
    assert (count is None) == (kept is None)


@given(st.text("ab\n", max_size=40), st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1))
@settings(max_examples=120, deadline=None)
def test_it_stops_at_the_first_moment_that_holds_a_stop_string(decode, encode, text, stops):
    expected = None
    for end in range(1, len(text) + 1):  # one byte, one token: the slow and obvious way
        places = [at for stop in stops if (at := text[:end].find(stop)) >= 0]
        if places:
            expected = text[: min(places)], end
            break
    assert stopped(decode, encode(text), stops) == (expected or (text, None))


def test_llamas_tokenizer_keeps_the_space_of_a_completions_first_word():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"▁Hello": 0, "▁world": 1, "!": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([1]) == "world"  # what LitGPT mends with a dummy token
    stream = TextStream(tokenizer.decode, [0])
    assert stream.push(1) + stream.push(2) == " world!"
    assert whole_text(tokenizer.decode, [0], [1, 2]) == " world!"
