"""`litgpt chat`: LitGPT's own command, with a session that lasts.

LitGPT's `main` loads the model and ours takes over at its prompt loop. Without `--multi_turn` every
prompt stands alone and LitGPT's own `process_prompt` answers it. Ctrl-C stops a reply and keeps the
session; at the prompt it ends it, as Ctrl-D and an empty line do.
"""

import sys
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi_lit.checks import check_inference, fault_of_length, fault_of_text
from phi_lit.errors import UserError
from phi_lit.seams import stock

END = ("!quit", "!exit")
"""What ends a session, besides an empty line."""
FORGET = "!new"
"""What begins a new conversation in the same session."""


@dataclass(frozen=True)
class _Session:
    checkpoint_dir: Path
    multi_turn: bool
    sys_prompt: str | None


_session: ContextVar[_Session | None] = ContextVar("session", default=None)
"""What `main` knows and LitGPT's `main` does not pass on to the prompt loop."""


def main(
    checkpoint_dir: Path,
    *,
    max_new_tokens: int = 50,
    top_k: int | None = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    quantize: str | None = None,
    precision: str | None = None,
    compile: bool = False,
    multiline: bool = False,
    access_token: str | None = None,
    multi_turn: bool = False,
    sys_prompt: str | None = None,
) -> None:
    """Chat with a model.

    Args:
        checkpoint_dir: A local path to a directory with the model's weights, or a model's name
            (`litgpt download list` shows them).
        max_new_tokens: The most tokens of a reply.
        top_k: The number of most probable tokens to sample from.
        top_p: Sample only from the most probable tokens that together have this probability.
        temperature: Higher values give more random replies, 0 the most probable one.
        quantize: Quantize the weights with bitsandbytes, on a GPU or a CPU: to 4 bits (bnb.nf4,
            bnb.fp4; -dq quantizes the scales too) or to 8 (bnb.int8).
        precision: What to compute in: bf16-true, 16-true or 32-true.
        compile: Compile the model: faster replies after a longer start.
        multiline: Take prompts of several lines, ended by a line `!submit`.
        access_token: A token of the hub for models that need one.
        multi_turn: Remember the conversation: each prompt continues it, in the model's own chat
            template. `!new` begins another. What outgrows the context is dropped from its start.
        sys_prompt: What the model is told before the conversation (with multi_turn).
    """
    check_inference(
        checkpoint_dir,
        quantize=quantize,
        precision=precision,
        max_new_tokens=max_new_tokens,
        prompt=None if sys_prompt is None else "a",
        sys_prompt=sys_prompt,
    )
    if sys_prompt is not None and not multi_turn:
        raise UserError("--sys_prompt takes --multi_turn true; a prompt alone has its own style.")
    directory = _directory(checkpoint_dir)
    token = _session.set(_Session(directory, multi_turn, sys_prompt))
    try:
        stock("litgpt.chat.base.main")(
            checkpoint_dir,
            max_new_tokens=max_new_tokens,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            quantize=quantize,
            precision=precision,
            compile=compile,
            multiline=multiline,
            access_token=access_token,
        )
    finally:
        _session.reset(token)


def _directory(checkpoint_dir: Path) -> Path:
    from litgpt.utils import extend_checkpoint_dir

    return extend_checkpoint_dir(Path(checkpoint_dir))


