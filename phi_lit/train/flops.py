"""Floating-point operations per token, under two named conventions, and the MFU that follows.

Both count a multiply and an add as two operations, forward plus backward as three times forward,
and nothing for recomputation. `6n` is 6 x parameters (embedding tables included, as the phi-1
figures are usually quoted); `6n_12ldt` adds the attention scores, 12 x layers x width x sequence
length, not halved for the causal mask: that is the convention of PaLM (arXiv 2204.02311, appendix
B). An MFU without its convention means nothing: the names here carry it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from litgpt.config import Config

Convention = Literal["6n", "6n_12ldt"]
"""How FLOPs per token were counted; see the module's docstring."""


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has (numbers, not bytes)."""

    total: int
    """All of them, tied ones once."""
    active: int
    """Those that one token visits: of the routed experts only `n_expert_per_token` count."""
    block: int
    """Those of the largest transformer block: what a sharded run gathers at a time."""
    largest: int
    """Those of the largest single tensor."""
    outside: int
    """Those outside the blocks: embedding, final norm and head."""


def count_parameters(config: "Config", *, tie_embeddings: bool = False) -> ParameterCount:
    """Count the parameters of `GPT(config)` by building it without memory (on the meta device).

    Args:
        config: any LitGPT model; routed experts are recognised as parameters under `experts`.
        tie_embeddings: the head's weight is the embedding's.
    """
    key = tuple(sorted((name, repr(value)) for name, value in vars(config).items()))
    return _count(_Hashed(config, key), tie_embeddings)


class _Hashed:
    """A config with equality by content, so that counting it twice costs once."""

    def __init__(self, config: "Config", key: tuple[tuple[str, str], ...]) -> None:
        self.config, self.key = config, key

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.key == other.key


@lru_cache(maxsize=64)
def _count(hashed: _Hashed, tie_embeddings: bool) -> ParameterCount:
    import torch
    from litgpt.model import GPT

    config = hashed.config
    with torch.device("meta"):
        model = GPT(config)
    if tie_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = routed * (1 - config.n_expert_per_token / config.n_expert) if config.n_expert else 0
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.transformer.h]
    total = sum(sizes.values())
    return ParameterCount(
        total=total,
        active=total - round(idle),
        block=max(blocks, default=0),
        largest=max(sizes.values()),
        outside=total - sum(blocks),
    )


def flops_per_token_6n(config: "Config", *, tie_embeddings: bool = False) -> float:
    """Training FLOPs per token as 6 x active parameters (phi-1: 8.51e9)."""
    return 6.0 * count_parameters(config, tie_embeddings=tie_embeddings).active


def flops_per_token_6n_12ldt(
    config: "Config", seq_length: int | None = None, *, tie_embeddings: bool = False
) -> float:
    """Training FLOPs per token as 6N + 12LdT, PaLM's convention (phi-1 at 2,048: 9.72e9).

    Args:
        config: any LitGPT model. d is heads x head size, whatever the number of key/value heads:
            the query heads set the cost of the scores. Layers with a sliding window attend to the
            window.
        seq_length: T; the model's block size where not given.
        tie_embeddings: the head's weight is the embedding's.
    """
    length = config.block_size if seq_length is None else seq_length
    assert config.head_size is not None
    width = config.n_head * config.head_size
    attended = sum(_attended(config, layer, length) for layer in range(config.n_layer))
    return flops_per_token_6n(config, tie_embeddings=tie_embeddings) + 12.0 * width * attended


def _attended(config: "Config", layer: int, length: int) -> int:
    """Keys that a query of this layer is counted against."""
    if config.sliding_window_size is None or config.sliding_window_indices is None:
        return length
    return (
        min(length, config.sliding_window_size) if config.sliding_window_indices[layer] else length
    )


def flops_per_token(
    config: "Config",
    seq_length: int | None = None,
    *,
    convention: Convention = "6n_12ldt",
    tie_embeddings: bool = False,
) -> float:
    """Training FLOPs per token under the convention named."""
    if convention == "6n":
        return flops_per_token_6n(config, tie_embeddings=tie_embeddings)
    return flops_per_token_6n_12ldt(config, seq_length, tie_embeddings=tie_embeddings)


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0 to 1, under the convention that `flops_per_token` was counted by.

    Args:
        tokens_per_second: of one device.
        flops_per_token: training FLOPs for one token.
        peak_flops: dense peak of one device, in FLOP/s.
    """
    return tokens_per_second * flops_per_token / peak_flops
