"""One reply at a time, piece by piece, from a cache that remembers what came before.

`Speaker` runs LitGPT's own model and sampling. What a prompt shares with the one before, and the
reply to it, is in the key-value cache already and is not computed again: a conversation's turn
costs its own tokens only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from phi_lit.generate.text import TextStream

if TYPE_CHECKING:
    from litgpt.tokenizer import Tokenizer

CHUNK = 512
"""Prompt tokens computed at a time: the logits of a long prompt would fill the memory."""


@dataclass(frozen=True)
class Wish:
    """How a reply is sampled and when it ends, in LitGPT's words."""

    max_new_tokens: int = 50
    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    """Strings that end the reply, before their first letter."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the reply and are not part of it."""
    seed: int | None = None
    """Makes this reply repeatable; None goes on with torch's own numbers."""


@dataclass
class Reply:
    """What has been generated of one reply so far; complete once its pieces are used up."""

    prompt_tokens: int
    text: str = ""
    tokens: int = 0
    """Tokens generated, the one that ended it aside."""
    finish_reason: Literal["stop", "length"] | None = None


@dataclass
class Speaker:
    """A model that gives one reply at a time.

    Attributes:
        model: LitGPT's GPT, or Fabric's wrapper of it, in eval mode.
        tokenizer: its tokenizer.
        device: where it is.
        context: the most tokens it attends to.
    """

    model: Any
    tokenizer: "Tokenizer"
    device: torch.device
    context: int
    _known: list[int] = field(default_factory=list)
    """The ids whose keys and values are in the cache."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt, as LitGPT encodes it."""
        return self.tokenizer.encode(text).tolist()

    def pieces(self, reply: Reply, prompt: Sequence[int], wish: Wish) -> Iterator[str]:
        """Yield the reply's text as it comes, and keep `reply` up to date.

        A piece is only text that no later token can change or turn into a stop string; there is
        one for each token, empty where nothing is certain yet, so that who listens may leave.

        Args:
            reply: an empty one.
            prompt: the ids before it, fewer than `context`.
            wish: how to sample.
        """
        stream, given = TextStream(self._decode, prompt), 0
        reason: Literal["stop", "length"] = "length"
        for token in self._tokens(list(prompt), wish):
            if token in wish.stop_ids:
                reason = "stop"
                break
            reply.tokens += 1
            reply.text += stream.push(token)
            if _first(reply.text, wish.stop) is not None:
                break
            sure = max(given, len(reply.text) - _held_back(reply.text, wish.stop))
            yield reply.text[given:sure]
            given = sure
        reply.text += stream.flush()
        if (end := _first(reply.text, wish.stop)) is not None:
            reply.text, reason = reply.text[:end], "stop"
        reply.finish_reason = reason
        if reply.text[given:]:
            yield reply.text[given:]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.processor.decode(ids)

    def _tokens(self, prompt: list[int], wish: Wish) -> Iterator[int]:
        """Yield sampled ids without end conditions other than `max_new_tokens` and the context."""
        from litgpt.generate.base import sample

        if wish.seed is not None:
            torch.manual_seed(wish.seed)
        most = min(wish.max_new_tokens, self.context - len(prompt))
        self._make_room(len(prompt) + most)
        windowed = self.model.config.sliding_window_size is not None  # a ring: what is old is gone
        old = 0 if windowed else min(_shared(self._known, prompt), len(prompt) - 1)
        del self._known[old:]
        logits = None
        for start in range(old, len(prompt), CHUNK):
            logits = self._run(prompt[start : start + CHUNK])
        for count in range(most):
            token = sample(
                logits, temperature=wish.temperature, top_k=wish.top_k, top_p=wish.top_p
            ).item()
            yield token
            if count < most - 1:
                logits = self._run([token])

    @torch.inference_mode()
    def _run(self, ids: list[int]) -> torch.Tensor:
        """Run the model on the ids that follow what it knows; return its logits (1, T, V)."""
        start, end = len(self._known), len(self._known) + len(ids)
        logits = self.model(
            torch.tensor([ids], device=self.device),
            torch.arange(start, end, device=self.device),
            input_pos_maxp1=end,
        )
        self._known += ids
        return logits

    def _make_room(self, tokens: int) -> None:
        """Have a cache for so many tokens: grown in powers of two, forgotten where it grows."""
        cache = self.model.mask_cache
        if cache is not None and cache.shape[-1] >= tokens:
            return
        size = min(self.context, 1 << (tokens - 1).bit_length())
        self._known.clear()
        with torch.inference_mode():
            self.model.clear_kv_cache()
            self.model.max_seq_length = size
            self.model.set_kv_cache(batch_size=1, device=self.device)


def _shared(known: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many ids both begin with."""
    pairs = enumerate(zip(known, prompt, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(known), len(prompt)))


def _first(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first stop string in a text begins."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    return min(found) if found else None


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Return how many of the last letters may be the beginning of a stop string."""
    longest = 0
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:length]):
                longest = length
                break
    return longest


def stop_of(prompt_style: Any, tokenizer: "Tokenizer") -> tuple[frozenset[int], tuple[str, ...]]:
    """Return a prompt style's stop sequences as single tokens, and as strings for longer ones."""
    sequences = [list(ids) for ids in prompt_style.stop_tokens(tokenizer) if None not in ids]
    single = frozenset(ids[0] for ids in sequences if len(ids) == 1)
    longer = (tokenizer.processor.decode(ids) for ids in sequences if len(ids) > 1)
    return single, tuple(text for text in longer if text)
