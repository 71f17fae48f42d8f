"""The chunked head and loss against the obvious one, in value, gradients and memory."""

import math

import pytest
import torch
from litgpt import GPT, Config
from torch.nn import functional as F

from extensions.phi_moe import gemm
from phi_lit.train.head_cpu import CpuHead
from phi_lit.train.head_plain import PlainHead
from phi_lit.train.loss import chunk_rows, linear_cross_entropy, plain_loss
from phi_lit.train.model import LossModel, compile_blocks

# Letters in tensor names: N tokens, D hidden size, V vocabulary.


def tensors(n=70, d=16, v=40, dtype=torch.float32, ignored=True):
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(v, d, generator=generator).to(dtype).requires_grad_()
    bias_V = torch.randn(v, generator=generator).to(dtype).requires_grad_()
    target_N = torch.randint(0, v, (n,), generator=generator)
    if ignored:
        target_N[::7] = -100
    return hidden_ND, weight_VD, bias_V, target_N


def slow_double(hidden_ND, weight_VD, bias_V, target_N, z_loss=0.0):
    """Write the loss as its definition, in whole logits."""
    logits_NV = F.linear(hidden_ND, weight_VD, bias_V).to(
        torch.promote_types(hidden_ND.dtype, torch.float32)
    )
    counted_N = target_N != -100
    lse_N = logits_NV[counted_N].logsumexp(1)
    hit_N = logits_NV[counted_N, target_N[counted_N]]
    return (lse_N - hit_N).mean() + z_loss * lse_N.square().mean()


def gradients(loss, inputs):
    return torch.autograd.grad(loss, [x for x in inputs if x is not None])


@pytest.mark.parametrize("v", [40, 33])  # 33 cannot be cut into groups
@pytest.mark.parametrize("chunk", [1, 16, 70, 1000])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_value_and_gradients_equal_the_definition(v, chunk, z_loss):
    *inputs, target = tensors(v=v, dtype=torch.float64)
    ours = linear_cross_entropy(*inputs, target, chunk=chunk, z_loss=z_loss)
    slow = slow_double(*inputs, target, z_loss)
    torch.testing.assert_close(ours.loss, slow, rtol=1e-12, atol=1e-14)
    for a, b in zip(gradients(ours.loss, inputs), gradients(slow, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_gradients_pass_gradcheck():
    *inputs, target = tensors(n=7, d=4, v=8, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: linear_cross_entropy(*x, target, chunk=3, z_loss=0.1).loss, inputs
    )


@pytest.mark.parametrize("onednn", [False, True])
def test_float32_equals_pytorchs_cross_entropy_in_either_library(monkeypatch, onednn):
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(gemm, "prefers_onednn", lambda: onednn)
    *inputs, target = tensors(n=300, d=64, v=1000)
    ours = linear_cross_entropy(*inputs, target, chunk=128).loss
    plain = F.cross_entropy(F.linear(*inputs), target)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    for a, b in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        # Sums of 300 products in another order: some units in the last place of the largest.
        assert (a - b).abs().max() <= 1e-6 * b.abs().max()


@pytest.mark.parametrize("has_bias", [True, False])
def test_both_heads_agree(has_bias):
    hidden, weight, bias, target = (x.detach() for x in tensors(n=90, dtype=torch.float64))
    counted = target != -100
    target = target.clamp(min=0)
    scale = torch.tensor(0.25, dtype=torch.float64)
    results = [
        head(
            hidden, weight, bias if has_bias else None,
            rows=32, z_loss=0.1, wanted=(True, True, has_bias),
        ).run(target, counted, scale)
        for head in (CpuHead, PlainHead)
    ]  # fmt: skip
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-13)


def test_bfloat16_errs_no_more_than_rounding_the_logits_does():
    hidden, weight, bias, target = tensors(n=512, d=64, v=1000, dtype=torch.bfloat16)
    inputs = [hidden, weight, bias]
    ours = linear_cross_entropy(*inputs, target, chunk=128).loss
    plain = F.cross_entropy(F.linear(*inputs).float(), target)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = slow_double(*exact_inputs, target)
    # Both round logits to 8 bits. The mean loss of either stays within one such rounding.
    assert abs(ours - exact) <= 2**-8 * abs(exact)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    for a, b, c in zip(
        gradients(ours, inputs),
        gradients(plain, inputs),
        gradients(exact, exact_inputs),
        strict=True,
    ):
        error, plain_error = (a - c).norm() / c.norm(), (b - c).norm() / c.norm()
        assert error <= 2**-6
        assert error <= 1.25 * plain_error, "sums over chunks are not kept in float32"


def test_autocast_gives_the_gradients_of_plain_under_autocast():
    *inputs, target = tensors(n=256, d=64, v=1000)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(*inputs, target, chunk=64).loss
        plain = F.cross_entropy(F.linear(*inputs), target)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=0)
    for a, b in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() <= 2**-6 * b.norm()  # both round their factors to 8 bits