def interact(
    multiline: bool,
    model: Any,
    tokenizer: Any,
    prompt_style: Any,
    fabric: Any,
    temperature: float,
    max_new_tokens: int | None,
    top_k: int | None,
    top_p: float,
    stop_tokens: tuple[list[int], ...],
) -> None:
    """Replace LitGPT's prompt loop: read, reply, until the user ends it."""
    sampling = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    session = _session.get()
    talk: _Alone | _Together
    if session is not None and session.multi_turn:
        talk = _Together.begin(session, model, tokenizer, prompt_style, max_new_tokens, sampling)
    else:
        given = (temperature, max_new_tokens, top_k, top_p, stop_tokens)
        talk = _Alone(model, tokenizer, prompt_style, fabric, given)
    for prompt in _prompts(multiline):
        try:
            talk.reply(prompt)
        except UserError as error:
            print(f"phi_lit: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("\n[stopped]", file=sys.stderr)


def _prompts(multiline: bool) -> Any:
    """Yield what the user types, until an empty prompt, !quit, Ctrl-C or Ctrl-D."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # told below, where strict would end all
    while True:
        try:
            prompt = (_read_lines() if multiline else input(">> Prompt: ")).strip()
        except (KeyboardInterrupt, EOFError):
            print()
            return
        if not prompt or prompt.lower() in END:
            return
        if fault := fault_of_text(prompt):
            print(f"phi_lit: {fault}; type it again.", file=sys.stderr)
        else:
            yield prompt


def _read_lines() -> str:
    print(">> Prompt: (Type '!submit' on a new line to end input).")
    lines: list[str] = []
    while (line := input()).strip().lower() not in ("!submit", *END):
        lines.append(line)
    return "\n".join(lines)


@dataclass
class _Alone:
    """Every prompt by itself, as LitGPT answers it."""

    model: Any
    tokenizer: Any
    style: Any
    fabric: Any
    given: tuple[Any, ...]

    def reply(self, prompt: str) -> None:
        import litgpt.chat.base

        context, most = self.model.config.block_size, self.given[1]
        tokens = self.tokenizer.encode(self.style.apply(prompt=prompt)).numel()
        if fault := fault_of_length(tokens, most or 1, context):
            raise UserError(f"{fault}.")
        litgpt.chat.base.process_prompt(
            prompt, self.model, self.tokenizer, self.style, self.fabric, *self.given
        )


@dataclass
class _Together:
    """A conversation: each reply knows what was said before."""

    speaker: Any
    begin_anew: Callable[[], Any]
    wish: Any
    conversation: Any

    @classmethod
    def begin(
        cls,
        session: _Session,
        model: Any,
        tokenizer: Any,
        style: Any,
        max_new_tokens: int | None,
        sampling: dict[str, Any],
    ) -> "_Together":
        from phi_lit.chat.conversation import Conversation, renderer, stops_of_turn
        from phi_lit.chat.stream import Speaker, Wish, stop_of

        context = model.config.block_size
        speaker = Speaker(model, tokenizer, next(model.parameters()).device, context)
        render = renderer(session.checkpoint_dir, style)
        ends = (stop_of(style, tokenizer), stops_of_turn(render, tokenizer))
        wish = Wish(
            max_new_tokens=max_new_tokens or context // 4,
            stop_ids=ends[0][0] | ends[1][0],
            stop=ends[0][1] + ends[1][1],
            **sampling,
        )

        def anew() -> Conversation:
            return Conversation(render, speaker.encode, context, session.sys_prompt)

        return cls(speaker, anew, wish, anew())

    def reply(self, prompt: str) -> None:
        from phi_lit.chat.stream import Reply

        if prompt.lower() == FORGET:
            self.conversation = self.begin_anew()
            print("[a new conversation]", file=sys.stderr)
            return
        ids, dropped = self.conversation.ask(prompt, self.wish.max_new_tokens)
        if dropped:
            turns = "the oldest turn was" if dropped == 1 else f"the {dropped} oldest turns were"
            print(f"[{turns} dropped: the context is full]", file=sys.stderr)
        reply, start = Reply(prompt_tokens=len(ids)), time.perf_counter()
        print(">> Reply: ", end="", flush=True)
        try:
            for piece in self.speaker.pieces(reply, ids, self.wish):
                print(piece, end="", flush=True)
        finally:
            self.conversation.answer(reply.text)
        seconds = time.perf_counter() - start
        print(
            f"\nTime for inference: {seconds:.02f} sec total, {reply.tokens / seconds:.02f} "
            f"tokens/sec, {reply.tokens} tokens",
            file=sys.stderr,
        )
        print()
