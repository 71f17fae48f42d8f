"""The models, each as its difference from another, in the words of `litgpt.config.Config`.

Names begin with "phi" and not with "phi-3" or "phi-4", because LitGPT chooses the weight map of its
converters by the name. Shapes are those of "Textbooks Are All You Need" (arXiv 2306.11644,
section 2.3) and of the released phi-1; the twins keep their rules (heads of 64 or 32, half of each
rotated) at sizes that a CPU trains.
"""

from typing import Any

CODEGEN_VOCABULARY = 50_295
"""Ids of the codegen tokenizer: GPT-2's 50,257, 30 runs of spaces and 8 runs of tabs."""

PHI_1: dict[str, Any] = dict(
    name="phi-1",
    hf_config=dict(org="microsoft", name="phi-1"),
    block_size=2048,
    vocab_size=CODEGEN_VOCABULARY,
    padded_vocab_size=51_200,
    n_layer=24,
    n_embd=2048,
    n_head=32,  # heads of 64
    rotary_percentage=0.5,  # half of each head rotated: 32
    parallel_residual=True,
    shared_attention_norm=True,  # one norm per block feeds attention and MLP
    norm_eps=1e-5,
    bias=True,
    lm_head_bias=True,
    mlp_class_name="GptNeoxMLP",  # inner width 4 * n_embd
    gelu_approximate="tanh",
)


def _variant(base: dict[str, Any], name: str, **difference: Any) -> dict[str, Any]:
    return dict(base, name=name, hf_config=dict(org="phi-lit", name=name), **difference)


PHI_1_SMALL = _variant(PHI_1, "phi1-small", n_layer=20, n_embd=1024, n_head=16)

PHI_1_NANO = _variant(
    PHI_1,
    "phi1-nano",
    block_size=512,
    vocab_size=4096,  # the head over 51,200 would be most of a small model's arithmetic
    padded_vocab_size=4096,
    n_layer=6,
    n_embd=256,
    n_head=8,  # heads of 32, 16 rotated
)

PHI_1_NANO_CODEGEN = _variant(
    PHI_1_NANO, "phi1-nano-codegen", vocab_size=CODEGEN_VOCABULARY, padded_vocab_size=51_200
)

PHI_1_TEST = _variant(
    PHI_1_NANO,
    "phi1-test",
    block_size=64,
    vocab_size=512,
    padded_vocab_size=512,
    n_layer=2,
    n_embd=64,
    n_head=2,
)

PHI_2 = _variant(PHI_1, "phi-2", n_layer=32, n_embd=2560, rotary_percentage=0.4, vocab_size=50_257)
"""LitGPT's own phi-2; it stands here to be varied, and is not registered again."""


def _with_experts(
    base: dict[str, Any], name: str, *, experts: int = 8, kept: int = 2, **moe: Any
) -> dict[str, Any]:
    """Give a model experts of which the kept ones are together as wide as its MLP (4 n_embd).

    Instead of the MLP they so cost a token what the MLP did, but for the router.
    """
    return dict(
        base,
        name=name,
        hf_config=dict(org="phi-lit", name=name, moe=moe),
        mlp_class_name="PhiMoE",
        n_expert=experts,
        n_expert_per_token=kept,
        moe_intermediate_size=4 * base["n_embd"] // kept,
    )


PHI_1_MOE = _with_experts(PHI_1, "phi1-moe", placement="instead")
PHI_1_SMALL_MOE = _with_experts(PHI_1_SMALL, "phi1-small-moe", placement="instead")
PHI_2_MOE = _with_experts(PHI_2, "phi2-moe", placement="after")
PHI_1_NANO_MOE = _with_experts(PHI_1_NANO, "phi1-nano-moe", placement="instead")
PHI_1_NANO_MOE_AFTER = _with_experts(PHI_1_NANO, "phi1-nano-moe-after", placement="after")
PHI_1_TEST_MOE = _with_experts(PHI_1_TEST, "phi1-test-moe", experts=4, placement="instead")
PHI_1_TEST_MOE_AFTER = _with_experts(
    PHI_1_TEST, "phi1-test-moe-after", experts=4, placement="after"
)

WITH_EXPERTS = [
    PHI_1_MOE, PHI_1_SMALL_MOE, PHI_2_MOE, PHI_1_NANO_MOE, PHI_1_NANO_MOE_AFTER, PHI_1_TEST_MOE,
    PHI_1_TEST_MOE_AFTER,
]  # fmt: skip
"""The models whose MLP class is `extensions/phi_moe`'s."""

CONFIGS = [PHI_1, PHI_1_SMALL, PHI_1_NANO, PHI_1_NANO_CODEGEN, PHI_1_TEST, *WITH_EXPERTS]
"""Keyword arguments of `litgpt.config.Config`, in the order in which a list shows them."""

MODELS: dict[str, dict[str, Any]] = {config["name"]: config for config in CONFIGS}
"""The same, by name."""

VOCABULARY: dict[str, int] = {
    name: config["vocab_size"]
    for name, config in MODELS.items()
    if config["vocab_size"] == CODEGEN_VOCABULARY
}
"""The models whose name promises the codegen tokenizer, with its number of ids; the others take any
tokenizer that fits into their padded vocabulary."""
