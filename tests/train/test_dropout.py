"""Dropout against slow doubles: same mask, same outputs and gradients; in training only."""

import math

import pytest
import torch
from litgpt import GPT, Config
from torch import nn
from torch.nn import functional as F

from phi_lit.errors import UserError
from phi_lit.train.attention import dropout_attention, keep_mask
from phi_lit.train.dropout import apply_dropout

# Letters in tensor names: B batch, H heads, T tokens, D head size.


def qkv(b=2, h=3, t=300, d=16, dv=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = (d, d, dv or d)
    # (B, T, H, D) transposed: the layout in which a model hands them over.
    return [
        torch.randn(b, t, h, size, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for size in sizes
    ]


def slow_double(q, k, v, mask_BHTT, dropout, scale):
    """Write attention with dropout as its definition, with all T x T weights."""
    t = q.shape[2]
    future = torch.ones(t, t, dtype=torch.bool).triu(1)
    weights = (q @ k.mT * scale).masked_fill(future, -torch.inf).softmax(-1)
    return (weights * mask_BHTT / (1 - dropout)) @ v


def seed_of(number):
    return torch.tensor([number])


def both(q, k, v, dropout, seed=7):
    scale = 1 / math.sqrt(q.shape[-1])
    b, h, t, _ = q.shape
    mask = keep_mask(b * h, t, seed_of(seed), dropout).view(b, h, t, t)
    ours = dropout_attention(q, k, v, seed_of(seed), dropout, scale)
    return ours, slow_double(q, k, v, mask, dropout, scale)


@pytest.mark.parametrize("t", [1, 5, 128, 300])  # below, at and beyond one strip of 128 rows
@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.6])
def test_attention_equals_its_definition_in_outputs_and_gradients(t, dropout):
    inputs = qkv(t=t, dv=8, dtype=torch.float64)
    ours, slow = both(*inputs, dropout)
    grad = torch.randn(slow.shape, dtype=torch.float64)
    torch.testing.assert_close(ours, slow, rtol=1e-11, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(slow, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_attention_passes_gradcheck_and_pytorchs_checks_of_an_operation():
    inputs = qkv(1, 2, 5, 3, dtype=torch.float64)
    arguments = (*inputs, seed_of(1), 0.3, 0.5)
    assert torch.autograd.gradcheck(
        lambda q, k, v: dropout_attention(q, k, v, seed_of(1), 0.3, 0.5), inputs
    )
    torch.library.opcheck(dropout_attention, arguments)


@pytest.mark.parametrize("b", [1, 2])
def test_a_compiler_is_told_the_strides_that_the_gradients_have(b):
    """With one sequence the tensors that a model hands over are views all the way down."""
    inputs = qkv(b=b, t=40)
    compiled = torch.compile(lambda q, k, v: dropout_attention(q, k, v, seed_of(7), 0.1, 0.25) * 2)
    grad = torch.randn(b, 3, 40, 16)
    expected = torch.autograd.grad(
        dropout_attention(*inputs, seed_of(7), 0.1, 0.25) * 2, inputs, grad
    )
    for ours, eager in zip(
        torch.autograd.grad(compiled(*inputs), inputs, grad), expected, strict=True
    ):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-22), (torch.bfloat16, 2**-8)])
def test_attention_in_lower_precision_errs_by_its_rounding_only(dtype, unit):
    inputs = qkv(dtype=dtype)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    ours, _ = both(*inputs, 0.1)
    _, exact = both(*exact_inputs, 0.1)
    assert ours.dtype == dtype
    assert (ours - exact).norm() <= unit * exact.norm()
    grad = torch.randn(ours.shape).to(dtype)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(exact, exact_inputs, grad.double()),
        strict=True,
    ):
        assert (a - b).norm() <= 2 * unit * b.norm()


def test_without_dropout_attention_is_pytorchs():
    q, k, v = qkv()
    ours = dropout_attention(q, k, v, seed_of(0), 0.0, 0.25)
    torch.testing.assert_close(
        ours, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25)
    )


@pytest.mark.parametrize("dropout", [0.001, 0.1, 0.25, 0.9])
def test_each_weight_is_dropped_with_exactly_the_asked_probability(dropout):
    t = 256
    mask = torch.cat([keep_mask(16, t, seed_of(seed), dropout) for seed in range(4)])
    seen = mask[:, torch.ones(t, t).tril().bool()].double()
    # 2.1 million weights. Rows share a threshold, which adds less than 2 / 256 per row of 128.
    deviation = math.sqrt(dropout * (1 - dropout) / seen.numel())
    deviation += (1 / 256) / math.sqrt(64 * t)
    assert abs(1 - seen.mean() - dropout) < 5 * deviation


def test_masks_differ_between_heads_rows_and_seeds_without_correlation():
    t = 256
    first = keep_mask(4, t, seed_of(1), 0.5).double()[:, 128:, :128]  # all of it is causal
    other = keep_mask(4, t, seed_of(2), 0.5).double()[:, 128:, :128]
    pairs = {
        "seeds": (first, other),
        "heads": (first[:-1], first[1:]),
        "rows": (first[:, :-1], first[:, 1:]),
        "columns": (first[:, :, :-1], first[:, :, 1:]),
    }
    for name, (a, b) in pairs.items():
        correlation = ((a - 0.5) * (b - 0.5)).mean() * 4
        assert abs(correlation) < 5 / math.sqrt(a.numel()), name


