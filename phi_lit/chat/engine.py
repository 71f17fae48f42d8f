"""The model behind the server: one thread that replies, first come, first served.

Requests live in the server's event loop and wait for pieces of text from here. A request that is
given up (its client has hung up) is left off at the next token, and the next one begins.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch

from phi_lit.chat.conversation import Render, renderer, stops_of_turn
from phi_lit.chat.stream import Reply, Speaker, Wish, stop_of

if TYPE_CHECKING:
    from litgpt.prompts import PromptStyle


class Overdue(Exception):
    """A request waited longer than the server's timeout before its turn came."""


@dataclass
class _Job:
    prompt: list[int]
    wish: Wish
    reply: Reply
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue
    since: float = field(default_factory=time.monotonic)
    given_up: threading.Event = field(default_factory=threading.Event)

    def send(self, item: Any) -> None:
        """Hand a piece of text, None at the end, or an exception to the event loop."""
        try:
            self.loop.call_soon_threadsafe(self.out.put_nowait, item)
        except RuntimeError:  # the loop is closed: the server has stopped
            self.given_up.set()


class Engine:
    """A loaded model that serves many requests, one after the other.

    Args:
        speaker: the model.
        style: LitGPT's prompt style of the checkpoint, for prompts without roles.
        checkpoint_dir: where its chat template is.
        names: what clients may call the model; the first one is its own.
        timeout: seconds that a request may wait for its turn; 0 for any number.
    """

    def __init__(
        self,
        speaker: Speaker,
        style: "PromptStyle",
        checkpoint_dir: Path,
        names: list[str],
        timeout: float,
    ) -> None:
        self.names, self.style = names, style
        self.render: Render = renderer(checkpoint_dir, style)
        self._speaker, self._timeout = speaker, timeout
        self.style_stops = stop_of(style, speaker.tokenizer)
        ids, texts = stops_of_turn(self.render, speaker.tokenizer)
        self.chat_stops = (self.style_stops[0] | ids, self.style_stops[1] + texts)
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int:
        """The most tokens that the model attends to."""
        return self._speaker.context

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt."""
        return self._speaker.encode(text)

    async def pieces(
        self, reply: Reply, prompt: list[int], wish: Wish
    ) -> AsyncGenerator[str, None]:
        """Yield a reply's text as it comes; closing the iterator gives the reply up.

        Raises:
            Overdue: its turn did not come in time.
        """
        job = _Job(prompt, wish, reply, asyncio.get_running_loop(), asyncio.Queue())
        self._jobs.put(job)
        try:
            while (item := await job.out.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            job.given_up.set()

    def close(self) -> None:
        """Stop the thread after the token that it is at."""
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.given_up.is_set():
                continue
            if self._timeout and time.monotonic() - job.since > self._timeout:
                job.send(Overdue(f"the request waited {self._timeout:.0f} s for its turn"))
                continue
            try:
                for piece in self._speaker.pieces(job.reply, job.prompt, job.wish):
                    if job.given_up.is_set():
                        break
                    if piece:
                        job.send(piece)
                job.send(None)
            except Exception as error:
                job.send(error)


def load_engine(
    checkpoint_dir: Path,
    *,
    quantize: str | None,
    precision: str | None,
    accelerator: str,
    timeout: float,
) -> Engine:
    """Load a checkpoint with LitGPT's own `LLM` and return the engine that serves it."""
    from litgpt.api import LLM

    llm = LLM.load(str(checkpoint_dir), distribute=None)
    llm.distribute(accelerator=accelerator, devices=1, quantize=quantize, precision=precision)
    llm.model.eval()
    device: torch.device = llm.fabric.device
    speaker = Speaker(llm.model, llm.preprocessor.tokenizer, device, llm.config.block_size)
    hub = llm.config.hf_config
    names = [llm.config.name, f"{hub.get('org')}/{hub.get('name')}", checkpoint_dir.name]
    names += [str(checkpoint_dir), str(checkpoint_dir.resolve())]
    return Engine(speaker, llm.prompt_style, checkpoint_dir, list(dict.fromkeys(names)), timeout)
