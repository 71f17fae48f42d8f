"""The sampler: many prompts, many samples of each, in one batch that stays full.

A prompt is computed once, whatever the number of its samples. When a sample ends, the next one
takes its row at once. What a sample is depends on the model, the settings, the seed and its place
(number of the prompt, number of the sample), not on the batch that it was made in: the noise is
the sample's own (`sampling.py`). What the batch does change is the rounding of matrix products, in
the last bits of the logits; it can turn a choice only where two tokens are that close.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from torch import Tensor

from phi_lit.errors import UserError
from phi_lit.generate.cache import Cache, Decode, Groups, Prefill, group_rows, masks
from phi_lit.generate.request import encode_prompts, setting_faults, special_ids
from phi_lit.generate.room import fitting_rows
from phi_lit.generate.sampling import Sampling, choose, position_keys, sample_key
from phi_lit.generate.text import StopText, TextStream, whole_text
from phi_lit.generate.twin import twin_of
from phi_lit.train.args import raise_together

PREFILL_TOKENS = 2048
"""Prompts are computed together up to so many tokens, padding included."""


@dataclass(frozen=True)
class Completion:
    """One finished sample."""

    prompt: int
    """Number of its prompt, from 0."""
    sample: int
    """Number of the sample of that prompt, from 0."""
    text: str
    """What follows the prompt, without a stop string or the end-of-text token."""
    ids: list[int]
    """All tokens that were made, those of a stop string and the end-of-text token included."""
    finish_reason: str
    """`eos`: the end-of-text token; `stop`: a stop string; `length`: max_new_tokens were made, or
    the context is full."""
    prompt_tokens: int
    """Tokens of the prompt."""


@dataclass(eq=False)
class _Prompt:
    """A prompt in the cache."""

    number: int
    ids: list[int]
    slot: int = -1
    logits_V: Tensor | None = None
    waiting: int = 0
    """Samples that have no row yet."""
    rows: int = 0
    """Samples that have one."""


@dataclass(eq=False)
class _Row:
    """A sample in the batch."""

    prompt: _Prompt
    sample: int
    key: int
    stop: StopText | None
    limit: int
    """Tokens that it may have."""
    ids: list[int] = field(default_factory=list)


class Sampler:
    """Samples from one of LitGPT's models.

    Args:
        model: the model on its device, quantized or not; its weights are taken as they are now, and
            it stays as it is. Its `max_seq_length` is the longest prompt and completion together.
        tokenizer: the model's tokenizer.
        batch_size: most samples at a time; by default as many as pay and fit into memory.
        pack: on a CPU, lay out the weights for faster products: costs a second copy of them, or
            none if the caller gives up `model`.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        batch_size: int | None = None,
        pack: bool = True,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; choose at least 1, or auto")
        model = getattr(model, "module", model)  # what Fabric wraps
        self.config, self.max_seq_length = model.config, model.max_seq_length
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.cache = Cache()
        self.device = model.lm_head.weight.device
        self.dtype = model.transformer.wte.weight.dtype
        self._twin = twin_of(model, self.cache, pack=pack)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        samples: int = 1,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int = 0,
        ignore_eos: bool = False,
        done: Collection[tuple[int, int]] = (),
    ) -> Iterator[Completion]:
        """Return an iterator over completions, each as soon as it is finished, in no fixed order.

        Args:
            prompts: texts to continue, taken as they are.
            samples: completions per prompt.
            max_new_tokens: most tokens of a completion; the context may end it earlier.
            sampling: how tokens are chosen.
            stop: strings that end a completion; they are not part of it, all before them is.
            seed: decides the noise, with the numbers of prompt and sample.
            ignore_eos: go on after the end-of-text token.
            done: (prompt, sample) that are not wanted again.

        Raises:
            UserError: a setting is impossible, or a prompt empty or too long: before any work.
        """
        sampling = sampling or Sampling()
        raise_together(setting_faults(samples, max_new_tokens, sampling, stop))
        encoded = encode_prompts(self.tokenizer, prompts, self.max_seq_length)
        work = _Work(self, encoded, samples, max_new_tokens, sampling, stop, seed, ignore_eos)
        return work.run(frozenset(done))

    def logits(self, ids_nT: Tensor, position_nT: Tensor) -> Tensor:
        """Run the twin in the step that the cache is in; return float logits (n, V)."""
        with torch.inference_mode():
            return self._twin(ids_nT, position_nT)[:, -1].float()

    def prefill_logits(self, ids_nT: Tensor, length_n: Tensor) -> Tensor:
        """Run the twin over right-padded prompts; return the logits after each one's end."""
        self._twin.lm_head.last_n = length_n - 1
        try:
            return self.logits(ids_nT, torch.arange(ids_nT.shape[1], device=self.device))
        finally:
            self._twin.lm_head.last_n = None


