"""The layer inside LitGPT's models: where it lies, what it computes, and what surrounds it."""

import copy
import dataclasses

import litgpt.config
import pytest
import torch
import yaml
from litgpt import GPT, Config
from litgpt.model import GptNeoxMLP, LLaMAMLP
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.utils import chunked_cross_entropy, save_config
from torch.utils.flop_counter import FlopCounterMode

from extensions.phi_moe import MoEError, PhiMoE
from extensions.phi_moe.placement import ExpertsAfter
from phi_lit.errors import UserError
from phi_lit.train.dropout import apply_dropout
from phi_lit.train.init import initialize
from phi_lit.train.model import LossModel, compile_blocks
from phi_lit.train.optim import split_parameters

INSTEAD, AFTER = "phi1-test-moe", "phi1-test-moe-after"
IDS = torch.arange(48).view(2, 24) * 11 % 512


def model(name=INSTEAD, moe=None, **changes) -> GPT:
    torch.manual_seed(0)
    if moe is not None:
        changes["hf_config"] = {"org": "phi-lit", "name": name, "moe": moe}
    return GPT(Config.from_name(name, **changes))


def registered(config: Config) -> dict:
    """Return a config as LitGPT's table of models has them."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def layers(gpt: GPT) -> list[PhiMoE]:
    return [module for module in gpt.modules() if isinstance(module, PhiMoE)]


# --------------------------------------------------------------------------------------- placement


def test_experts_after_the_mlp_are_a_third_step_on_the_residual_stream():
    gpt = model(AFTER)
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    block, x = gpt.transformer.h[0], torch.randn(2, 8, 64)
    cos, sin = gpt.cos[:8].unsqueeze(0), gpt.sin[:8].unsqueeze(0)
    n = block.norm_1(x)
    y = x + block.attn(n, cos, sin) + block.mlp(n)
    torch.testing.assert_close(block(x, cos, sin), y + block.moe(block.norm_3(y)))


def test_experts_after_the_mlp_say_nothing_at_the_start():
    dense = Config.from_name("phi1-test")
    gpt, plain = model(AFTER, n_shared_expert=1), GPT(dense)
    initialize(gpt, "gpt2")
    missing, unexpected = plain.load_state_dict(gpt.state_dict(), strict=False)
    assert not missing
    assert all(".moe." in key or ".norm_3." in key for key in unexpected)
    assert torch.equal(gpt(IDS), plain(IDS))
    gpt(IDS).square().mean().backward()
    assert all(layer.experts.proj.weight.grad.abs().max() > 0 for layer in layers(gpt))


@pytest.mark.parametrize("placement", ["instead", "after"])
def test_every_second_layer_has_experts_and_the_others_an_mlp(placement):
    gpt = model(moe=dict(placement=placement, every=2), n_layer=5)
    having = [
        isinstance(block.mlp, PhiMoE) or isinstance(block, ExpertsAfter)
        for block in gpt.transformer.h
    ]
    assert having == [False, True, False, True, False]
    assert all(type(block.mlp) is GptNeoxMLP for block in gpt.transformer.h[::2])


def test_gated_experts_stand_among_gated_mlps():
    gpt = model(moe=dict(activation="swiglu", every=2), intermediate_size=96)
    assert type(gpt.transformer.h[0].mlp) is LLaMAMLP
    assert gpt.transformer.h[1].mlp.experts.fc.weight.shape == (4, 2 * 128, 64)
    gpt(IDS).sum().backward()


def test_dropout_reaches_what_the_experts_add():
    gpt = model(AFTER)
    apply_dropout(gpt, residual=0.5)
    for layer in layers(gpt):
        torch.nn.init.normal_(layer.experts.proj.weight)
    block = gpt.transformer.h[0]
    assert isinstance(block.post_moe_norm, torch.nn.Dropout)
    assert not torch.equal(gpt(IDS), gpt(IDS))
    gpt.eval()
    assert torch.equal(gpt(IDS), gpt(IDS))


def test_shared_experts_see_every_token():
    gpt = model(n_shared_expert=2)
    layer = layers(gpt)[0]
    assert layer.shared_experts.fc.weight.shape == (1, 2 * 128, 64)
    x = torch.randn(3, 5, 64)
    routed = copy.deepcopy(layer)
    routed.shared_experts = None
    shared = layer.shared_experts
    a = torch.nn.functional.gelu(x @ shared.fc.weight[0].T + shared.fc.bias[0], approximate="tanh")
    expected = routed(x) + a @ shared.proj.weight[0].T + shared.proj.bias[0]
    torch.testing.assert_close(layer(x), expected)


# -------------------------------------------------------------------------------- what surrounds it


def test_stacks_and_router_count_as_matrices_and_are_drawn_as_linear_layers():
    gpt = model(INSTEAD, n_layer=8)
    matrices, others = split_parameters(gpt)
    for part in ("gate.weight", "experts.fc.weight", "experts.proj.weight"):
        assert f"transformer.h.0.mlp.{part}" in matrices
    assert "transformer.h.0.mlp.experts.fc.bias" in others
    initialize(gpt, "gpt2")
    experts = layers(gpt)[0].experts
    assert experts.fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert experts.proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert experts.fc.bias.abs().max() == 0


def test_litgpts_flop_count_runs_on_the_meta_device_and_counts_active_experts():
    def flops(gpt):
        with FlopCounterMode(display=False) as counter:
            out = gpt(torch.zeros(2, 24, dtype=torch.int64, device="meta"))
            targets = torch.zeros(2, 24, dtype=torch.int64, device="meta")
            chunked_cross_entropy(out, targets, chunk_size=0).backward()
        return counter.get_total_flops()

    with torch.device("meta"):
        moe, dense = model(INSTEAD), GPT(Config.from_name("phi1-test"))
    routers = 2 * 48 * 2 * 64 * 4  # layers, tokens, multiply and add
    assert flops(moe) == flops(dense) + 3 * routers  # forward and both gradients


@pytest.mark.slow
def test_compiled_gradients_are_those_of_eager_code():
    """In one graph per block: inputs that a compiler once got wrong (see `routing._pick`)."""

    def gradients(backend):
        torch._dynamo.reset()
        gpt = model(n_layer=1)
        for layer in layers(gpt):
            layer.balance_weight, layer.router_z_weight = 0.01, 0.001
            layer.auxiliary_scale = torch.tensor(0.5)
        if backend:
            compile_blocks(gpt, backend=backend, fullgraph=True)
        LossModel(gpt)(IDS[:, :-1], IDS[:, 1:]).backward()
        return {name: parameter.grad for name, parameter in gpt.named_parameters()}

    plain = gradients(None)
    torch.testing.assert_close(gradients("inductor"), plain, rtol=1e-4, atol=1e-6)


def test_a_block_is_one_graph():
    torch._dynamo.reset()
    gpt, plain = model(AFTER, n_layer=1), model(AFTER, n_layer=1)
    compile_blocks(gpt, backend="aot_eager", fullgraph=True)
    gpt(IDS).square().mean().backward()
    plain(IDS).square().mean().backward()
    for ours, theirs in zip(gpt.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def test_generation_with_a_cache_continues_as_without():
    gpt = model(AFTER).eval()
    torch.nn.init.normal_(layers(gpt)[0].experts.proj.weight)
    ids = IDS[:1]
    with torch.no_grad():
        whole = gpt(ids)
        gpt.set_kv_cache(batch_size=1)
        steps = [gpt(ids[:, :20], torch.arange(20))]
        steps += [gpt(ids[:, i : i + 1], torch.tensor([i])) for i in range(20, 24)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "moe", "changes"),
    [
        (INSTEAD, dict(placement="instead"), {}),
        (AFTER, dict(placement="after", every=2), dict(n_shared_expert=1)),
    ],
)
def test_weights_go_to_the_hubs_layout_and_back_bitwise(tmp_path, monkeypatch, name, moe, changes):
    gpt = model(name, moe=moe, **changes)
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter)
    for layer in layers(gpt):
        layer.gate.selection_bias.normal_()
    torch.save(gpt.state_dict(), tmp_path / "lit_model.pth")
    save_config(gpt.config, tmp_path)
    convert_lit_checkpoint(tmp_path, tmp_path / "hub")
    hub = torch.load(tmp_path / "hub" / "model.pth")
    step = "moe" if "after" in name else "mlp"
    assert hub[f"model.layers.1.{step}.experts.3.fc1.weight"].shape == (128, 64)
    back = tmp_path / name
    back.mkdir()
    halves = list(hub)[::2], list(hub)[1::2]  # an expert's stack is spread over files
    for number, names in enumerate(halves):
        torch.save({key: hub[key] for key in names}, back / f"pytorch_model-{number}.bin")
    monkeypatch.setitem(litgpt.config.name_to_config, name, registered(gpt.config))
    convert_hf_checkpoint(back)
    again = torch.load(back / "lit_model.pth")
    assert again.keys() == gpt.state_dict().keys()
    assert all(torch.equal(value, again[key]) for key, value in gpt.state_dict().items())


def test_config_survives_its_file(tmp_path):
    config = Config.from_name(AFTER)
    save_config(config, tmp_path)
    assert (
        yaml.safe_load((tmp_path / "model_config.yaml").read_text())["mlp_class_name"] == "PhiMoE"
    )
    assert Config.from_file(tmp_path / "model_config.yaml") == config


@pytest.mark.parametrize(
    ("saved", "built", "words"),
    [
        ("phi1-test", INSTEAD, "checkpoint has an MLP without experts, the model has experts inst"),
        ("phi1-test", AFTER, "checkpoint has an MLP without experts, the model has experts after"),
        (AFTER, INSTEAD, "checkpoint has experts after the MLP, the model has experts instead"),
        (INSTEAD, AFTER, "checkpoint has experts instead of the MLP, the model has experts after"),
    ],
)
def test_a_checkpoint_of_another_layout_is_one_clear_line(saved, built, words):
    with pytest.raises(MoEError, match=words) as caught:
        model(built).load_state_dict(model(saved).state_dict())
    assert "upcycle" in str(caught.value)
    assert caught.value.for_users
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "moe", "words"),
    [
        (dict(n_expert_per_token=5), {}, "n_expert_per_token is 5, but the model has 4 experts"),
        (dict(n_expert=0), {}, "n_expert is 0"),
        (dict(n_expert_per_token=0), {}, "choose 1 to 4"),
        ({}, dict(placment="after"), "no key 'placment', did you mean 'placement'"),
        ({}, dict(placement="before"), "placement is 'before'; it can be instead, after"),
        ({}, dict(every=3), "every is 3; choose 1 to 2"),
        ({}, dict(every=True), "every is True"),
        ({}, dict(activation="relu"), "activation is 'relu'; it can be gelu, swiglu"),
        ({}, "after", "hf_config.moe is 'after'; it must be a mapping"),
        (dict(moe_intermediate_size=0), {}, "moe_intermediate_size is 0"),
        (dict(n_expert_groups=3), {}, "leave n_expert_groups out"),
        (dict(first_k_dense_replace=1), {}, "no first_k_dense_replace"),
    ],
)
def test_settings_that_make_no_sense_are_told_when_the_config_is_made(changes, moe, words):
    with pytest.raises(UserError, match=words):
        Config.from_name(INSTEAD, hf_config={"name": INSTEAD, "moe": moe}, **changes)


def test_all_faults_are_told_at_once():
    with pytest.raises(UserError, match=r"n_expert_per_token is 9.*placement is 1"):
        moe = dict(name=INSTEAD, moe=dict(placement=1))
        Config.from_name(INSTEAD, n_expert_per_token=9, hf_config=moe)
