"""The sampler's promises: LitGPT's and transformers' greedy text, and samples that owe nothing to
the batch they were made in."""

import pytest
import torch
from litgpt import Config
from litgpt.generate.base import generate
from small_models import random_gpt

from phi_lit.errors import UserError
from phi_lit.generate.sampler import Sampler
from phi_lit.generate.sampling import Sampling

GREEDY = Sampling(temperature=0)
PROMPTS = [
    "def f(x):\n",
    "import os, sys\nimport re",
    "a",
    "class A:\n    pass\n\n\nclass B(A):",
    "xy",
]
SAMPLINGS = [Sampling(1.0), Sampling(0.8, top_k=20), Sampling(1.0, top_p=0.9), GREEDY]


def by_place(completions):
    found = {(c.prompt, c.sample): c for c in completions}
    return dict(sorted(found.items()))


def one_at_a_time(gpt, tokenizer, prompt, tokens, eos_id=None):
    """What LitGPT's own generate continues a prompt with, greedily."""
    ids = tokenizer.encode(prompt)
    gpt.set_kv_cache(1)
    try:
        return generate(
            gpt, ids, min(len(ids) + tokens, gpt.max_seq_length), temperature=0.0, eos_id=eos_id,
            include_prompt=False,
        ).tolist()  # fmt: skip
    finally:
        gpt.clear_kv_cache()


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_greedy_is_litgpts_one_at_a_time(gpt, tokenizer, samples, batch_size):
    sampler = Sampler(gpt, tokenizer, batch_size=batch_size)
    made = by_place(sampler.sample(PROMPTS, samples=samples, max_new_tokens=40, sampling=GREEDY))
    assert len(made) == len(PROMPTS) * samples
    for (prompt, _), completion in made.items():
        eos = tokenizer.eos_id
        assert completion.ids == one_at_a_time(gpt, tokenizer, PROMPTS[prompt], 40, eos)


