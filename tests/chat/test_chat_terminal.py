"""`litgpt chat` in a real terminal: what is typed, what comes back, and what ends it."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect")

PROMPT = ">> Prompt: "


@contextmanager
def chatting(directory: Path, *options: str):
    """Start `litgpt chat` in a terminal of its own and wait for its prompt."""
    command = str(Path(sys.executable).parent / "litgpt")
    arguments = ["chat", str(directory), "--precision", "32-true", "--top_k", "1", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    child = pexpect.spawn(command, arguments, env=environment, timeout=120, dimensions=(50, 400))
    child.expect_exact(PROMPT)
    try:
        yield child
    finally:
        child.close(force=True)


def reply_to(child, text: str) -> bytes:
    """Type a line; return what is printed between `Reply:` and the line of figures."""
    child.sendline(text)
    child.expect_exact(">> Reply: ")
    child.expect(rb"\r\nTime for inference: [0-9.]+ sec total, [0-9.]+ tokens/sec, (\d+) tokens")
    reply = child.before
    child.expect_exact(PROMPT)
    return reply


def stop_reply(child, text: str) -> None:
    """Type a line, wait until the reply has begun, and press Ctrl-C."""
    child.sendline(text)
    child.expect_exact(">> Reply: ")
    child.expect(rb".{40}")  # it comes piece by piece
    child.sendintr()


def ended(child) -> int:
    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def test_a_conversation_of_several_turns(talker_dir, speaker_of):
    from phi_lit.chat.stream import Reply, Wish

    speaker = speaker_of(talker_dir)

    def expected(prompt: str) -> bytes:
        reply = Reply(0)
        wish = Wish(max_new_tokens=600, temperature=0.8, top_k=1)
        list(speaker.pieces(reply, speaker.encode(prompt), wish))
        return reply.text

    def same(printed: bytes, text: str) -> bool:
        """Tell whether a terminal printed `text` (which ends its lines in its own way)."""
        return printed.decode(errors="replace").replace("\r\n", "\n") == text

    options = ("--multi_turn", "true", "--max_new_tokens", "600")
    with chatting(talker_dir, *options) as child:
        first = expected("Hi there")
        assert same(reply_to(child, "Hi there"), first)
        second = expected(f"Hi there{first}\nMore")
        assert same(reply_to(child, "More"), second)
        # Ctrl-C ends the reply, not the session, and what was said stays said
        child.sendline("!new")
        child.expect_exact("[a new conversation]")
        child.expect_exact(PROMPT)
        assert same(reply_to(child, "Hi there"), first)
        stop_reply(child, "Go on")
        child.expect_exact("[stopped]")
        child.expect_exact(PROMPT)
        # what outgrows 2,048 bytes drops the oldest turns
        child.sendline("a" * 900)
        child.expect(rb"\[.* dropped: the context is full\]")
        child.expect_exact(PROMPT)
        # what cannot be answered is told in one line
        child.sendline("b" * 1500)
        child.expect(rb"phi_lit: the prompt's 1,500 tokens.*ask for at most 548 new")
        child.expect_exact(PROMPT)
        child.send(b"caf\xe9\n")
        child.expect_exact("phi_lit: the prompt is not valid UTF-8; type it again.")
        child.expect_exact(PROMPT)
        child.sendeof()
        assert ended(child) == 0


def test_without_options_a_session_survives_what_ended_it_before(talker_dir):
    with chatting(talker_dir, "--max_new_tokens", "1500") as child:
        stop_reply(child, "Hello")
        child.expect_exact(PROMPT)
        child.sendline("x" * 2500)
        child.expect(rb"phi_lit: the prompt has 2,500 tokens, but the model attends to 2,048")
        child.expect_exact(PROMPT)
        stop_reply(child, "Hello")
        child.expect_exact(PROMPT)
        child.sendintr()
        assert ended(child) == 0


def test_without_options_it_talks_as_litgpt_does(talker_dir, load_talker, monkeypatch, capsys):
    """Our prompt loop and LitGPT's own print the same and end at the same places."""
    import lightning as L
    import torch
    from litgpt.prompts import Default

    from phi_lit.chat.terminal import interact
    from phi_lit.seams import stock

    fabric = L.Fabric(devices=1, accelerator="cpu")
    model, tokenizer = load_talker(talker_dir)
    printed = []
    for loop in (stock("litgpt.chat.base.interact"), interact):
        lines = iter(["Hello", "  you ", "!quit", "never read"])
        monkeypatch.setattr("builtins.input", lambda _="": next(lines))  # noqa: B023
        model.clear_kv_cache()
        torch.manual_seed(1)
        with torch.inference_mode():
            loop(False, model, tokenizer, Default(), fabric, 0.8, 20, 50, 1.0, ([256],))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].count(">> Reply: ") == 2
    assert next(lines) == "never read"


def test_options_that_cannot_work_are_told_in_one_line_before_weights_load(talker_dir):
    from litgpt.chat.base import main

    from phi_lit.errors import UserError

    with pytest.raises(UserError, match=r"Did you mean 'bnb\.nf4'.*max_new_tokens is 0") as caught:
        main(talker_dir, quantize="bnb.nf5", max_new_tokens=0)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="--sys_prompt takes --multi_turn"):
        main(talker_dir, sys_prompt="Be brief.")


@pytest.mark.slow
def test_smollm2_quantized_remembers_a_name(smollm2):
    options = ("--multi_turn", "true", "--quantize", "bnb.int8", "--max_new_tokens", "40")
    with chatting(smollm2, *options) as child:
        assert b"Paris" in reply_to(child, "What is the capital of France?")
        assert b"France" in reply_to(child, "Which country is that city in?")
        child.sendline("")
        assert ended(child) == 0
