"""Decay groups by name, and optimizers by class path."""

import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT

from phi_lit.errors import UserError
from phi_lit.registry import MODELS
from phi_lit.train.init import initialize, seeded
from phi_lit.train.optim import build_optimizer, parse_optimizer, split_parameters


@pytest.fixture
def model() -> GPT:
    return GPT(Config(**MODELS["phi1-test"]))


def test_matrices_are_the_weights_of_linear_layers_and_nothing_else(model: GPT) -> None:
    matrices, others = split_parameters(model)
    assert sorted(matrices + others) == sorted(name for name, _ in model.named_parameters())
    assert "lm_head.weight" in matrices
    assert "transformer.h.0.attn.qkv.weight" in matrices
    assert "transformer.wte.weight" in others
    assert all(
        "bias" in name or "norm" in name or "ln_f" in name or "wte" in name for name in others
    )


def test_decay_on_matrices_spares_biases_norms_and_embeddings(model: GPT) -> None:
    spec = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "weight_decay": 0.5}}
    (optimizer,) = build_optimizer(model, spec, "matrices")
    bias = model.lm_head.bias.detach().clone().fill_(1.0)
    model.lm_head.bias.data.fill_(1.0)
    weight = model.lm_head.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model.lm_head.bias, bias)
    assert torch.allclose(model.lm_head.weight, weight * (1 - 0.1 * 0.5))


def test_decay_on_all_is_one_group_as_in_litgpt(model: GPT) -> None:
    (optimizer,) = build_optimizer(model, "AdamW", "all")
    assert len(optimizer.param_groups) == 1


def test_muon_gets_the_blocks_matrices_and_adamw_the_rest(model: GPT) -> None:
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    muon, adam = build_optimizer(model, {"class_path": "torch.optim.Muon"}, "matrices")
    in_muon = sum(len(group["params"]) for group in muon.param_groups)
    in_adam = sum(len(group["params"]) for group in adam.param_groups)
    assert in_muon == 4 * model.config.n_layer
    assert in_muon + in_adam == len(list(model.parameters()))


def test_yaml_numbers_and_lists_become_what_optimizers_want() -> None:
    spec = {"class_path": "torch.optim.AdamW", "init_args": {"lr": "1e-3", "betas": [0.9, 0.95]}}
    _, init_args = parse_optimizer(spec)
    assert init_args == {"lr": 1e-3, "betas": (0.9, 0.95)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "torch.optim.AdamW", "init_args": {"lr": "fast"}}, "lr is 'fast'"),
        ({"init_args": {"lr": 1}}, "has no class_path"),
        ("lr_scheduler", "not a class of optimizers"),
        ("AdamV", "Did you mean 'Adam'"),
        ("no_such_package.Adam", "cannot import no_such_package"),
        (
            {"class_path": "torch.optim.AdamW", "init_args": {"learning_rate": 1}},
            "unknown argument",
        ),
    ],
)
def test_unknown_optimizers_are_refused_by_name(spec: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_optimizer(spec)  # type: ignore[arg-type]


def test_values_that_an_optimizer_refuses_are_one_line(model: GPT) -> None:
    spec = {"class_path": "torch.optim.AdamW", "init_args": {"lr": -1.0}}
    with pytest.raises(UserError, match="AdamW: Invalid learning rate"):
        build_optimizer(model, spec)


def test_normal_init_has_the_released_standard_deviation(model: GPT) -> None:
    torch.manual_seed(0)
    initialize(model, "normal")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name or "ln_f" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


def test_gpt2_init_shrinks_only_what_writes_to_the_residual_stream(model: GPT) -> None:
    initialize(model, "gpt2")
    block = model.transformer.h[0]
    for layer in (block.attn.proj, block.mlp.proj):
        assert layer.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)  # sqrt(2 * 2 layers)
    assert block.mlp.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_litgpt_init_equals_litgpts_own(model: GPT) -> None:
    import lightning
    from litgpt.pretrain import initialize_weights

    theirs = GPT(model.config)
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(3)
    initialize_weights(fabric, theirs, n_layer=model.config.n_layer, n_embd=model.config.n_embd)
    torch.manual_seed(3)
    initialize(model, "litgpt")
    for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(ours, other), name


def test_seeds_differ_in_every_argument_and_never_change() -> None:
    seeds = {
        seeded(seed, step, micro, rank)
        for seed in range(3)
        for step in range(50)
        for micro in range(4)
        for rank in range(4)
    }
    assert len(seeds) == 3 * 50 * 4 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeded(42, 1000, 3, 1) == 1234134026726137086
