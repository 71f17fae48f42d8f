"""Activation checkpointing changes memory and not a bit of a gradient, with dropout on."""

import copy

import pytest
import torch
from litgpt import GPT, Config

from phi_lit.errors import UserError
from phi_lit.train.checkpointing import apply_activation_checkpointing
from phi_lit.train.dropout import apply_dropout
from phi_lit.train.model import LossModel, compile_blocks

SMALL = dict(n_layer=2, n_embd=32, n_head=4, block_size=160, padded_vocab_size=64, vocab_size=64)
MODELS = {
    "phi": dict(name="phi-1_5", intermediate_size=64),
    "llama with grouped queries": dict(
        name="Llama-3.2-1B", n_query_groups=2, intermediate_size=64, rope_adjustments=None
    ),
    "mixture of experts": dict(
        name="Mixtral-8x7B-v0.1", n_query_groups=2, n_expert=4, intermediate_size=64
    ),
    "phi with experts": dict(name="phi1-test-moe", moe_intermediate_size=48),
    "phi with experts after the MLP": dict(name="phi1-test-moe-after", moe_intermediate_size=48),
}


def loss_and_gradients(mode, kind="phi", dropout=0.2, compiled=False, dtype=torch.float32):
    torch.manual_seed(1)
    gpt = GPT(Config.from_name(**{**SMALL, **MODELS[kind]})).to(dtype)
    apply_dropout(gpt, attention=dropout, residual=dropout)
    apply_activation_checkpointing(gpt, mode)
    if compiled:
        torch._dynamo.reset()
        compile_blocks(gpt)
    ids = torch.randint(0, 64, (2, 161))
    torch.manual_seed(2)
    loss = LossModel(gpt)(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in gpt.named_parameters()}}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_keep_every_bit_with_dropout_on(one_thread, kind, mode, dtype):
    assert_same_bits(
        loss_and_gradients(mode, kind, dtype=dtype), loss_and_gradients("none", kind, dtype=dtype)
    )


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_agree_when_blocks_are_compiled(mode):
    ours = loss_and_gradients(mode, compiled=True)
    plain = loss_and_gradients("none", compiled=True)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


def small_gpt():
    torch.manual_seed(1)
    return GPT(Config.from_name(**{**SMALL, **MODELS["phi"]}))


def kept_bytes(mode):
    """Return the bytes that a forward pass keeps for the backward pass."""
    gpt = small_gpt()
    apply_activation_checkpointing(gpt, mode)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    x = torch.randn(2, 160, 32, requires_grad=True)
    rotary = gpt.cos.unsqueeze(0), gpt.sin.unsqueeze(0)
    parameters |= {r.untyped_storage().data_ptr() for r in rotary}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = gpt.transformer.h[0](x, *rotary)
    assert y.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def test_full_keeps_no_more_than_a_blocks_input():
    assert kept_bytes("full") <= 2 * 160 * 32 * 4
    assert kept_bytes("none") > 10 * 2 * 160 * 32 * 4


def peak_of_step(mode):
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(1)
    config = dict(n_layer=8, n_embd=64, n_head=2, block_size=256, padded_vocab_size=64)
    gpt = GPT(Config.from_name("phi-1_5", intermediate_size=256, **config))
    apply_activation_checkpointing(gpt, mode)
    ids = torch.randint(0, 64, (4, 257))
    model = LossModel(gpt)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(ids[:, :-1], ids[:, 1:]).backward()
    events = profiler.profiler.kineto_results.events()
    now = highest = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        highest = max(highest, now)
    return highest


def test_peak_memory_falls_from_none_to_selective_to_full():
    none, selective, full = (peak_of_step(mode) for mode in ("none", "selective", "full"))
    assert selective < 0.8 * none
    assert full < 0.5 * selective


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_names_are_untouched_and_evaluation_runs_the_plain_block(mode):
    plain, gpt = small_gpt(), small_gpt()
    apply_activation_checkpointing(gpt, mode)
    assert list(gpt.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in gpt.named_parameters()] == [n for n, _ in plain.named_parameters()]
    ids = torch.arange(10)[None]
    assert torch.equal(gpt.eval()(ids), plain.eval()(ids))


def test_a_copy_of_the_model_runs_its_own_blocks():
    gpt = small_gpt()
    apply_dropout(gpt, attention=0.1, residual=0.1)
    apply_activation_checkpointing(gpt, "full")
    twin = copy.deepcopy(gpt)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.fill_(float("nan"))
    assert twin(torch.arange(10)[None]).isfinite().all()


def test_an_unknown_mode_is_refused_with_the_nearest_word():
    with pytest.raises(UserError, match=r"'selectiv'; choose none, selective or full.*'selective'"):
        apply_activation_checkpointing(small_gpt(), "selectiv")