def test_float16_neither_overflows_nor_vanishes_under_a_loss_scale():
    *inputs, target = tensors(n=4096, d=16, v=40)
    scale = 65536.0
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(*inputs, target, chunk=512).loss
    got = [g / scale for g in gradients(loss * scale, inputs)]
    expected = gradients(slow_double(*inputs, target), inputs)
    for a, b in zip(got, expected, strict=True):
        assert a.isfinite().all()
        assert (a - b).norm() <= 2**-8 * b.norm()  # float16 keeps 11 bits of each factor


def test_z_loss_has_its_closed_form():
    v, coefficient, constant = 32, 0.5, 3.0
    hidden, weight = torch.zeros(5, 4), torch.zeros(v, 4)
    result = linear_cross_entropy(
        hidden, weight, torch.full((v,), constant), torch.arange(5), z_loss=coefficient
    )
    expected = coefficient * (constant + math.log(v)) ** 2
    assert result.z_loss.item() == pytest.approx(expected, rel=1e-6)
    assert result.cross_entropy.item() == pytest.approx(math.log(v), rel=1e-6)
    assert result.loss.item() == pytest.approx(expected + math.log(v), rel=1e-6)


def test_no_counted_targets_give_zero_and_zero_gradients():
    *inputs, target = tensors()
    result = linear_cross_entropy(*inputs, torch.full_like(target, -100), z_loss=0.1)
    assert result.loss.item() == 0
    assert result.count.item() == 0
    assert all((g == 0).all() for g in gradients(result.loss, inputs))


