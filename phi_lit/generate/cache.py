"""Keys and values of many samples, where samples of one prompt share the prompt's.

A sample has a row for its own tokens; a prompt has a slot, kept once however many rows read it. One
`Attention` per layer stands in for LitGPT's KV cache and its attention product, so that everything
around (projections, norms, rotation, latent attention) stays LitGPT's own code. Every row has its
own length; products reach only as far as the longest. Letters: B rows, P prompts, W rows of the
prompt that has most, H query heads, G key heads, R = H / G, T prefix tokens, L own tokens, D head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from litgpt.model import CausalSelfAttention, KVCache, MultiheadLatentAttention, do_softcapping
from torch import Tensor, nn
from torch.nn import functional as F

_TOKENS = 32
"""Room for tokens is made by so many."""


@dataclass
class Prefill:
    """A forward pass over whole prompts, padded on the right."""

    place: Tensor
    """Where each prompt goes: slots of shared prompts, or rows."""
    shared: bool
    """Whether `place` counts slots."""


@dataclass
class Groups:
    """Which rows read which prompt: rows are spread over a (P, W) table and gathered back."""

    cell_B: Tensor
    """Each row's place in the table, P x W long."""
    row_of_cell: Tensor
    """The row in each place (any row where there is none: it is not gathered)."""
    prompts: int
    width: int

    def spread(self, x_BGRX: Tensor) -> Tensor:
        """Turn (B, G, R, X) into (P, G, W x R, X)."""
        _, heads, each, last = x_BGRX.shape
        cells = x_BGRX.index_select(0, self.row_of_cell)
        cells = cells.view(self.prompts, self.width, heads, each, last).transpose(1, 2)
        return cells.reshape(self.prompts, heads, self.width * each, last)

    def gather(self, y_PGWX: Tensor) -> Tensor:
        """Turn (P, G, W x R, X) into (B, G, R, X)."""
        _, heads, rows, last = y_PGWX.shape
        cells = y_PGWX.view(self.prompts, heads, self.width, -1, last).transpose(1, 2)
        return cells.reshape(-1, heads, rows // self.width, last).index_select(0, self.cell_B)


@dataclass
class Decode:
    """A forward pass over the newest token of every row."""

    length_B: Tensor
    """Own tokens of each row before this one."""
    tokens: int
    """L: own tokens of the longest row with this one."""
    groups: Groups | None
    """How rows share prompts; None where every row holds its prompt itself."""
    prefix_tokens: int
    """T: tokens of the longest shared prompt, 0 without any."""
    mask: Tensor | None
    """Added to the scores (B, 1, 1, T + L): -inf where a row has no token. None if all have."""
    window_mask: Tensor | None
    """The same for layers with a sliding window."""


class Cache:
    """What all layers have in common: the pass that is going on."""

    def __init__(self) -> None:
        self.step: Prefill | Decode | None = None
        self.layers: list[Attention] = []

    @torch.inference_mode()
    def move_row(self, source: int, target: int) -> None:
        """Copy a row's keys and values to another row."""
        for layer in self.layers:
            layer.own.move(source, target)

    @torch.inference_mode()
    def move_prompt(self, source: int, target: int) -> None:
        """Copy a prompt's keys and values to another slot."""
        for layer in self.layers:
            layer.prefix.move(source, target)

    def clear(self) -> None:
        """Give the memory back."""
        for layer in self.layers:
            layer.own, layer.prefix = Pair(), Pair()


class Pair:
    """Keys and values (places, G, tokens, D) that grow with what is written."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def make_room(self, places: int, tokens: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Make room for `places` x `tokens` keys and values shaped and typed like k and v."""
        self.k, self.v = _grown(self.k, places, tokens, k), _grown(self.v, places, tokens, v)
        return self.k, self.v

    def read(self, places: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first places and tokens."""
        assert self.k is not None, "nothing was written"
        assert self.v is not None
        return self.k[:places, :, :tokens], self.v[:places, :, :tokens]

    def move(self, source: int, target: int) -> None:
        """Copy one place to another."""
        for held in (self.k, self.v):
            if held is not None:
                held[target].copy_(held[source])


def _grown(held: Tensor | None, places: int, tokens: int, like: Tensor) -> Tensor:
    """Return `held`, or a larger one with the same content if it is too small."""
    old = (0, 0) if held is None else (held.shape[0], held.shape[2])
    wanted = (places, -(-tokens // _TOKENS) * _TOKENS)
    if held is not None and old[0] >= places and old[1] >= tokens:
        return held
    # Half as much again each time, so that growing costs little in all. Zeros, because a weight of
    # zero times whatever was in the memory may be NaN.
    places, tokens = (
        had if n <= had else max(n, had * 3 // 2) for n, had in zip(wanted, old, strict=True)
    )
    grown = like.new_zeros((places, like.shape[1], tokens, like.shape[3]))
    if held is not None:
        grown[: old[0], :, : old[1]] = held
    return grown


class Attention(KVCache):
    """Stands in for one layer's KV cache and for its product of queries, keys and values.

    LitGPT's attention calls `forward` with the new keys and values, then `attend`.
    """

    def __init__(self, attn: CausalSelfAttention | MultiheadLatentAttention, cache: Cache) -> None:
        nn.Module.__init__(self)  # not KVCache's: it would allocate its buffers
        config = attn.config
        latent = isinstance(attn, MultiheadLatentAttention)
        size = config.attention_scores_scalar or (
            config.qk_head_dim if latent else config.head_size
        )
        self.scale = attn.mscale * attn.mscale / math.sqrt(size)
        self.softcap = config.attention_logit_softcapping
        sliding = getattr(attn, "apply_sliding_window_attention", False)
        self.window = config.sliding_window_size if sliding else None
        self.cache = cache
        self.own, self.prefix = Pair(), Pair()
        cache.layers.append(self)

    def forward(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep new keys and values (n, G, tokens, D); return them as they are."""
        step = self.cache.step
        assert step is not None, "a forward pass needs a step"
        tokens = k.shape[2]
        if isinstance(step, Decode):
            own_k, own_v = self.own.make_room(len(k), step.tokens, k, v)
            row_B = torch.arange(len(k), device=k.device)
            own_k[row_B, :, step.length_B] = k[:, :, 0]
            own_v[row_B, :, step.length_B] = v[:, :, 0]
        else:
            pair = self.prefix if step.shared else self.own
            kept_k, kept_v = pair.make_room(int(step.place.max()) + 1, tokens, k, v)
            kept_k[step.place, :, :tokens] = k
            kept_v[step.place, :, :tokens] = v
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend to everything kept; in place of `scaled_dot_product_attention` of LitGPT's layer.

        Args:
            q: queries (n, H, tokens, D).
            k: the new keys, repeated for all heads or (n, 1, tokens, D).
            v: the new values, likewise.
            mask: ignored; the step has its own.

        Returns:
            (n, tokens, H, D).
        """
        step = self.cache.step
        if isinstance(step, Decode):
            return self._decode(q, step).transpose(1, 2)
        return self._prefill(q, k, v).transpose(1, 2)

    def _prefill(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend causally: what pads a prompt on the right is seen by pads only."""
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        tokens = q.shape[2]
        if self.softcap is None and (self.window is None or self.window >= tokens):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
        if self.window is not None:
            seen = seen.triu(1 - self.window)
        if self.softcap is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale)
        score = do_softcapping(q @ k.mT * self.scale, self.softcap)
        return score.masked_fill(~seen, -math.inf).softmax(-1, dtype=torch.float).to(q.dtype) @ v

    def _decode(self, q: Tensor, step: Decode) -> Tensor:
        """Attend to the shared prompt and to own tokens, under one softmax."""
        rows, heads = q.shape[:2]
        k_BGLD, v_BGLD = self.own.read(rows, step.tokens)
        q_BGRD = q.view(rows, k_BGLD.shape[1], -1, q.shape[3])
        score = q_BGRD @ k_BGLD.mT
        shared, T = step.groups, step.prefix_tokens
        if shared is not None:
            k_PGTD, v_PGTD = self.prefix.read(shared.prompts, T)
            prefix_score = shared.gather(shared.spread(q_BGRD) @ k_PGTD.mT)
            score = torch.cat((prefix_score, score), -1)
        score = score * self.scale
        if self.softcap is not None:
            score = do_softcapping(score, self.softcap)
        mask = step.mask if self.window is None else step.window_mask
        if mask is not None:
            score = score + mask
        p = score.softmax(-1, dtype=torch.float).to(q.dtype)
        out = p[..., T:] @ v_BGLD
        if shared is not None:
            out = out + shared.gather(shared.spread(p[..., :T]) @ v_PGTD)
        return out.view(rows, heads, 1, -1)


def group_rows(prompt_of_row: Sequence[int], prompts: int, device: torch.device) -> Groups:
    """Return the table of which row reads which prompt.

    Args:
        prompt_of_row: the slot of each row's prompt.
        prompts: slots in use, all below this number.
        device: where the cache is.
    """
    rows_of: list[list[int]] = [[] for _ in range(prompts)]
    for row, prompt in enumerate(prompt_of_row):
        rows_of[prompt].append(row)
    width = max(map(len, rows_of))
    cell = [0] * len(prompt_of_row)
    row_of_cell = [0] * (prompts * width)
    for prompt, rows in enumerate(rows_of):
        for place, row in enumerate(rows):
            cell[row] = prompt * width + place
            row_of_cell[cell[row]] = row
    cell_B, table = torch.tensor(cell), torch.tensor(row_of_cell)
    return Groups(cell_B.to(device), table.to(device), prompts, width)


def masks(
    own_B: Tensor, prefix_B: Tensor, position_B: Tensor, *, prefix_tokens: int, window: int | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the masks (B, 1, 1, T + L) of a decoding step: of all tokens, and of a window.

    Args:
        own_B: own tokens of each row before this one.
        prefix_B: tokens of its shared prompt, 0 where it has none.
        position_B: its new token's position.
        prefix_tokens: T.
        window: tokens that a layer with a sliding window sees, or None.
    """
    L = int(own_B.max()) + 1
    own_L = torch.arange(L, device=own_B.device)
    prefix_T = torch.arange(prefix_tokens, device=own_B.device)
    there = torch.cat(
        (prefix_T < prefix_B.unsqueeze(1), own_L <= own_B.unsqueeze(1)), 1
    )  # fmt: skip
    mask = None if bool(there.all()) else _additive(there)
    if window is None:
        return mask, None
    first_own_B1 = (position_B - own_B).unsqueeze(1)
    position_BK = torch.cat((prefix_T.expand(len(own_B), -1), first_own_B1 + own_L), 1)
    near = position_BK > position_B.unsqueeze(1) - window
    return mask, _additive(there & near)


def _additive(seen_BK: Tensor) -> Tensor:
    """Turn true into 0 and false into -inf, shaped (B, 1, 1, K) for scores."""
    zeros = torch.zeros(seen_BK.shape, device=seen_BK.device)
    return zeros.masked_fill_(~seen_BK, -math.inf)[:, None, None]
