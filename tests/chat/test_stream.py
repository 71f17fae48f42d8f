"""One reply at a time: the tokens are LitGPT's, the cache is used again, the pieces are whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phi_lit.chat.stream import Reply, Speaker, Wish, _first, _held_back


@pytest.fixture(scope="module")
def speaker(speaker_of, talker_dir) -> Speaker:
    return speaker_of(talker_dir)


def say(speaker, prompt, **wish) -> tuple[Reply, list[str]]:
    wish = {"temperature": 0.0, "max_new_tokens": 40} | wish
    reply = Reply(prompt_tokens=len(prompt))
    return reply, list(speaker.pieces(reply, prompt, Wish(**wish)))


def test_greedy_reply_is_litgpts(speaker, talker_dir, greedy):
    prompt = list(b"def f(x):")
    reply, pieces = say(speaker, prompt)
    expected = greedy(talker_dir, prompt, 40)
    assert reply.text == "".join(pieces) == speaker._decode(expected)
    assert (reply.tokens, reply.finish_reason) == (40, "length")


def test_a_prompt_longer_than_a_chunk_is_read_as_a_whole(speaker, talker_dir, greedy):
    prompt = [i % 251 for i in range(1300)]
    assert say(speaker, prompt)[0].text == speaker._decode(greedy(talker_dir, prompt, 40))


def test_a_continued_conversation_computes_only_what_is_new(speaker_of, talker_dir, greedy):
    speaker = speaker_of(talker_dir)
    first = list(b"one two three four")
    say(speaker, first, max_new_tokens=200)
    longer = [*speaker._known, *b" and five"]
    seen = []
    handle = speaker.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    reply, _ = say(speaker, longer, max_new_tokens=10)
    handle.remove()
    assert seen == [len(b" and five")] + [1] * 9
    assert reply.text == speaker._decode(greedy(talker_dir, longer, 10))
    # another prompt shares the beginning only; the same prompt again needs its last token
    for prompt, new in ((first[:7] + list(b"XYZ"), 3), (first[:7] + list(b"XYZ"), 1)):
        seen.clear()
        handle = speaker.model.register_forward_pre_hook(lambda _, a: seen.append(a[0].shape[1]))
        reply, _ = say(speaker, prompt, max_new_tokens=1)
        handle.remove()
        assert seen == [new]
        assert reply.text == speaker._decode(greedy(talker_dir, prompt, 1))


def test_an_interrupted_reply_leaves_the_cache_right(speaker_of, talker_dir, greedy):
    speaker = speaker_of(talker_dir)
    prompt = list(b"tell me")
    reply = Reply(len(prompt))
    pieces = speaker.pieces(reply, prompt, Wish(max_new_tokens=500, temperature=0.0))
    next(pieces)
    pieces.close()
    assert 0 < reply.tokens < 500
    again = [*prompt, *b" more"]
    assert say(speaker, again)[0].text == speaker._decode(greedy(talker_dir, again, 40))


def test_a_stop_string_ends_the_reply_before_its_first_letter(speaker):
    prompt = list(b"def f(x):")
    whole = say(speaker, prompt, max_new_tokens=60)[0].text
    stop = whole[20:24]
    reply, pieces = say(speaker, prompt, max_new_tokens=60, stop=(stop,))
    assert reply.text == "".join(pieces) == whole[: whole.find(stop)]
    assert reply.finish_reason == "stop"


def test_a_stop_token_ends_the_reply_and_is_not_counted(speaker, talker_dir, greedy):
    prompt = list(b"def f(x):")
    ids = greedy(talker_dir, prompt, 40)
    end = ids[-1]
    reply, _ = say(speaker, prompt, stop_ids=frozenset({end}))
    assert reply.tokens == ids.index(end)
    assert reply.text == speaker._decode(ids[: ids.index(end)])
    assert reply.finish_reason == "stop"


def test_the_context_ends_a_reply(speaker):
    prompt = [i % 251 for i in range(2040)]
    reply, _ = say(speaker, prompt, max_new_tokens=100)
    assert (reply.tokens, reply.finish_reason) == (8, "length")


def test_a_seed_makes_a_sampled_reply_repeatable(speaker):
    prompt = list(b"abc")
    one, two, other = (
        say(speaker, prompt, temperature=1.0, seed=seed)[0].text for seed in (1, 1, 2)
    )
    assert one == two != other


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
@settings(max_examples=300, deadline=None)
def test_what_is_given_out_never_contains_the_beginning_of_a_stop_string(text, stops):
    """Whatever follows: what is held back is exactly what a stop string may still begin in."""
    if _first(text, stops) is not None:
        return
    sure = text[: len(text) - _held_back(text, stops)]
    for stop in stops:
        for cut in range(1, len(stop)):
            if text.endswith(stop[:cut]):  # then `stop[cut:]` may follow
                assert len(sure) <= len(text) - cut
    held = text[len(sure) :]
    assert not held or any(stop.startswith(held) for stop in stops)
