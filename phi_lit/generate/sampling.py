"""From logits to the next token: temperature, top-k, top-p, and noise that belongs to the sample.

The noise is counted, not drawn: it is a pure function of (seed, prompt, sample, position, token),
so a sample is the same alone, in a batch, and after a resume. The choice is Gumbel's trick (the
argmax of logits plus noise), which a rounding error of the logits hardly ever moves. Letters: B
rows, V vocabulary, K candidates, N blocks of the vocabulary.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from phi_lit.scramble import MASK, mix, mix_array

_BLOCK = 128
"""Tokens of one block: the whole vocabulary is sampled as a block first, then a token in it."""

_FEW = 1024
"""Up to so many candidates are handled by themselves; more are a mask over the vocabulary."""

_NUCLEUS = 256
"""So many of the likeliest tokens are tried as the top-p set before the vocabulary is sorted."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; top-k, then temperature, then top-p, as in LitGPT."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token (greedy)."""
    top_k: int | None = None
    """Only the k likeliest tokens."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    filter_thres: float | None = None
    """Share of the vocabulary that is cut away, as in the Agora's wrappers: top-k in other words,
    with k = ceil((1 - filter_thres) x vocabulary)."""

    def faults(self) -> list[str]:
        """Return what is impossible in these settings, a sentence each."""
        found = []
        if not (0 <= self.temperature < math.inf):
            found.append(f"temperature is {self.temperature}; choose 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k is {self.top_k}; choose at least 1, or leave it out")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p is {self.top_p}; choose above 0 and up to 1 (all tokens)")
        if self.filter_thres is not None and not 0 <= self.filter_thres < 1:
            found.append(f"filter_thres is {self.filter_thres}; choose from 0 (all) to below 1")
        if self.filter_thres is not None and self.top_k is not None:
            found.append("top_k and filter_thres are two words for one thing; choose one")
        return found

    def kept(self, vocabulary: int) -> int:
        """Return how many of the likeliest tokens stay after top-k or filter_thres."""
        if self.filter_thres is not None:
            # Rounded first: in floating point 0.3 x 10 is a little more than 3.
            return max(1, math.ceil(round((1 - self.filter_thres) * vocabulary, 6)))
        return vocabulary if self.top_k is None else min(self.top_k, vocabulary)


def sample_key(seed: int, prompt: int, sample: int) -> int:
    """Return the 64 bits that all noise of one sample follows from."""
    return mix((mix((mix(seed & MASK) + prompt) & MASK) + sample) & MASK)


def position_keys(key_B: list[int], position_B: list[int]) -> np.ndarray:
    """Return the 64 bits (B,) of each row's next token; positions count from the completion."""
    return mix_array(np.array(key_B, dtype=np.uint64) + np.array(position_B, dtype=np.uint64))


def gumbel(key_B: np.ndarray, token_BK: np.ndarray) -> np.ndarray:
    """Return standard Gumbel noise (B, K), float64: a pure function of a row's key and a token."""
    bits = mix_array(key_B[:, None] + token_BK.astype(np.uint64))
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def choose(logits_BV: Tensor, sampling: Sampling, key_B: np.ndarray) -> Tensor:
    """Choose each row's next token.

    Args:
        logits_BV: logits in any floating type; the choice is made in float32.
        sampling: the settings, the same for all rows.
        key_B: each row's `position_keys`.

    Returns:
        Token ids (B,), int64, on the logits' device. Rows do not influence each other.
    """
    logits_BV = logits_BV.float()
    if sampling.temperature == 0:
        return argmax(logits_BV)
    vocabulary = logits_BV.shape[1]
    kept = sampling.kept(vocabulary)
    if kept <= _FEW and kept < vocabulary:
        logit_BK, token_BK = largest(logits_BV, kept)
        logit_BK = logit_BK / sampling.temperature
        if sampling.top_p < 1:
            logit_BK = _cut_tail(logit_BK, logit_BK.softmax(-1), sampling.top_p)
        return _choose_among(logit_BK, token_BK, key_B)
    if kept < vocabulary:
        logit_BK, token_BK = logits_BV.topk(kept, sorted=False)
        logits_BV = torch.full_like(logits_BV, -math.inf).scatter_(1, token_BK, logit_BK)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_p < 1:
        return _choose_in_nucleus(logits_BV, sampling.top_p, key_B)
    return _choose_in_blocks(logits_BV, logits_BV.softmax(-1), key_B)


def argmax(logits_BV: Tensor) -> Tensor:
    """Return each row's likeliest token, the first of equals (B,): `argmax` at a fifth its time."""
    block_BNb = _blocks(logits_BV)
    block_B1 = block_BNb.amax(-1).argmax(-1, keepdim=True)
    return _one_block(block_BNb, block_B1).argmax(-1) + block_B1.squeeze(1) * block_BNb.shape[2]