class _Work:
    """One call of `Sampler.sample`: what waits, what is in the batch, what is finished."""

    def __init__(
        self,
        sampler: Sampler,
        encoded: list[list[int]],
        samples: int,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[str],
        seed: int,
        ignore_eos: bool,
    ) -> None:
        self.sampler, self.sampling, self.seed = sampler, sampling, seed
        self.encoded, self.samples, self.max_new_tokens = encoded, samples, max_new_tokens
        self.decode = sampler.tokenizer.processor.decode
        eos = sampler.tokenizer.eos_id
        self.eos_ids = set() if ignore_eos or eos is None else {eos}
        self.stop_ids = special_ids(sampler.tokenizer, stop)
        self.stop = tuple(stop)
        self.shared = samples > 1  # else a row holds its prompt itself
        self.rows: list[_Row | None] = []  # None: free, until the next one comes
        self.prompts: list[_Prompt | None] = []
        self.waiting: deque[tuple[_Prompt, int]] = deque()
        self._groups: Groups | None = None  # of the rows as they are, while they stay so

    def run(self, done: frozenset[tuple[int, int]]) -> Iterator[Completion]:
        """Yield completions until none is left."""
        self._line_up(done)
        batch = self._batch_size()
        self.sampler.cache.clear()
        try:
            while self.waiting or self.rows:
                yield from self._fill(batch)
                if self.rows:
                    yield from self._step()
        finally:
            self.sampler.cache.clear()

    def _line_up(self, done: frozenset[tuple[int, int]]) -> None:
        """Queue all samples, long prompts first: neighbours are then of like length."""
        order = sorted(range(len(self.encoded)), key=lambda n: (-len(self.encoded[n]), n))
        for number in order:
            wanted = [s for s in range(self.samples) if (number, s) not in done]
            prompt = _Prompt(number, self.encoded[number], waiting=len(wanted))
            self.waiting.extend((prompt, sample) for sample in wanted)

    def _batch_size(self) -> int:
        longest = max((len(prompt.ids) for prompt, _ in self.waiting), default=1)
        fitting = fitting_rows(
            self.sampler.config,
            self.sampler.dtype,
            self.sampler.device,
            prompt_tokens=longest,
            new_tokens=min(self.max_new_tokens, self.sampler.max_seq_length - longest),
            samples=self.samples,
        )
        wanted = self.sampler.batch_size
        return min(fitting if wanted is None else wanted, max(1, len(self.waiting)))

    # --------------------------------------------------------------------------------- coming in

    def _fill(self, batch: int) -> Iterator[Completion]:
        """Give free rows to waiting samples, with their first token, and close what stays free."""
        while self.waiting and (free := self._free_rows(batch)):
            come = [self.waiting.popleft() for _ in range(min(len(free), len(self.waiting)))]
            for place, (prompt, sample) in zip(free, come, strict=False):
                prompt.waiting -= 1
                prompt.rows += 1
                self._put(place, self._new_row(prompt, sample))
            self._prefill({id(p): p for p, _ in come if p.logits_V is None}.values(), free)
            logits = torch.stack([prompt.logits_V for prompt, _ in come])
            yield from self._choose(logits, free[: len(come)])
        self._close_gaps()

    def _free_rows(self, batch: int) -> list[int]:
        gaps = [place for place, row in enumerate(self.rows) if row is None]
        return gaps + list(range(len(self.rows), batch))

    def _new_row(self, prompt: _Prompt, sample: int) -> _Row:
        stop = StopText(TextStream(self.decode, prompt.ids), self.stop) if self.stop else None
        room = self.sampler.max_seq_length - len(prompt.ids)
        key = sample_key(self.seed, prompt.number, sample)
        return _Row(prompt, sample, key, stop, min(self.max_new_tokens, room))

    def _put(self, place: int, row: _Row) -> None:
        if place == len(self.rows):
            self.rows.append(row)
        else:
            self.rows[place] = row
        self._groups = None

    def _prefill(self, prompts: Collection[_Prompt], free: list[int]) -> None:
        """Compute new prompts, some at a time, into slots or into their rows."""
        rows = {id(row.prompt): place for place, row in enumerate(self.rows) if row is not None}
        for prompt in prompts:
            prompt.slot = self._free_slot(prompt) if self.shared else rows[id(prompt)]
        together: list[_Prompt] = []
        for prompt in prompts:
            if together and (len(together) + 1) * len(together[0].ids) > PREFILL_TOKENS:
                self._prefill_together(together)
                together = []
            together.append(prompt)
        if together:
            self._prefill_together(together)

    def _free_slot(self, prompt: _Prompt) -> int:
        if None not in self.prompts:
            self.prompts.append(None)
        slot = self.prompts.index(None)
        self.prompts[slot] = prompt
        return slot

    def _prefill_together(self, prompts: list[_Prompt]) -> None:
        device = self.sampler.device
        length = torch.tensor([len(prompt.ids) for prompt in prompts])
        ids = torch.zeros(len(prompts), int(length.max()), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt.ids)] = torch.tensor(prompt.ids)
        place = torch.tensor([prompt.slot for prompt in prompts], device=device)
        self.sampler.cache.step = Prefill(place, self.shared)
        logits = self.sampler.prefill_logits(ids.to(device), length.to(device))
        for prompt, logits_V in zip(prompts, logits, strict=True):
            prompt.logits_V = logits_V

    def _close_gaps(self) -> None:
        """Move the last rows, and the last prompts, into gaps that nothing will fill."""
        if None not in self.rows and None not in self.prompts:
            return
        _close(self.rows, self.sampler.cache.move_row)
        _close(self.prompts, self.sampler.cache.move_prompt)
        for slot, prompt in enumerate(self.prompts):
            assert prompt is not None
            prompt.slot = slot
        self._groups = None

    # ------------------------------------------------------------------------------- one token on

    def _step(self) -> Iterator[Completion]:
        """Feed every row its newest token and choose the next."""
        rows = [row for row in self.rows if row is not None]
        prompt_tokens = torch.tensor([len(row.prompt.ids) for row in rows])
        made = torch.tensor([len(row.ids) - 1 for row in rows])  # the newest is not in the cache
        position = prompt_tokens + made
        own, prefix = (made, prompt_tokens) if self.shared else (position, made * 0)
        T = int(prefix.max())
        if self.shared and self._groups is None:
            slots = [row.prompt.slot for row in rows]
            self._groups = group_rows(slots, len(self.prompts), self.sampler.device)
        mask, window_mask = masks(
            own, prefix, position, prefix_tokens=T, window=self.sampler.config.sliding_window_size
        )
        device = self.sampler.device
        self.sampler.cache.step = Decode(
            own.to(device),
            int(own.max()) + 1,
            self._groups,
            T,
            mask if mask is None else mask.to(device),
            window_mask if window_mask is None else window_mask.to(device),
        )
        newest = torch.tensor([[row.ids[-1]] for row in rows], device=device)
        logits = self.sampler.logits(newest, position.unsqueeze(1).to(device))
        yield from self._choose(logits, range(len(rows)))

    def _choose(self, logits_BV: Tensor, places: Sequence[int]) -> Iterator[Completion]:
        """Choose a token for some rows; yield those that it ends."""
        rows = [row for place in places if (row := self.rows[place]) is not None]
        keys = position_keys([row.key for row in rows], [len(row.ids) for row in rows])
        with torch.inference_mode():
            tokens = choose(logits_BV, self.sampling, keys).tolist()
        for place, row, token in zip(places, rows, tokens, strict=True):
            row.ids.append(token)
            reason = self._reason_to_end(row, token)
            if reason:
                self._leave(place, row)
                yield self._completion(row, reason)

    def _reason_to_end(self, row: _Row, token: int) -> str | None:
        if token in self.eos_ids:
            return "eos"
        if token in self.stop_ids or (row.stop is not None and row.stop.push(token)):
            return "stop"
        if len(row.ids) < row.limit:
            return None
        return "stop" if row.stop is not None and row.stop.flush() else "length"

    def _leave(self, place: int, row: _Row) -> None:
        self.rows[place] = None
        self._groups = None
        row.prompt.rows -= 1
        if not row.prompt.rows and not row.prompt.waiting:
            row.prompt.logits_V = None
            if self.shared:
                self.prompts[row.prompt.slot] = None

    def _completion(self, row: _Row, reason: str) -> Completion:
        ids = row.ids[:-1] if row.ids[-1] in self.eos_ids | self.stop_ids else row.ids
        if row.stop is None:
            text = whole_text(self.decode, row.prompt.ids, ids)
        else:
            if reason == "eos" or row.ids[-1] in self.stop_ids:
                row.stop.flush()
            text = row.stop.text
        return Completion(row.prompt.number, row.sample, text, row.ids, reason, len(row.prompt.ids))


def _close(held: list[Any], move: Callable[[int, int], None]) -> None:
    """Close the gaps (None) of a list from its end, and `move` what belongs to the entries."""
    while None in held:
        if held[-1] is not None:
            gap = held.index(None)
            move(len(held) - 1, gap)
            held[gap] = held[-1]
        held.pop()
