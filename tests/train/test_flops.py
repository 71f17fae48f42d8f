"""Parameters and FLOPs per token against published figures and a slow count; peaks by name."""

import pytest
import torch
from litgpt.config import Config
from litgpt.model import GPT

from phi_lit.errors import UserError
from phi_lit.train import devices, flops

PHI_1 = dict(
    block_size=2048,
    n_layer=24,
    n_embd=2048,
    n_head=32,
    vocab_size=50295,
    padded_vocab_size=51200,
    shared_attention_norm=True,
    rotary_percentage=0.5,
    lm_head_bias=True,
)
SMALL = dict(PHI_1, n_layer=20, n_embd=1024, n_head=16)


def config(**settings) -> Config:
    return Config(**dict(PHI_1, **settings))


@pytest.mark.parametrize(
    ("settings", "parameters", "giga_6n", "giga_6n_12ldt"),
    [(PHI_1, 1_418_270_720, 8.51, 9.72), (SMALL, 356_794_368, 2.14, 2.64)],
)
def test_published_models_have_published_figures(settings, parameters, giga_6n, giga_6n_12ldt):
    model = Config(**settings)
    assert flops.count_parameters(model).total == parameters
    assert round(flops.flops_per_token_6n(model) / 1e9, 2) == giga_6n
    assert round(flops.flops_per_token_6n_12ldt(model) / 1e9, 2) == giga_6n_12ldt
    assert flops.flops_per_token(model, convention="6n") == flops.flops_per_token_6n(model)


def test_parameter_count_equals_a_built_model():
    small = config(n_layer=3, n_embd=64, n_head=2, padded_vocab_size=512, vocab_size=500)
    model = GPT(small)
    count = flops.count_parameters(small)
    assert count.total == count.active == sum(p.numel() for p in model.parameters())
    assert count.block == sum(p.numel() for p in model.transformer.h[0].parameters())
    assert count.outside + 3 * count.block == count.total
    assert count.largest == 512 * 64


def test_tied_embeddings_are_counted_once():
    small = config(n_layer=1, n_embd=64, n_head=2, padded_vocab_size=512, vocab_size=500)
    tied = flops.count_parameters(small, tie_embeddings=True)
    assert flops.count_parameters(small).total - tied.total == 512 * 64


def test_key_value_heads_change_parameters_but_not_the_attention_term():
    many, one = config(), config(n_query_groups=1)
    attention = [
        flops.flops_per_token_6n_12ldt(c) - flops.flops_per_token_6n(c) for c in (many, one)
    ]
    assert attention[0] == attention[1] == 12 * 24 * 2048 * 2048
    assert flops.count_parameters(one).total < flops.count_parameters(many).total


def test_only_the_visited_experts_count_as_active():
    settings = dict(n_layer=2, n_embd=64, n_head=2, padded_vocab_size=512, vocab_size=500)
    moe = config(
        **settings,
        mlp_class_name="LLaMAMoE",
        intermediate_size=128,
        moe_intermediate_size=128,
        n_expert=8,
        n_expert_per_token=2,
        bias=False,
        shared_attention_norm=False,
    )
    count = flops.count_parameters(moe)
    one_expert = 3 * 64 * 128
    assert count.total - count.active == 2 * 6 * one_expert
    assert flops.flops_per_token_6n(moe) == 6 * count.active


def test_a_sliding_window_bounds_the_attention_term():
    windowed = config(n_layer=2, sliding_window_size=256, sliding_window_indices=[1, 0])
    difference = flops.flops_per_token_6n_12ldt(windowed) - flops.flops_per_token_6n(windowed)
    assert difference == 12 * 2048 * (256 + 2048)


def test_mfu_of_the_paper():
    """18,400 tokens/s on an A100 are 50 % as 6N and 57 % as 6N + 12LdT (2306.11644)."""
    peak = devices.gpu_named("A100").peak(torch.float16)
    assert peak is not None
    model = config()
    assert round(flops.mfu(18_400, flops.flops_per_token_6n(model), peak), 2) == 0.50
    assert round(flops.mfu(18_400, flops.flops_per_token_6n_12ldt(model), peak), 2) == 0.57


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA A10G", "a10g"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100-16"),
    ],
)
def test_drivers_names_are_recognised(reported, name):
    assert devices.gpu_reported(reported) is devices.GPUS[name]


@pytest.mark.parametrize("reported", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Imaginary 9000"])
def test_a_slice_or_an_unknown_card_is_not_taken_for_a_whole_one(reported):
    assert devices.gpu_reported(reported) is None


def test_unknown_gpu_names_the_near_ones():
    with pytest.raises(UserError, match=r"'h1000'.*Did you mean 'h100'"):
        devices.gpu_named("h1000")


def test_formats_a_card_lacks_have_no_peak():
    assert devices.GPUS["t4"].peak(torch.bfloat16) is None
    assert devices.GPUS["h100"].peak(torch.float32) == pytest.approx(66.9e12)
    assert devices.GPUS["h100"].peak(torch.float32, tf32=True) == pytest.approx(494.7e12)
    assert devices.GPUS["h100"].peak(torch.float64) is None


def test_the_processor_is_measured_once():
    first = devices.peak_for(torch.device("cpu"), torch.float32)
    assert first > 1e8  # the slowest machine this can run on
    assert devices.peak_for(torch.device("cpu"), torch.float32) == first
