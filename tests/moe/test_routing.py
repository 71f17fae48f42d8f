"""Who visits whom: weights, selection bias, and the two losses against their closed forms."""

import math

import pytest
import torch
from litgpt import Config
from torch.nn import functional as F

from extensions.phi_moe import PhiMoE, routing
from extensions.phi_moe.routing import AttachLoss, Router


def layer(**changes) -> PhiMoE:
    torch.manual_seed(0)
    return PhiMoE(Config.from_name("phi1-test-moe", **changes))


def logits(n=50, n_expert=6):
    return torch.randn(n, n_expert, generator=torch.Generator().manual_seed(3)).double()


def choose(logits_NE, **options):
    options = dict(kept=2, over_all=False) | options
    bias = torch.zeros(logits_NE.shape[1])
    return routing.choose(logits_NE, logits_NE.softmax(-1), bias, **options)


def test_weights_over_the_kept_add_up_to_one_and_equal_gathered_logits():
    x = logits()
    weight, expert = choose(x)
    best = x.topk(2)
    assert torch.equal(expert, best.indices)
    torch.testing.assert_close(weight, best.values.softmax(-1))
    torch.testing.assert_close(weight.sum(-1), torch.ones(50, dtype=torch.float64))


def test_weights_over_all_are_the_scores_and_scaled():
    x = logits()
    weight, expert = choose(x, over_all=True, scale=2.5)
    torch.testing.assert_close(weight, 2.5 * x.softmax(-1).gather(1, expert))


def test_weights_have_the_gradient_of_a_gather():
    ours, plain = logits().requires_grad_(), logits().requires_grad_()
    up = torch.randn(50, 2, dtype=torch.float64)
    weight, expert = choose(ours)
    weight.backward(up)
    plain.gather(1, expert).softmax(-1).backward(up)
    torch.testing.assert_close(ours.grad, plain.grad)


def test_one_kept_expert_still_teaches_the_router():
    moe = layer(n_expert_per_token=1)
    moe(torch.randn(2, 8, 64)).square().sum().backward()
    assert moe.gate.weight.grad.abs().max() > 0


def test_selection_bias_chooses_and_leaves_the_weights_alone():
    x = logits()
    bias = torch.zeros(6)
    bias[4] = 2.0  # more than any score
    weight, expert = routing.choose(x, x.softmax(-1), bias, kept=2, over_all=True)
    assert (expert == 4).any(-1).all()
    torch.testing.assert_close(weight, x.softmax(-1).gather(1, expert))


def test_balance_loss_is_one_when_even_and_grows_to_the_number_of_experts():
    even = torch.zeros(12, 4)
    balanced = routing.balance_loss(even.softmax(-1), torch.tensor([6, 6, 6, 6]))
    assert balanced.item() == pytest.approx(1)
    one = torch.tensor([[30.0, 0, 0, 0]] * 12)
    lopsided = routing.balance_loss(one.softmax(-1), torch.tensor([12, 0, 0, 0]))
    assert lopsided.item() == pytest.approx(4)


def test_losses_equal_their_formulas():
    x = logits()
    _, expert = choose(x)
    load = routing.count_tokens(expert, 6)
    assert torch.equal(load, torch.bincount(expert.flatten(), minlength=6))
    p = x.exp() / x.exp().sum(-1, keepdim=True)
    expected = 6 * sum(float(load[e]) / 100 * p[:, e].mean() for e in range(6))
    torch.testing.assert_close(routing.balance_loss(x.softmax(-1), load), expected)
    torch.testing.assert_close(routing.router_z_loss(x), x.exp().sum(-1).log().square().mean())


def test_attached_losses_reach_the_router_with_their_weights_and_the_scale():
    """The router's gradient is that of (output + scale * weighted losses), summed by hand."""
    x, up = torch.randn(2, 16, 64), torch.randn(2, 16, 64)
    moe, plain = layer(), layer()
    moe.balance_weight, moe.router_z_weight, moe.auxiliary_scale = 0.3, 0.2, torch.tensor(0.5)
    moe(x).backward(up)
    y = plain(x)
    scores = F.linear(x.flatten(0, 1), plain.gate.weight)
    load = plain.routing.load_E
    share = load / load.sum()
    balance = 4 * (share * scores.softmax(-1).mean(0)).sum()
    z = scores.logsumexp(-1).square().mean()
    ((y * up).sum() + 0.5 * (0.3 * balance + 0.2 * z)).backward()
    torch.testing.assert_close(moe.gate.weight.grad, plain.gate.weight.grad)
    torch.testing.assert_close(moe.experts.fc.weight.grad, plain.experts.fc.weight.grad)
    assert moe.routing.balance_loss.item() == pytest.approx(balance.item())
    assert moe.routing.z_loss.item() == pytest.approx(z.item())


def test_without_weights_or_in_evaluation_there_is_no_loss():
    x = torch.randn(1, 8, 64)
    moe = layer().eval()
    moe.balance_weight = 1.0
    y = moe(x)
    assert "AttachLoss" not in str(y.grad_fn.next_functions[0][0])
    assert moe.routing.load_E.sum() == 0  # figures are of training


def test_attach_loss_hands_the_output_through():
    y = torch.randn(3, requires_grad=True)
    loss = torch.tensor(2.0, requires_grad=True)
    AttachLoss.apply(y, loss, torch.tensor(7.0)).sum().backward()
    assert torch.equal(y.grad, torch.ones(3))
    assert loss.grad.item() == 7.0


def test_figures_of_a_pass():
    moe = layer()
    moe(torch.randn(2, 10, 64))
    load_E, entropy, balance, z = moe.routing
    assert load_E.sum() == 2 * 10 * 2
    assert 0 < entropy <= math.log(4)
    assert balance > 0
    assert z > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_computes_in_float32_and_its_buffers_stay_there(dtype):
    moe = layer().to(dtype)
    assert moe.gate.weight.dtype == dtype
    assert moe.gate.selection_bias.dtype == moe.gate.figures.dtype == torch.float32
    x = torch.randn(4, 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        scores = moe.gate(x)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, F.linear(x.float(), moe.gate.weight.float()))


def test_selection_bias_is_saved_and_figures_are_not():
    names = set(Router(8, 4).state_dict())
    assert names == {"weight", "selection_bias"}


def test_jitter_moves_the_router_in_training_only():
    moe = layer()
    moe.jitter = 0.5
    x = torch.randn(1, 64, 64)
    torch.manual_seed(1)
    first = moe(x)
    assert not torch.equal(first, moe(x))
    torch.manual_seed(1)
    assert torch.equal(first, moe(x))
    moe.eval()
    assert torch.equal(moe(x), moe(x))