def largest(logits_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest logits, from the largest on, and their tokens, (B, k) each.

    They lie in the k blocks with the largest maxima, so only those are searched.
    """
    vocabulary = logits_BV.shape[1]
    size = 1 << max(0, int(math.log2(vocabulary / k) / 2))
    if size < 4 or vocabulary % size:
        return logits_BV.topk(k)
    block_BNb = logits_BV.view(len(logits_BV), -1, size)
    block_Bk = block_BNb.amax(-1).topk(k, sorted=False).indices
    candidate = block_BNb.gather(1, block_Bk.unsqueeze(-1).expand(-1, -1, size)).flatten(1)
    logit_Bk, place_Bk = candidate.topk(k)
    return logit_Bk, block_Bk.gather(1, place_Bk // size) * size + place_Bk % size


def _blocks(x_BV: Tensor) -> Tensor:
    """View (B, V) as (B, N, `_BLOCK`), with -inf after the vocabulary's end where needed."""
    spare = -x_BV.shape[1] % _BLOCK
    if spare:
        x_BV = torch.nn.functional.pad(x_BV, (0, spare), value=-math.inf)
    return x_BV.view(len(x_BV), -1, _BLOCK)


def _one_block(x_BNb: Tensor, block_B1: Tensor) -> Tensor:
    """Take one block of each row: (B, `_BLOCK`)."""
    index = block_B1.unsqueeze(-1).expand(-1, -1, x_BNb.shape[2])
    return x_BNb.gather(1, index).squeeze(1)


def _cut_tail(logit_BK: Tensor, p_BK: Tensor, top_p: float) -> Tensor:
    """Set to -inf what the likelier ones already reach `top_p` without; sorted from the largest."""
    before_BK = p_BK.cumsum(-1) - p_BK
    cut = before_BK >= top_p
    cut[:, 0] = False  # the likeliest always stays, however small top_p
    return logit_BK.masked_fill(cut, -math.inf)


def _choose_among(logit_BK: Tensor, token_BK: Tensor, key_B: np.ndarray) -> Tensor:
    """Choose one of a few candidates; the noise goes with the token, not with its rank."""
    noise = torch.from_numpy(gumbel(key_B, token_BK.cpu().numpy())).to(logit_BK.device)
    best_B1 = (logit_BK.double() + noise).argmax(-1, keepdim=True)
    return token_BK.gather(1, best_B1).squeeze(1)


def _choose_in_blocks(logits_BV: Tensor, p_BV: Tensor, key_B: np.ndarray) -> Tensor:
    """Choose from the whole vocabulary: a block by its probability, then a token inside it.

    The same distribution as noise on every token, for N + `_BLOCK` random numbers instead of V.
    """
    vocabulary = logits_BV.shape[1]
    mass_BN = torch.nn.functional.pad(p_BV, (0, -vocabulary % _BLOCK)).view(len(p_BV), -1, _BLOCK)
    mass_BN = mass_BN.sum(-1)
    # The blocks' noise is counted on from the vocabulary's end: no token has it.
    number_BN = torch.arange(mass_BN.shape[1]).expand(mass_BN.shape)
    block_B = _choose_among(mass_BN.log(), number_BN.to(mass_BN.device), _after(key_B, vocabulary))
    logit_Bb = _one_block(_blocks(logits_BV), block_B.unsqueeze(1))
    token_Bb = block_B.unsqueeze(1) * _BLOCK + torch.arange(_BLOCK, device=block_B.device)
    return _choose_among(logit_Bb, token_Bb, key_B)


def _after(key_B: np.ndarray, vocabulary: int) -> np.ndarray:
    return key_B + np.uint64(-(-vocabulary // _BLOCK) * _BLOCK)


def _choose_in_nucleus(logits_BV: Tensor, top_p: float, key_B: np.ndarray) -> Tensor:
    """Choose among the likeliest tokens that together reach `top_p`.

    A trained model's are a few dozen; rows where `_NUCLEUS` do not suffice are sorted whole.
    """
    p_BV = logits_BV.softmax(-1)
    few = min(_NUCLEUS, logits_BV.shape[1])
    p_BK, token_BK = largest(p_BV, few)
    logit_BK = _cut_tail(logits_BV.gather(1, token_BK), p_BK, top_p)
    chosen_B = _choose_among(logit_BK, token_BK, key_B)
    wide = torch.nonzero(p_BK.sum(-1) < top_p).squeeze(1)
    if len(wide) and few < logits_BV.shape[1]:
        logit_WV, token_WV = logits_BV[wide].sort(-1, descending=True)
        logit_WV = _cut_tail(logit_WV, logit_WV.softmax(-1), top_p)
        cut_WV = torch.empty_like(logit_WV).scatter_(1, token_WV, logit_WV)
        chosen_B[wide] = _choose_in_blocks(cut_WV, cut_WV.softmax(-1), key_B[wide.cpu().numpy()])
    return chosen_B