def test_ignored_rows_get_no_gradient_and_change_nothing():
    hidden, weight, bias, target = tensors()
    result = linear_cross_entropy(hidden, weight, bias, target, chunk=16)
    got = gradients(result.loss, (hidden, weight, bias))
    counted = target != -100
    only = linear_cross_entropy(hidden[counted], weight, bias, target[counted])
    assert result.count == only.count == counted.sum()
    assert (got[0][~counted] == 0).all()
    for a, b in zip(got, gradients(only.loss, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(a, b)


def test_losses_with_a_common_denominator_add_up_to_the_whole_batch():
    *inputs, target = tensors(dtype=torch.float64)
    whole = linear_cross_entropy(*inputs, target)
    hidden, weight, bias = inputs
    parts = [
        linear_cross_entropy(
            hidden[rows], weight, bias, target[rows], denominator=float(whole.count)
        ).loss
        for rows in (slice(0, 13), slice(13, 70))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)
    for a, b in zip(gradients(sum(parts), inputs), gradients(whole.loss, inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_only_wanted_gradients_are_made_and_a_frozen_head_stays_without():
    hidden, weight, bias, target = tensors()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    linear_cross_entropy(hidden, weight, bias, target).loss.backward()
    assert weight.grad is None
    assert bias.grad is None
    _, full_weight, full_bias, _ = tensors()
    plain = F.cross_entropy(F.linear(hidden, full_weight, full_bias), target)
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(plain, hidden)[0])


def test_a_retained_graph_gives_the_same_gradients_twice():
    *inputs, target = tensors()
    loss = linear_cross_entropy(*inputs, target).loss * 3
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_very_unlikely_targets_keep_a_finite_exact_loss():
    weight = torch.tensor([[200.0], [0.0], [-200.0]])
    result = linear_cross_entropy(torch.ones(1, 1), weight, None, torch.tensor([2]))
    assert result.loss.item() == pytest.approx(400.0)


def test_misfits_are_named():
    hidden, weight, bias, target = tensors()
    with pytest.raises(ValueError, match=r"bias \(39,\) does not fit.*targets are torch.int32"):
        linear_cross_entropy(hidden, weight, bias[1:], target.int())
    with pytest.raises(ValueError, match=r"bfloat16 and the head's weight is torch.float32"):
        linear_cross_entropy(hidden.bfloat16(), weight, bias, target)
    with pytest.raises(ValueError, match="'liger' cannot do this: its kernels need a CUDA device"):
        linear_cross_entropy(hidden, weight, bias, target, backend="liger")
    with pytest.raises(ValueError, match="'fast'; choose"):
        linear_cross_entropy(hidden, weight, bias, target, backend="fast")


# ------------------------------------------------------------------------------------------ memory


def peak_bytes(run):
    """Return the most bytes held at once during `run`, by the allocator's own events."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    now = highest = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        highest = max(highest, now)
    return highest


def test_peak_memory_is_at_most_a_fifth_of_plain():
    n, d, v = 2048, 32, 51200
    hidden, weight, bias, target = tensors(n, d, v)
    results = n * d * 4 + v * d * 4 + v * 4  # the gradients themselves, which any way must make

    def measure(loss_of):
        def run():
            loss_of().backward()
            hidden.grad = weight.grad = bias.grad = None

        return peak_bytes(run) - results

    plain = measure(lambda: F.cross_entropy(F.linear(hidden, weight, bias), target))
    ours = measure(lambda: linear_cross_entropy(hidden, weight, bias, target).loss)
    assert plain > 2 * n * v * 4
    assert ours <= plain / 5


def test_evaluation_makes_no_gradients():
    hidden, weight, bias, target = tensors(1024, 64, 10240)
    with torch.no_grad():
        peak = peak_bytes(lambda: linear_cross_entropy(hidden, weight, bias, target))
        loss = linear_cross_entropy(hidden, weight, bias, target).loss
    assert peak <= 32 << 20  # a tile of logits, and less than the 42 MB of all of them
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(hidden, weight, bias), target))


def test_the_weights_gradient_is_handed_over_not_copied():
    hidden, weight, bias, target = tensors(64, 256, 8192, ignored=False)
    loss = linear_cross_entropy(hidden, weight, bias, target).loss
    assert peak_bytes(loss.backward) < weight.numel() * 4


@pytest.mark.parametrize(("vocabulary", "rows"), [(51200, 256), (512, 32768), (10**9, 16)])
def test_chunk_is_a_power_of_two_within_the_memory_target(vocabulary, rows):
    assert chunk_rows(vocabulary) == rows


# ------------------------------------------------------------------------------------------- model


def small_gpt(**changes):
    config = dict(
        n_layer=2, n_embd=64, n_head=2, block_size=32, intermediate_size=128,
        padded_vocab_size=512, vocab_size=512,
    )  # fmt: skip
    torch.manual_seed(1)
    return GPT(Config.from_name("phi-1_5", **{**config, **changes}))


def batch(gpt, rows=3):
    ids = torch.randint(0, 512, (rows, gpt.max_seq_length + 1))
    return ids[:, :-1], ids[:, 1:]


def gradients_by_name(gpt):
    grads = {name: p.grad for name, p in gpt.named_parameters()}
    gpt.zero_grad(set_to_none=True)
    return grads


@pytest.mark.parametrize("changes", [{}, {"lm_head_bias": False}, {"final_logit_softcapping": 5.0}])
def test_model_with_loss_equals_gpt_and_cross_entropy(changes):
    gpt = small_gpt(**changes)
    names = list(gpt.state_dict())
    idx, targets = batch(gpt)
    plain = F.cross_entropy(gpt(idx).flatten(0, 1), targets.flatten())
    plain.backward()
    expected = gradients_by_name(gpt)
    model = LossModel(gpt)
    assert model.fused == ("final_logit_softcapping" not in changes)
    loss = model(idx, targets)
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients_by_name(gpt), expected, rtol=1e-4, atol=1e-7)
    assert list(gpt.state_dict()) == names
    assert not model.figures.loss.requires_grad


def test_plain_path_has_the_same_z_loss_and_denominator():
    gpt = small_gpt()
    idx, targets = batch(gpt)
    targets = targets.clone()
    targets[:, :5] = -100
    options = dict(z_loss=0.2, denominator=123.0)
    fused = LossModel(gpt, z_loss=0.2)(idx, targets, 123.0)
    plain = plain_loss(gpt(idx).flatten(0, 1), targets.flatten(), **options).loss
    torch.testing.assert_close(fused, plain)


def test_the_model_still_gives_logits_to_everyone_else():
    gpt = small_gpt()
    idx, targets = batch(gpt)
    before = gpt(idx)
    model = LossModel(gpt)
    model(idx, targets)
    assert torch.equal(gpt(idx), before)
    model.gpt.max_seq_length = 8
    with pytest.raises(ValueError, match="max seq length"):
        model(idx, targets)
    model.gpt.max_seq_length = 32
    assert torch.equal(gpt(idx), before), "a failed forward left the head stepped aside"


def test_tied_embeddings_get_both_gradients():
    gpt = small_gpt(lm_head_bias=False)
    gpt.transformer.wte.weight = gpt.lm_head.weight
    idx, targets = batch(gpt)
    F.cross_entropy(gpt(idx).flatten(0, 1), targets.flatten()).backward()
    expected = gradients_by_name(gpt)
    LossModel(gpt)(idx, targets).backward()
    torch.testing.assert_close(gradients_by_name(gpt), expected, rtol=1e-4, atol=1e-7)


def test_compiled_blocks_agree_with_eager_ones_and_keep_their_names():
    gpt = small_gpt()
    names = list(gpt.state_dict())
    idx, targets = batch(gpt)
    model = LossModel(gpt)
    model(idx, targets).backward()
    expected = gradients_by_name(gpt)
    compile_blocks(gpt)
    model(idx, targets).backward()
    torch.testing.assert_close(gradients_by_name(gpt), expected, rtol=1e-4, atol=1e-6)
    assert list(gpt.state_dict()) == names


# --------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["torch", "liger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_both_backends_equal_the_definition(backend, dtype):
    if backend == "liger":
        pytest.importorskip("liger_kernel")
    *inputs, target = tensors(n=2048, d=128, v=5000)
    inputs = [x.detach().cuda().requires_grad_() for x in inputs]
    target = target.cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = linear_cross_entropy(*inputs, target, z_loss=1e-3, backend=backend).loss
    got = [g / 1024 for g in gradients(loss * 1024, inputs)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = slow_double(*exact_inputs, target, z_loss=1e-3)
    # Units of rounding of the products' factors: 24 bits (10 with TF32 off by default), 8 or 11.
    unit = {torch.float32: 2**-20, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert abs(loss - exact) <= 4 * unit * exact
    for a, b in zip(got, gradients(exact, exact_inputs), strict=True):
        assert (a - b).norm() <= 4 * unit * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_peak_is_at_most_a_fifth_of_plain():
    hidden, weight, bias, target = tensors(16384, 256, 51200)
    inputs = [x.detach().cuda().requires_grad_() for x in (hidden, weight, bias)]
    target = target.cuda()

    def peak(loss_of):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(loss_of(), inputs)
        return torch.cuda.max_memory_allocated() - before

    plain = peak(lambda: F.cross_entropy(F.linear(*inputs), target))
    ours = peak(lambda: linear_cross_entropy(*inputs, target, chunk=1024, backend="torch").loss)
    assert ours <= plain / 5
