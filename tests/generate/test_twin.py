"""The cached forward gives LitGPT's own logits, for every kind of attention and MLP it has."""

import pytest
import torch
from litgpt import Config
from small_models import random_gpt

from phi_lit.generate.sampler import Sampler
from phi_lit.generate.sampling import Sampling
from phi_lit.generate.twin import PackedLinear

SMALL = dict(
    n_layer=3, n_embd=64, n_head=4, block_size=64, vocab_size=257, padded_vocab_size=257,
    intermediate_size=96,
)  # fmt: skip
LLAMA = dict(norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", bias=False,
             parallel_residual=False, rotary_percentage=1.0)  # fmt: skip
ARCHITECTURES = {
    "phi-1": dict(
        shared_attention_norm=True, rotary_percentage=0.5, lm_head_bias=True,
        gelu_approximate="tanh",
    ),
    "pythia": dict(rotary_percentage=0.25),
    "llama": LLAMA,
    "grouped queries": dict(LLAMA, n_query_groups=2),
    "one query group": dict(LLAMA, n_query_groups=1),
    "query norms": dict(LLAMA, n_query_groups=2, norm_qk=True),
    "olmo2's norms": dict(
        LLAMA, norm_qk=True, norm_qk_type="olmo2", norm_1=False, norm_2=False,
        post_attention_norm=True, post_mlp_norm=True,
    ),
    "sliding window": dict(LLAMA, sliding_window_size=7, sliding_window_indices=[1, 1, 1]),
    "gemma 2": dict(
        LLAMA, mlp_class_name="GemmaMLP", head_size=32, n_query_groups=2, scale_embeddings=True,
        attention_scores_scalar=20, sliding_window_size=9, sliding_window_indices=[1, 0, 1],
        attention_logit_softcapping=5.0, final_logit_softcapping=30.0, post_attention_norm=True,
        post_mlp_norm=True,
    ),
    "gemma 3": dict(
        LLAMA, mlp_class_name="GemmaMLP", norm_qk=True, sliding_window_size=9,
        sliding_window_indices=[1, 0, 1], rope_local_base_freq=1000, rope_indices=[1, 0, 1],
    ),
    "yarn": dict(LLAMA, rope_adjustments=dict(
        factor=4.0, beta_fast=32, beta_slow=1, original_max_seq_len=16, mscale=1.0,
        mscale_all_dim=1.0,
    )),
    "latent attention": dict(
        LLAMA, latent_attention=dict(
            q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
        ), rope_interleave=True,
    ),
    "mixtral": dict(
        LLAMA, mlp_class_name="LLaMAMoE", n_expert=4, n_expert_per_token=2,
        moe_intermediate_size=48, n_query_groups=2,
    ),
}  # fmt: skip
PROMPTS = ["def f(x):\n    return", "import os", "z", "class A:\n    pass\n" * 2]


class Recording(Sampler):
    """A sampler that keeps the logits of every pass."""

    def logits(self, ids_nT, position_nT):
        out = super().logits(ids_nT, position_nT)
        self.passes.append(out.clone())
        return out


def sample_and_record(gpt, tokenizer, samples, tokens=20, **options):
    """Return every completion, and the logits of each of its tokens (tokens, V)."""
    sampler = Recording(gpt, tokenizer, batch_size=len(PROMPTS) * samples, **options)
    sampler.passes = []
    made = list(
        sampler.sample(
            PROMPTS, samples=samples, max_new_tokens=tokens, sampling=Sampling(1.0),
            ignore_eos=True,
        )
    )  # fmt: skip
    assert len(sampler.passes) == tokens, "one pass over the prompts, then one per token"
    order = sorted(range(len(PROMPTS)), key=lambda i: -len(PROMPTS[i]))
    rows = [(prompt, sample) for prompt in order for sample in range(samples)]
    first = {prompt: sampler.passes[0][i] for i, prompt in enumerate(order)}
    recorded = {
        place: torch.stack([first[place[0]], *(step[row] for step in sampler.passes[1:])])
        for row, place in enumerate(rows)
    }
    return [(c, recorded[c.prompt, c.sample]) for c in made]