def test_greedy_is_transformers(one_thread, tokenizer):
    transformers = pytest.importorskip("transformers")
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_phi

    config = Config.from_name("phi1-test", padded_vocab_size=512, block_size=128)
    gpt = random_gpt(config)
    theirs = transformers.PhiForCausalLM(
        transformers.PhiConfig(
            vocab_size=512, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=256, max_position_embeddings=128, partial_rotary_factor=0.5,
            rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5),
            hidden_act="gelu_new", attn_implementation="eager", bos_token_id=None,
            eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    weights = {}
    copy_weights_phi(config, weights, gpt.state_dict())
    theirs.load_state_dict(weights, strict=False)
    made = by_place(
        Sampler(gpt, tokenizer).sample(
            PROMPTS, samples=2, max_new_tokens=50, sampling=GREEDY, ignore_eos=True
        )
    )
    for (prompt, _), completion in made.items():
        ids = tokenizer.encode(PROMPTS[prompt]).long().unsqueeze(0)
        whole = theirs.generate(ids, max_new_tokens=50, do_sample=False)[0].tolist()
        assert completion.ids == whole[ids.shape[1] :]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_samples_owe_nothing_to_their_batch(gpt, tokenizer, sampling):
    """In float32, on these models, to the token: alone, in any batch, gone on with."""
    options = dict(samples=4, max_new_tokens=20, sampling=sampling, stop=["\n", "ab"], seed=3)
    whole = by_place(Sampler(gpt, tokenizer, batch_size=64).sample(PROMPTS, **options))
    assert len(whole) == 20
    for batch_size in (1, 3, 7):
        made = Sampler(gpt, tokenizer, batch_size=batch_size).sample(PROMPTS, **options)
        assert by_place(made) == whole
    done = [(0, 3), (1, 0), (1, 1), *((4, sample) for sample in range(4))]
    rest = by_place(Sampler(gpt, tokenizer, batch_size=4).sample(PROMPTS, **options, done=done))
    assert rest == {place: c for place, c in whole.items() if place not in done}


def test_each_sample_has_noise_of_its_own_and_the_seed_decides_it(gpt, tokenizer):
    sampler = Sampler(gpt, tokenizer)
    options = dict(samples=6, max_new_tokens=30, sampling=Sampling(1.0))
    first = by_place(sampler.sample(["a", "a"], **options))
    assert len({tuple(c.ids) for c in first.values()}) == 12
    assert by_place(sampler.sample(["a", "a"], **options)) == first
    other = by_place(sampler.sample(["a", "a"], **options, seed=1))
    assert not {tuple(c.ids) for c in first.values()} & {tuple(c.ids) for c in other.values()}
    fewer = by_place(sampler.sample(["a", "a"], **{**options, "samples": 1}))
    assert all(first[place].ids == c.ids for place, c in fewer.items())


def test_samples_follow_the_models_distribution(gpt, tokenizer):
    prompt, samples = "def f", 4000
    made = Sampler(gpt, tokenizer).sample(
        [prompt], samples=samples, max_new_tokens=2, sampling=Sampling(1.0), ignore_eos=True
    )
    pairs = [c.ids for c in made]
    ids = tokenizer.encode(prompt).long()
    with torch.inference_mode():
        p_first = gpt(ids[None])[0, -1].softmax(-1)
        likeliest = int(p_first.argmax())
        p_second = gpt(torch.cat((ids, torch.tensor([likeliest])))[None])[0, -1].softmax(-1)
    seconds = [second for first, second in pairs if first == likeliest]
    for p, chosen in ((p_first, [first for first, _ in pairs]), (p_second, seconds)):
        assert len(chosen) > 100
        counts = torch.bincount(torch.tensor(chosen), minlength=len(p)).double()
        expected = p.double() * len(chosen)
        many = expected >= 5
        chi = ((counts - expected) ** 2 / expected)[many].sum()
        assert chi < many.sum() + 5 * (2 * many.sum()) ** 0.5


def test_finished_rows_are_refilled_at_once(gpt, tokenizer):
    """Passes through the model: as many as the tokens need, the batch full until the tail."""
    sampler = Sampler(gpt, tokenizer, batch_size=8)
    sizes = []
    sampler._twin.transformer.wte.register_forward_pre_hook(
        lambda _, x: sizes.append(len(x[0])) if x[0].shape[1] == 1 else None
    )
    prompts = ["ab", "cd", "ef"]
    made = list(
        sampler.sample(prompts, samples=20, max_new_tokens=60, sampling=Sampling(1.0), stop=["e"])
    )
    lengths = [len(c.ids) for c in made]
    assert len(made) == 60
    assert max(lengths) > 3 * min(lengths), "lengths differ, or nothing is shown"
    assert sum(sizes) == sum(length - 1 for length in lengths), "no row was computed in vain"
    assert max(sizes) == 8
    assert sizes.count(8) >= len(sizes) - 60, "only the tail runs with free rows"


@pytest.mark.parametrize("samples", [1, 4])
def test_text_ends_before_a_stop_string_and_tokens_after_it(gpt, tokenizer, samples):
    sampler = Sampler(gpt, tokenizer)
    options = dict(samples=samples, max_new_tokens=60, sampling=Sampling(1.0))
    free = by_place(sampler.sample(PROMPTS, **options, ignore_eos=True))
    text = free[1, 0].text
    stop = text[5:7]
    stopped = by_place(sampler.sample(PROMPTS, **options, ignore_eos=True, stop=[stop]))
    for place, completion in stopped.items():
        whole = free[place]
        assert completion.ids == whole.ids[: len(completion.ids)]
        if completion.finish_reason == "stop":
            assert completion.text == whole.text[: whole.text.index(stop)]
        else:
            assert stop not in whole.text
            assert completion == whole
    assert stopped[1, 0].finish_reason == "stop"


def test_a_special_token_may_be_a_stop_string(gpt, tokenizer):
    options = dict(samples=4, max_new_tokens=100, sampling=Sampling(1.0), ignore_eos=True)
    made = list(Sampler(gpt, tokenizer).sample(PROMPTS, **options, stop=["<|endoftext|>"]))
    stopped = [c for c in made if c.finish_reason == "stop"]
    assert stopped
    for completion in made:
        assert (tokenizer.eos_id in completion.ids) == (completion.finish_reason == "stop")
        assert "endoftext" not in completion.text


def test_the_end_of_text_token_ends_a_completion_unless_it_is_ignored(gpt, tokenizer):
    options = dict(samples=6, max_new_tokens=100, sampling=Sampling(1.0))
    made = by_place(Sampler(gpt, tokenizer).sample(PROMPTS, **options))
    free = by_place(Sampler(gpt, tokenizer).sample(PROMPTS, **options, ignore_eos=True))
    assert {c.finish_reason for c in made.values()} == {"eos", "length"}
    for place, completion in made.items():
        ended = completion.finish_reason == "eos"
        assert (completion.ids[-1] == tokenizer.eos_id) == ended
        assert completion.ids == free[place].ids[: len(completion.ids)]
        assert tokenizer.eos_id not in completion.ids[:-1]


@pytest.mark.parametrize("samples", [1, 2])
def test_a_completion_that_reaches_the_contexts_end_is_cut_there(gpt, tokenizer, samples):
    prompts = ["x" * 127, "y" * 120, "short"]
    made = by_place(
        Sampler(gpt, tokenizer).sample(
            prompts, samples=samples, max_new_tokens=50, sampling=GREEDY, ignore_eos=True
        )
    )
    assert [len(made[i, 0].ids) for i in range(3)] == [1, 8, 50]
    assert {c.finish_reason for c in made.values()} == {"length"}
    for i, prompt in enumerate(prompts):
        assert made[i, 0].ids == one_at_a_time(gpt, tokenizer, prompt, 50)


def test_a_shorter_max_seq_length_of_the_model_is_its_context(gpt, tokenizer):
    gpt.max_seq_length = 20
    (made,) = Sampler(gpt, tokenizer).sample(["x" * 15], sampling=GREEDY, ignore_eos=True)
    assert len(made.ids) == 5
    with pytest.raises(UserError, match=r"prompt 0 has 20 tokens; .* holds 20"):
        Sampler(gpt, tokenizer).sample(["x" * 20])


def test_what_is_wrong_is_told_at_once_before_any_work(gpt, tokenizer):
    sampler = Sampler(gpt, tokenizer)
    sampler._twin = None  # no pass could run
    with pytest.raises(UserError) as caught:
        sampler.sample(["a"], samples=0, max_new_tokens=0, sampling=Sampling(-1), stop=[""])
    assert str(caught.value).count(";") >= 3
    with pytest.raises(UserError, match=r"prompt 1 is empty.*prompt 2 has 300 tokens.*holds 128"):
        sampler.sample(["a", "", "x" * 300])
    with pytest.raises(UserError, match="and 4 more like these"):
        sampler.sample([""] * 7)
    with pytest.raises(UserError, match="batch_size is 0"):
        Sampler(gpt, tokenizer, batch_size=0)


def test_memory_is_given_back_and_a_second_call_starts_anew(gpt, tokenizer):
    sampler = Sampler(gpt, tokenizer)
    work = sampler.sample(PROMPTS, samples=3, max_new_tokens=20, sampling=Sampling(1.0))
    next(work)
    assert sampler.cache.layers[0].prefix.k is not None
    work.close()
    assert sampler.cache.layers[0].prefix.k is None
    assert len(list(sampler.sample(PROMPTS, samples=3, max_new_tokens=20))) == 15


def test_not_enough_memory_is_one_line(gpt, tokenizer, monkeypatch):
    from phi_lit.generate import room

    monkeypatch.setattr(room, "free_bytes", lambda *_: 1000)
    with pytest.raises(UserError, match=r"not enough memory: one sample of .* ask for fewer"):
        list(Sampler(gpt, tokenizer).sample(["a"]))


def test_memory_decides_how_many_samples_run_at_a_time(gpt, tokenizer, monkeypatch):
    from phi_lit.generate import room

    one = room.row_bytes(gpt.config, torch.float32, 30)
    monkeypatch.setattr(room, "free_bytes", lambda *_: one * 4)
    sampler = Sampler(gpt, tokenizer)
    sizes = []
    sampler._twin.transformer.wte.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    assert len(list(sampler.sample(["abc"], samples=9, max_new_tokens=27))) == 9
    assert 1 <= max(sizes) <= 4


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_quantized_model_samples_as_litgpt_samples_it(one_thread, tokenizer, tmp_path, mode):
    pytest.importorskip("bitsandbytes")
    from lightning import Fabric

    from phi_lit.quantize import BitsandbytesPrecision

    config = Config.from_name("phi1-test", padded_vocab_size=512, block_size=128, n_embd=128)
    weights = random_gpt(config).state_dict()
    plugin = BitsandbytesPrecision(mode, torch.float32)
    fabric = Fabric(devices=1, accelerator="cpu", plugins=plugin)
    from litgpt import GPT

    with fabric.init_module(empty_init=True):
        gpt = GPT(config)
    gpt = fabric.setup_module(gpt.eval()).module
    gpt.load_state_dict(weights)
    made = by_place(
        Sampler(gpt, tokenizer).sample(
            PROMPTS, samples=2, max_new_tokens=20, sampling=GREEDY, ignore_eos=True
        )
    )
    agreeing = sum(
        completion.ids == one_at_a_time(gpt, tokenizer, PROMPTS[prompt], 20)
        for (prompt, _), completion in made.items()
    )
    assert agreeing == len(made)


@pytest.mark.slow
def test_real_weights_greedy_is_litgpts_and_transformers(one_thread, smollm2):
    """SmolLM2-135M in float32: grouped queries, real text, a real end-of-text token."""
    from litgpt import GPT
    from litgpt.tokenizer import Tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    from phi_lit.train.checkpoint import load_weights

    prompts = ["def fibonacci(n):\n", "The capital of France is", "Once upon a time"]
    config = Config.from_file(smollm2 / "model_config.yaml")
    tokenizer = Tokenizer(smollm2)
    gpt = GPT(config).eval()
    load_weights(gpt, smollm2)
    made = by_place(
        Sampler(gpt, tokenizer).sample(prompts, samples=2, max_new_tokens=24, sampling=GREEDY)
    )
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama

    weights = {}
    copy_weights_llama(config, weights, gpt.state_dict())
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.padded_vocab_size, hidden_size=config.n_embd,
            intermediate_size=config.intermediate_size, num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head, num_key_value_heads=config.n_query_groups,
            max_position_embeddings=config.block_size, rms_norm_eps=config.norm_eps,
            rope_parameters=dict(rope_type="default", rope_theta=float(config.rope_base)),
            eos_token_id=tokenizer.eos_id, bos_token_id=tokenizer.bos_id,
            pad_token_id=tokenizer.eos_id,
        )
    ).eval()  # fmt: skip
    missing = theirs.load_state_dict(weights, strict=False).missing_keys
    assert all("inv_freq" in name for name in missing)
    for (prompt, _), completion in made.items():
        ids = tokenizer.encode(prompts[prompt])
        assert completion.ids == one_at_a_time(
            gpt, tokenizer, prompts[prompt], 24, tokenizer.eos_id
        )
        whole = theirs.generate(ids.long()[None], max_new_tokens=24, do_sample=False)[0].tolist()
        assert completion.ids == whole[len(ids) :]
    assert "Paris" in made[1, 0].text
