"""Every way of multiplying with the experts, held against one token after another."""

import pytest
import torch
from double import mixture

from extensions.phi_moe import routing
from extensions.phi_moe.experts import Experts

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

    import copy

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_fused_experts_in_every_type(dtype, activation):
    torch.manual_seed(0)
    compare(made(dtype=dtype, activation=activation), ROUTES["uneven"](5), run_layer)


def test_fused_experts_without_biases():
    torch.manual_seed(0)
    compare(made(bias=False), ROUTES["uneven"](5), run_layer)


def test_segments_longer_than_a_piece_add_up(monkeypatch):
    monkeypatch.setattr("extensions.phi_moe.segments.ROWS", 3)
    torch.manual_seed(0)
    compare(made(), ROUTES["uneven"](5), run_layer)
