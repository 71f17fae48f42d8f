"""The models: published parameter counts, the shape rules, and names that LitGPT resolves."""

import pytest
import torch
from litgpt import GPT, Config, PromptStyle
from litgpt.prompts import Default

from phi_lit.registry import CODEGEN_VOCABULARY, CONFIGS, MODELS, VOCABULARY, WITH_EXPERTS
from phi_lit.train.flops import count_parameters

PARAMETERS = {
    "phi-1": 1_418_270_720,
    "phi1-small": 356_794_368,
    "phi1-nano": 6_837_248,
    "phi1-nano-codegen": 31_001_600,
    "phi1-test": 165_888,
    "phi1-moe": 3_835_516_928,
    "phi1-small-moe": 860_663_808,
    "phi2-moe": 9_493_355_520,
    "phi1-nano-moe": 16_315_904,
    "phi1-nano-moe-after": 19_472_384,
    "phi1-test-moe": 232_832,
    "phi1-test-moe-after": 299_264,
}


@pytest.mark.parametrize("name", MODELS)
def test_parameter_count_is_exact(name):
    with torch.device("meta"):
        model = GPT(Config.from_name(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["phi1-moe", "phi1-small-moe", "phi1-nano-moe", "phi1-test-moe"])
def test_a_token_visits_as_many_parameters_as_in_the_dense_twin(name):
    """And the router, and one more bias where two kept experts add one each."""
    config = Config.from_name(name)
    dense = PARAMETERS[{"phi1-moe": "phi-1"}.get(name, name.removesuffix("-moe"))]
    extra = config.n_layer * config.n_embd * (config.n_expert + config.n_expert_per_token - 1)
    assert count_parameters(config).active == dense + extra


DENSE = [name for name, config in MODELS.items() if config not in WITH_EXPERTS]
OF_PHI_1 = [name for name in MODELS if name != "phi2-moe"]


@pytest.mark.parametrize("name", OF_PHI_1)
def test_heads_are_64_or_32_wide_and_half_rotated(name):
    config = Config.from_name(name)
    assert config.head_size in (32, 64)
    assert config.rope_n_elem == config.head_size // 2
    assert config.rope_n_elem == 32 or not name.startswith(("phi-1", "phi1-small"))


@pytest.mark.parametrize("name", DENSE)
def test_every_model_is_built_as_phi_1(name):
    with torch.device("meta"):
        model = GPT(Config.from_name(name))
    block = model.transformer.h[0]
    assert model.config.parallel_residual
    assert model.config.intermediate_size == 4 * model.config.n_embd
    assert block.norm_2 is None  # one norm per block
    assert model.transformer.ln_f.eps == block.norm_1.eps == 1e-5
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 4 * model.config.n_layer + 1
    assert all(linear.bias is not None for linear in linears)
    assert model.lm_head.weight is not model.transformer.wte.weight


def test_models_that_promise_the_codegen_tokenizer_hold_all_its_ids():
    with_experts = {"phi1-moe", "phi1-small-moe"}
    assert set(VOCABULARY) == {"phi-1", "phi1-small", "phi1-nano-codegen"} | with_experts
    for name in VOCABULARY:
        config = Config.from_name(name)
        assert (config.vocab_size, config.padded_vocab_size) == (CODEGEN_VOCABULARY, 51_200)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_one_config_under_its_name_and_its_hub_id(name):
    hub_id = "microsoft/phi-1" if name == "phi-1" else f"phi-lit/{name}"
    assert Config.from_name(name) == Config.from_name(hub_id)
    assert Config.from_name(name).name == name


def test_names_select_the_phi_weight_map_of_the_converters():
    for name in MODELS:
        assert name.startswith("phi")
        assert not name.lower().startswith(("phi-3", "phi-4"))


def test_names_are_unique():
    assert len(MODELS) == len(CONFIGS)
    assert [config["name"] for config in CONFIGS] == list(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_prompt_style_is_plain_completion(name):
    style = PromptStyle.from_config(Config.from_name(name))
    assert isinstance(style, Default)
    assert style.apply("def f():") == "def f():"
