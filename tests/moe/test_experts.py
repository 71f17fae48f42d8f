"""Every way of multiplying with the experts, held against one token after another."""

import copy

import pytest
import torch
from double import mixture

from extensions.phi_moe import pages, routing, segments
from extensions.phi_moe.experts import Experts
from extensions.phi_moe.grouped import can_group

SIZE, INNER = 16, 24
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def made(n_expert=5, dtype=torch.float64, activation="gelu_tanh", bias=True) -> Experts:
    torch.manual_seed(1)
    experts = Experts(n_expert, SIZE, INNER, bias=bias, activation=activation)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3)
    return experts.to(dtype)


ROUTES = {
    "uneven": lambda n_expert: torch.rand(40, n_expert).mul(torch.arange(n_expert)).topk(2).indices,
    "empty experts": lambda n_expert: torch.tensor([[0, 3]] * 9),
    "one token": lambda n_expert: torch.tensor([[4, 1]]),
    "all kept": lambda n_expert: torch.rand(7, n_expert).topk(n_expert).indices,
    "all to one": lambda n_expert: torch.full((33, 1), 2),
    "no token": lambda n_expert: torch.zeros((0, 2), dtype=torch.int64),
}


def compare(experts: Experts, expert_NK, run) -> None:
    """Hold outputs and all gradients against the double's, which computes in float64."""
    torch.manual_seed(2)
    dtype = experts.fc.weight.dtype
    exact = torch.promote_types(dtype, torch.float32)
    x = torch.randn(len(expert_NK), SIZE).to(dtype).requires_grad_()
    weight = torch.rand(expert_NK.shape).to(exact).requires_grad_()
    grad = torch.randn(len(expert_NK), SIZE).to(dtype)
    y = run(experts, x, weight, expert_NK)
    y.backward(grad)
    assert y.dtype == dtype

    slow = copy.deepcopy(experts).double()
    x2 = x.detach().double().requires_grad_()
    weight2 = weight.detach().double().requires_grad_()
    slow.zero_grad()
    if len(expert_NK):
        expected = mixture(x2, slow, weight2, expert_NK)
        expected.backward(grad.double())
        close(y, expected, dtype)
        close(x.grad, x2.grad, dtype)
        close(weight.grad, weight2.grad, dtype)
    for (name, ours), theirs in zip(experts.named_parameters(), slow.parameters(), strict=True):
        wanted = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        assert ours.grad is not None, name
        close(ours.grad, wanted, dtype)


def close(ours, theirs, dtype) -> None:
    """Relative to the largest number: sums of many terms lose what the largest terms lose."""
    scale = theirs.abs().max().clamp(min=1e-6).item() if theirs.numel() else 1.0
    assert (ours.double() - theirs).abs().max().item() <= TOLERANCE[dtype] * scale


def run_layer(experts, x, weight, expert_NK):
    load = routing.count_tokens(expert_NK, experts.fc.weight.shape[0])
    return experts(x, weight, expert_NK, load)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_fused_experts_equal_token_after_token(route, activation):
    torch.manual_seed(0)
    compare(made(activation=activation), ROUTES[route](5), run_layer)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_fused_experts_in_every_type(dtype, activation, route):
    torch.manual_seed(0)
    compare(made(dtype=dtype, activation=activation), ROUTES[route](5), run_layer)


def test_fused_experts_without_biases():
    torch.manual_seed(0)
    compare(made(bias=False), ROUTES["uneven"](5), run_layer)


def test_segments_longer_than_a_piece_add_up(monkeypatch):
    monkeypatch.setattr("extensions.phi_moe.segments.ROWS", 3)
    torch.manual_seed(0)
    compare(made(), ROUTES["uneven"](5), run_layer)


def composed(experts, x, weight, expert_NK):
    experts.path = "composed"
    return run_layer(experts, x, weight, expert_NK)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_composed_experts_equal_token_after_token(route, activation):
    torch.manual_seed(0)
    compare(made(activation=activation), ROUTES[route](5), composed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("route", ["uneven", "empty experts", "one token", "all to one"])
def test_grouped_products_equal_token_after_token(dtype, route):
    torch.manual_seed(0)
    experts = made(dtype=dtype)
    x = torch.randn(3, SIZE, dtype=dtype)
    if not can_group(x, experts.fc.weight):
        pytest.skip(f"this PyTorch has no grouped product of {dtype} on a CPU")
    compare(experts, ROUTES[route](5), composed)


def test_what_grouped_products_cannot_take_is_left_to_segments():
    assert not can_group(torch.randn(4, 6), torch.randn(2, 8, 6))  # rows of 24 bytes
    assert not can_group(torch.randn(4, 8).double(), torch.randn(2, 8, 8).double())


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_a_decoded_token_touches_only_the_experts_it_visits(activation):
    experts = made(activation=activation)
    x, weight = torch.randn(2, SIZE).double(), torch.rand(2, 2).double()
    expert = torch.tensor([[0, 3], [3, 1]])
    with torch.no_grad():
        wanted = mixture(x, experts, weight, expert)
        for stack in (experts.fc, experts.proj):
            stack.weight[[2, 4]] = float("nan")
        y = run_layer(experts, x, weight, expert)
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("path", ["fused", "composed"])
def test_under_autocast_products_are_bf16_and_gradients_float32(path):
    experts = made(dtype=torch.float32)
    experts.path = path
    x, weight = torch.randn(30, SIZE, requires_grad=True), torch.rand(30, 2)
    expert = ROUTES["uneven"](5)[:30]
    with torch.autocast("cpu", torch.bfloat16):
        y = run_layer(experts, x, weight, expert)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    exact = copy.deepcopy(experts)
    exact.zero_grad()
    run_layer(exact, x.detach(), weight, expert).square().sum().backward()
    for ours, theirs in zip(experts.parameters(), exact.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - theirs.grad).norm() < 0.03 * theirs.grad.norm()


def test_frozen_stacks_get_no_gradient_and_the_tokens_keep_theirs():
    experts = made().requires_grad_(False)
    x = torch.randn(40, SIZE, dtype=torch.float64, requires_grad=True)
    run_layer(experts, x, torch.rand(40, 2).double(), ROUTES["uneven"](5)).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in experts.parameters())