def test_the_mask_is_a_function_of_the_seed_and_not_of_the_number_of_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = keep_mask(3, 200, seed_of(5), 0.1)
    torch.set_num_threads(max(2, threads))
    two = keep_mask(3, 200, seed_of(5), 0.1)
    torch.set_num_threads(threads)
    assert torch.equal(one, two)


# ---------------------------------------------------------------------------------- in the model


SMALL = dict(n_layer=2, n_embd=32, n_head=4, block_size=24, padded_vocab_size=64, vocab_size=64)
MODELS = {
    "phi": dict(name="phi-1_5", intermediate_size=64),
    "llama with grouped queries": dict(
        name="Llama-3.2-1B", n_query_groups=2, intermediate_size=64, rope_adjustments=None
    ),
    "mixture of experts": dict(
        name="Mixtral-8x7B-v0.1", n_query_groups=2, n_expert=4, intermediate_size=64
    ),
    "soft-capped, norms after the branches, sliding window": dict(
        name="Gemma-2-2b", n_query_groups=2, head_size=8, intermediate_size=64,
        sliding_window_size=6,
    ),
}  # fmt: skip


def model(kind="phi"):
    torch.manual_seed(1)
    return GPT(Config.from_name(**{**SMALL, **MODELS[kind]}))


IDS = torch.arange(48).view(2, 24)


@pytest.mark.parametrize("kind", MODELS)
def test_dropout_acts_in_training_only_and_leaves_no_trace(kind):
    plain, dropped = model(kind), model(kind)
    apply_dropout(dropped, attention=0.3, residual=0.3)
    assert list(dropped.state_dict()) == list(plain.state_dict())
    dropped.load_state_dict(plain.state_dict())
    assert "dropout" not in repr(dropped.config).lower()
    assert torch.equal(dropped.eval()(IDS), plain.eval()(IDS))
    dropped.train()
    torch.manual_seed(3)
    first = dropped(IDS)
    second = dropped(IDS)
    torch.manual_seed(3)
    again = dropped(IDS)
    assert not torch.equal(first, second)
    assert torch.equal(first, again), "masks depend on more than the random state"


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("where", ["attention", "residual"])
def test_each_kind_of_dropout_acts_alone(kind, where):
    plain, dropped = model(kind).train(), model(kind).train()
    apply_dropout(dropped, **{where: 0.3})
    assert not torch.equal(dropped(IDS), plain(IDS))


def test_generation_with_a_cache_is_untouched():
    plain, dropped = model().eval(), model().eval()
    apply_dropout(dropped, attention=0.5, residual=0.5)
    outputs = []
    for gpt in (plain, dropped):
        gpt.set_kv_cache(batch_size=1)
        prefill = gpt(IDS[:1, :5], input_pos=torch.arange(5))
        outputs.append((prefill, gpt(IDS[:1, 5:6], input_pos=torch.tensor([5]))))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_residual_dropout_falls_on_each_branch_before_the_sum():
    gpt = model().train()
    apply_dropout(gpt, residual=0.5)
    block, x = gpt.transformer.h[0], torch.randn(2, 24, 32)
    rotary = gpt.cos.unsqueeze(0), gpt.sin.unsqueeze(0)
    with torch.no_grad():
        torch.manual_seed(9)
        out = block(x, *rotary)
        normed = block.norm_1(x)
        torch.manual_seed(9)
        attention = F.dropout(block.attn(normed, *rotary), 0.5)
        mlp = F.dropout(block.mlp(normed), 0.5)
    torch.testing.assert_close(out, mlp + attention + x)


def test_expected_output_is_that_without_dropout():
    q, k, v = (x.detach() for x in qkv(1, 2, 40, 8, dtype=torch.float64))
    exact = dropout_attention(q, k, v, seed_of(0), 0.0, 0.35)
    draws = torch.stack([dropout_attention(q, k, v, seed_of(s), 0.2, 0.35) for s in range(1, 2001)])
    error = (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(len(draws))).clamp(min=1e-9)
    # 640 standardised means: the largest of so many stays below 5.
    assert error.abs().max() < 5
    assert error.square().mean() < 1.5


def test_a_residual_dropout_set_twice_is_not_applied_twice():
    gpt = model()
    apply_dropout(gpt, residual=0.1)
    apply_dropout(gpt, residual=0.2)
    drops = [m.p for m in gpt.modules() if isinstance(m, nn.Dropout)]
    assert drops == [0.2] * 4


@pytest.mark.parametrize("share", [-0.1, 1.0, 2])
def test_impossible_shares_are_refused_together(share):
    with pytest.raises(UserError, match=r"attention dropout is .* and residual dropout is"):
        apply_dropout(model(), attention=share, residual=share)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_dropout_stays_on_the_fused_kernels():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    gpt = model().cuda().bfloat16().train()
    apply_dropout(gpt, attention=0.1)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # raises where flash cannot do it
        gpt(IDS.cuda()).sum().backward()
    assert all(p.grad.isfinite().all() for p in gpt.transformer.h.parameters())