def assert_litgpts_logits(gpt, tokenizer, samples, tolerance, **options):
    recorded = sample_and_record(gpt, tokenizer, samples, **options)
    assert len(recorded) == len(PROMPTS) * samples
    for completion, logits in recorded:
        prompt = tokenizer.encode(PROMPTS[completion.prompt]).tolist()
        ids = torch.tensor([prompt + completion.ids[:-1]])
        with torch.inference_mode():
            expected = gpt(ids)[0, len(prompt) - 1 :].float()
        scale = expected.std()
        assert scale > 1, "logits that are all alike prove nothing"
        torch.testing.assert_close(logits / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("samples", [1, 3], ids=["own prompts", "shared prompts"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_logits_are_litgpts(one_thread, tokenizer, architecture, samples):
    config = Config(**{**SMALL, **ARCHITECTURES[architecture]})
    assert_litgpts_logits(random_gpt(config), tokenizer, samples, 2e-5)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("placement", ["instead", "after"])
def test_cached_logits_of_our_experts_are_theirs(one_thread, tokenizer, placement, samples):
    pytest.importorskip("extensions.phi_moe")
    config = Config(
        **SMALL, **ARCHITECTURES["phi-1"], mlp_class_name="PhiMoE", n_expert=4,
        n_expert_per_token=2, moe_intermediate_size=48,
        hf_config=dict(moe=dict(placement=placement, every=1)),
    )  # fmt: skip
    assert_litgpts_logits(random_gpt(config), tokenizer, samples, 2e-5)


def test_without_packed_weights_the_logits_are_the_same(one_thread, tokenizer):
    gpt = random_gpt(Config(**SMALL, **ARCHITECTURES["phi-1"]))
    assert_litgpts_logits(gpt, tokenizer, 2, 2e-5, pack=False)


def test_float64_agrees_to_its_own_precision(one_thread, tokenizer):
    gpt = random_gpt(Config(**SMALL, **ARCHITECTURES["phi-1"])).double()
    gpt.cos, gpt.sin = gpt.cos.double(), gpt.sin.double()
    assert_litgpts_logits(gpt, tokenizer, 2, 2e-6)  # logits are recorded in float32


def test_bfloat16_stays_within_its_rounding(one_thread, tokenizer):
    gpt = random_gpt(Config(**SMALL, **ARCHITECTURES["phi-1"])).bfloat16()
    assert_litgpts_logits(gpt, tokenizer, 2, 0.15)


def test_the_model_itself_is_untouched(one_thread, tokenizer):
    gpt = random_gpt(Config(**SMALL, **ARCHITECTURES["phi-1"]))
    ids = torch.arange(20).unsqueeze(0)
    before, modules = gpt(ids), {name: id(module) for name, module in gpt.named_modules()}
    sampler = Sampler(gpt, tokenizer)
    list(sampler.sample(PROMPTS, samples=2, max_new_tokens=5))
    assert torch.equal(gpt(ids), before)
    assert {name: id(module) for name, module in gpt.named_modules()} == modules
    assert gpt.mask_cache is None
    assert all(block.attn.kv_cache is None for block in gpt.transformer.h)
    packed = [m for m in sampler._twin.modules() if isinstance(m, PackedLinear)]
    assert len(packed) == 3 * 4 + 1


def test_a_prompt_is_computed_once_and_the_head_sees_its_last_position_only(
    one_thread, gpt, tokenizer
):
    sampler = Sampler(gpt, tokenizer, batch_size=5)
    heads, embedded = [], []
    sampler._twin.lm_head.head.register_forward_pre_hook(lambda _, x: heads.append(x[0].shape))
    sampler._twin.transformer.wte.register_forward_pre_hook(lambda _, x: embedded.append(x[0]))
    prompts = ["abcdefgh" * 3, "ijklmnop" * 3, "q"]
    made = list(sampler.sample(prompts, samples=8, max_new_tokens=6))
    assert len(made) == 24
    assert all(shape[1] == 1 for shape in heads)
    several = [ids for ids in embedded if ids.shape[1] > 1]
    assert sum(map(len, several)) == 2, "each long prompt went through the model once"