@pytest.mark.parametrize("shape", [(3, 5), (1 << 24,)])
def test_memory_that_is_used_again_holds_ordinary_tensors(shape):
    made = pages.empty_again(torch.zeros(1), shape)
    assert made.shape == shape
    assert made.is_contiguous()
    assert made.fill_(2.0).sum().item() == 2.0 * made.numel()
    assert pages.empty_again(torch.zeros(1, dtype=torch.float64), (2,)).dtype == torch.float64


@pytest.mark.parametrize(
    "loads", [[0], [0, 3, 0], [5, 5, 5], [16, 17, 0, 1], [40, 1, 23], [24, 8, 8, 8], [1] * 40]
)
def test_batches_cover_every_visit_once_in_order(loads, monkeypatch):
    monkeypatch.setattr(segments, "ROWS", 16)
    ends = torch.tensor(loads).cumsum(0)
    seen = []
    for visits, pieces in segments._batches(ends):
        assert 0 < visits.stop - visits.start < 1.5 * 16
        assert pieces[0][1].start == 0
        assert pieces[-1][1].stop == visits.stop - visits.start
        for expert, rows in pieces:
            seen += [(expert, visits.start + row) for row in range(rows.start, rows.stop)]
    expected = [e for e, load in enumerate(loads) for _ in range(load)]
    assert seen == [(expert, visit) for visit, expert in enumerate(expected)]


def test_memory_is_used_again_only_when_nobody_holds_it():
    like, shape = torch.zeros(1), (1 << 12, 1 << 12)
    first = pages.empty_again(like, shape)
    view, place = first[5:], first.data_ptr()
    assert pages.empty_again(like, shape).data_ptr() != place
    del first
    assert pages.empty_again(like, shape).data_ptr() != place  # a view holds it
    del view
    places = {pages.empty_again(like, shape).data_ptr() for _ in range(2)}
    again = [pages.empty_again(like, shape) for _ in range(2)]
    assert place in {tensor.data_ptr() for tensor in again}
    assert len({tensor.data_ptr() for tensor in again}) == 2
    assert places <= {tensor.data_ptr() for tensor in again}
    del again
    other = pages.empty_again(like, (1 << 13, 1 << 12))  # what is unused goes with a new size
    assert len(pages._kept) == 1
    del other


def test_gradients_of_large_stacks_are_kept_apart_over_steps(one_thread, monkeypatch):
    """Two steps whose gradients are held, then a third: none is written over."""
    monkeypatch.setattr(pages, "FRESH_BYTES", 1)
    experts, expert = made(), ROUTES["uneven"](5)
    x, weight = torch.randn(40, SIZE).double(), torch.rand(40, 2).double()
    held = []
    for factor in (1.0, 2.0, 3.0):
        experts.zero_grad()
        run_layer(experts, x, weight, expert).sum().mul(factor).backward()
        held.append(experts.fc.weight.grad)
    for factor, gradient in zip((1.0, 2.0, 3.0), held, strict=True):
        torch.testing.assert_close(gradient, factor * held[0])
    run_layer(experts, x, weight, expert).sum().backward()  # accumulates into the third
    torch.testing.assert_close(experts.fc.weight.grad, 4 * held[0])


def test_operators_are_registered_as_pytorch_wants_them():
    torch.manual_seed(0)
    experts, expert = made(), ROUTES["uneven"](5)
    load = routing.count_tokens(expert, 5)
    order, end = segments.sort_visits(expert, load)
    stacks = [experts.fc.weight, experts.fc.bias, experts.proj.weight, experts.proj.bias]
    x = torch.randn(40, SIZE).double().requires_grad_()
    weight = torch.rand(40, 2).double().requires_grad_()
    torch.library.opcheck(segments.experts, (x, weight, order, end, *stacks, "gelu_tanh"))
