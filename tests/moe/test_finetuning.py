"""The layer in LitGPT's LoRA and adapter models, quantized layers, and merging."""

import copy

import litgpt.adapter
import litgpt.adapter_v2
import litgpt.lora
import pytest
import torch
from litgpt import GPT, Config

NAMES = ["phi1-test-moe", "phi1-test-moe-after"]
LORA = dict(
    lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_query=True, lora_value=True,
    lora_projection=True, lora_mlp=True, lora_head=True,
)  # fmt: skip
IDS = torch.arange(24).view(2, 12) * 7 % 512


def base(name: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(Config.from_name(name, n_shared_expert=1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def variant(module, name: str, model: GPT, **options):
    config = module.Config.from_name(name, n_shared_expert=1, **options)
    made = module.GPT(config)
    missing, unexpected = made.load_state_dict(copy.deepcopy(model.state_dict()), strict=False)
    assert not unexpected
    assert all("lora_" in key or "adapter_" in key or "gating" in key for key in missing)
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["lora", "adapter", "adapter_v2"])
def test_untrained_variants_say_what_the_model_says(name, kind):
    model = base(name).eval()
    options = LORA if kind == "lora" else {}
    made = variant(getattr(litgpt, kind), name, model, **options).eval()
    torch.testing.assert_close(made(IDS), model(IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_lora_trains_router_and_experts_alone_and_merges_exactly(name):
    model = base(name)
    made = variant(litgpt.lora, name, model, **LORA)
    litgpt.lora.mark_only_lora_as_trainable(made)
    made(IDS).square().mean().backward()
    trained = {key for key, p in made.named_parameters() if p.grad is not None}
    assert trained == {key for key, _ in made.named_parameters() if "lora_" in key}
    layer = "moe" if "after" in name else "mlp"
    for part in ("gate", "experts.fc", "experts.proj", "shared_experts.fc"):
        assert f"transformer.h.1.{layer}.{part}.lora_B" in trained
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.1)
    made.eval()
    before = made(IDS)
    litgpt.lora.merge_lora_weights(made)
    torch.testing.assert_close(made(IDS), before, rtol=1e-4, atol=1e-4)
    kept = {k.replace("linear.", ""): v for k, v in made.state_dict().items() if "lora_" not in k}
    merged = GPT(model.config).eval()
    merged.load_state_dict(kept)  # as `litgpt merge_lora` writes it
    torch.testing.assert_close(merged(IDS), before, rtol=1e-4, atol=1e-4)


def test_lora_equals_adding_the_product_to_each_expert():
    """Output and gradients of the low-rank stacks, against whole weights made by hand."""
    name = NAMES[0]
    made = variant(litgpt.lora, name, base(name), **LORA).double()
    moe = made.transformer.h[0].mlp
    for stack in (moe.experts.fc, moe.experts.proj, moe.gate, moe.shared_experts.fc):
        torch.nn.init.normal_(stack.lora_B, std=0.1)
    plain = base(name).double().transformer.h[0].mlp
    for ours, theirs in (
        (moe.experts.fc, plain.experts.fc), (moe.experts.proj, plain.experts.proj),
        (moe.gate, plain.gate), (moe.shared_experts.fc, plain.shared_experts.fc),
    ):  # fmt: skip
        with torch.no_grad():
            theirs.weight += ours.scaling * ours.lora_B @ ours.lora_A
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    ours, theirs = moe(x), plain(x)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for mine, whole in ((moe.experts.fc, plain.experts.fc), (moe.gate, plain.gate)):
        wanted = mine.scaling * whole.weight.grad @ mine.lora_A.mT
        torch.testing.assert_close(mine.lora_B.grad, wanted)
        wanted = mine.scaling * mine.lora_B.mT @ whole.weight.grad
        torch.testing.assert_close(mine.lora_A.grad, wanted)


def test_adapter_scales_and_shifts_after_every_product():
    name = NAMES[0]
    made = variant(litgpt.adapter_v2, name, base(name)).double()
    moe, plain = made.transformer.h[0].mlp, base(name).double().transformer.h[0].mlp
    pairs = [
        (moe.experts.fc, plain.experts.fc), (moe.experts.proj, plain.experts.proj),
        (moe.shared_experts.proj, plain.shared_experts.proj),
    ]  # fmt: skip
    with torch.no_grad():
        for ours, theirs in pairs:
            ours.adapter_scale.normal_(1.0, 0.1)
            ours.adapter_bias.normal_(0.0, 0.1)
            theirs.bias += ours.adapter_bias
            theirs.bias *= ours.adapter_scale
            theirs.weight *= ours.adapter_scale.unsqueeze(-1)
    x = torch.randn(2, 9, 64, dtype=torch.float64)
    torch.testing.assert_close(moe(x), plain(x))
    litgpt.adapter_v2.mark_only_adapter_v2_as_trainable(made)
    made(IDS).square().mean().backward()
    assert moe.experts.fc.adapter_scale.grad.abs().max() > 0
    assert moe.experts.fc.weight.grad is None


# ----------------------------------------------------------------------------------- quantization


def with_linears(module):
    for child in list(module.modules()):
        if hasattr(child, "as_linears"):
            assert child.as_linears() is child  # "is replaced by its result": by itself
    return module


@pytest.mark.parametrize("module", [litgpt, litgpt.lora])
def test_experts_as_linears_load_stacks_and_say_the_same(module):
    model = base(NAMES[0]).eval()
    options = LORA if module is litgpt.lora else {}
    made = with_linears(module.GPT(module.Config.from_name(NAMES[0], n_shared_expert=1, **options)))
    made.load_state_dict(copy.deepcopy(model.state_dict()), strict=False)
    stacked = [key for key in made.state_dict() if key.endswith("experts.fc.weight")]
    assert not stacked
    assert any(key.endswith("mlp.experts.fc.linears.3.weight") for key in made.state_dict())
    torch.testing.assert_close(made.eval()(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # one token: the decoding path
        torch.testing.assert_close(made(IDS[:1, :1]), model(IDS[:1, :1]), rtol=1e-4, atol=1e-5)


def test_nf4_experts_on_a_cpu_are_near_the_model():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = base(NAMES[0]).eval()
    made = with_linears(copy.deepcopy(model))
    moe = made.transformer.h[0].mlp
    for stack in (moe.experts.fc, moe.experts.proj):
        for number, linear in enumerate(stack.linears):
            quantized = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, quant_type="nf4"
            )
            quantized.load_state_dict(linear.state_dict())
            stack.linears[number] = quantized.to("cpu")
            assert stack.linears[number].weight.dtype == torch.uint8
    x = torch.randn(2, 12, 64)
    ours, theirs = moe(x), model.transformer.h[0].mlp(x)
    assert 0 < (ours - theirs).norm() < 0.2 * theirs.norm()
