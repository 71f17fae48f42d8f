"""LitGPT's model under our configs against transformers' PhiForCausalLM, and weights both ways."""

import pytest
import torch
from litgpt import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.utils import save_config

transformers = pytest.importorskip("transformers")

SHAPES = {
    "phi1-test: 2 layers, heads of 32, 16 rotated": ("phi1-test", {}),
    "phi1-nano: 6 layers, heads of 32, 16 rotated": ("phi1-nano", {}),
    "phi1-nano-codegen: the padded codegen vocabulary": ("phi1-nano-codegen", dict(n_layer=1)),
    "phi1-small, 2 of 20 layers: heads of 64, 32 rotated": ("phi1-small", dict(n_layer=2)),
    "phi-1, 1 of 24 layers and 4,096 ids": (
        "phi-1",
        dict(n_layer=1, vocab_size=4096, padded_vocab_size=4096),
    ),
}


def hub_config(config: Config):
    """Return the same model in transformers' words, as microsoft/phi-1 publishes itself."""
    return transformers.PhiConfig(
        vocab_size=config.padded_vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        max_position_embeddings=config.block_size,
        layer_norm_eps=config.norm_eps,
        hidden_act="gelu_new",
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(config.rope_base),
            "partial_rotary_factor": config.rotary_percentage,
        },
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def random_model(config: Config) -> GPT:
    """Build a model whose biases and norms are random too, so that none of them can be lost."""
    torch.manual_seed(7)
    model = GPT(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name or "ln_f" in name:
            torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("weight") else 0.0, std=0.1)
    return model


def to_hub(model: GPT, directory):
    """Write the model with LitGPT, convert it with LitGPT, load it strictly with transformers."""
    source, target = directory / "lit", directory / "hub"
    source.mkdir()
    torch.save(model.state_dict(), source / "lit_model.pth")
    save_config(model.config, source)
    convert_lit_checkpoint(source, target)
    hub = transformers.PhiForCausalLM(hub_config(model.config)).eval()
    hub.load_state_dict(torch.load(target / "model.pth"))
    return hub


@pytest.mark.parametrize(("name", "changes"), SHAPES.values(), ids=SHAPES)
def test_logits_equal_transformers_phi(name, changes, tmp_path, record_property):
    model = random_model(Config.from_name(name, **changes))
    hub = to_hub(model, tmp_path)
    ids = torch.randint(model.config.vocab_size, (2, min(64, model.config.block_size)))
    with torch.inference_mode():
        ours, theirs = model(ids), hub(ids).logits
    difference = (ours - theirs).abs().max().item()
    record_property("max_abs_difference", difference)
    print(f"{name} {changes}: logits differ by at most {difference:.2e}, std {ours.std():.2f}")
    assert ours.std() > 0.1  # logits that are all zero would agree with anything
    assert difference <= 1e-4


@pytest.mark.parametrize("name", ["phi1-test", "phi1-small"])
def test_weights_come_back_bitwise_from_the_hub_format(name, tmp_path):
    model = random_model(Config.from_name(name, n_layer=2))
    hub = to_hub(model, tmp_path)
    checkpoint = tmp_path / "back"
    hub.save_pretrained(checkpoint)
    convert_hf_checkpoint(checkpoint, model_name=name)
    back = torch.load(checkpoint / "lit_model.pth")
    before = model.state_dict()
    assert back.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(back[key], value), key


def test_hub_weights_of_transformers_own_making_give_the_same_logits_in_litgpt(tmp_path):
    config = Config.from_name("phi1-test")
    torch.manual_seed(3)
    hub = transformers.PhiForCausalLM(hub_config(config)).eval()
    hub.save_pretrained(tmp_path)
    convert_hf_checkpoint(tmp_path, model_name="phi1-test")
    model = GPT(config).eval()
    model.load_state_dict(torch.load(tmp_path / "lit_model.pth"))
    ids = torch.randint(512, (1, 64))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), hub(ids).logits, rtol=0, atol=1e-4)
