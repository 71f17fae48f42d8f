"""bitsandbytes on CPUs: which layers, to which bits, in how much memory, and that it learns."""

import json

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F

bnb = pytest.importorskip("bitsandbytes")

from phi_lit import quantize  # noqa: E402
from phi_lit.errors import UserError  # noqa: E402
from phi_lit.quantize import MODES, BitsandbytesPrecision, OnLoad, held_bytes  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is Lightning's own")

BYTES = {"nf4": 0.5625, "fp4": 0.5625, "nf4-dq": 0.52, "fp4-dq": 0.52, "int8": 1.02}
"""Per weight, scales included (int8: one per row, here of 64)."""


def loaded(directory, mode, dtype=torch.float32, **options):
    """Load a checkpoint as LitGPT's commands do, quantized; `options` are LoRA's."""
    from litgpt import lora, model
    from litgpt.utils import load_checkpoint

    kind = lora if options else model
    fabric = L.Fabric(devices=1, accelerator="cpu", plugins=BitsandbytesPrecision(mode, dtype))
    config = kind.Config.from_file(directory / "model_config.yaml", **options)
    with fabric.init_module(empty_init=False):
        model = kind.GPT(config)
    load_checkpoint(fabric, model, directory / "lit_model.pth", strict=not options)
    return fabric, fabric.setup_module(model.eval())


def dequantised(layer: nn.Module) -> torch.Tensor:
    """Return the weight that a quantized layer stands for, by bitsandbytes' own inverse."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        scale = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.float() * scale[:, None] / 127
    return bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()


@pytest.mark.parametrize("mode", MODES)
def test_every_linear_layer_is_quantized_and_nothing_else(talker_dir, mode):
    model = loaded(talker_dir, mode)[1].module
    plain = torch.load(talker_dir / "lit_model.pth")
    layers = {name for name, m in model.named_modules() if isinstance(m, OnLoad)}
    assert layers == {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {"lm_head", "transformer.h.0.attn.qkv", "transformer.h.1.mlp.proj"} <= layers
    for name, value in plain.items():
        owner, _, leaf = name.rpartition(".")
        if owner in layers and leaf == "weight":
            error = dequantised(model.get_submodule(owner)) - value
            assert error.norm() / value.norm() < (0.02 if mode == "int8" else 0.15)
        else:
            assert torch.equal(model.get_parameter(name), value), name
    weights = sum(value.numel() for name, value in plain.items() if value.ndim > 1)
    weights -= plain["transformer.wte.weight"].numel()
    rest = sum(value.numel() for value in plain.values()) - weights
    caches = sum(buffer.nbytes for buffer in model.buffers())
    assert held_bytes(model) - caches - 4 * rest < weights * BYTES[mode] * 1.03 + 1500 * len(layers)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_dequantised_weights(talker_dir, load_talker, mode, dtype):
    """An ordinary model in float32 that is given the weights which the quantized ones stand for."""
    _, model = loaded(talker_dir, mode, dtype)
    plain, _ = load_talker(talker_dir)
    for name, layer in model.module.named_modules():
        if isinstance(layer, OnLoad):
            plain.get_submodule(name).weight.data = dequantised(layer)
    ids = torch.arange(200, 240)[None]
    with torch.inference_mode():
        expected, logits = plain(ids), model(ids).float()
    # int8 rounds the activations too (1 %); bf16 has 8 bits, and the fused 4-bit kernel uses them
    assert (logits - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (7, 34), (100, 6400)])
def test_quantizing_in_pieces_gives_bitsandbytes_bits(monkeypatch, kind, nested, shape):
    monkeypatch.setattr(quantize, "PIECE", 6400)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole, their_state = bnb.functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=nested
    )
    packed, state = quantize._quantize_4bit(weight, kind, nested)
    assert torch.equal(packed, whole)
    ours, theirs = state.as_dict(), their_state.as_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        same = torch.equal(ours[key], value) if torch.is_tensor(value) else ours[key] == value
        assert same, key
    again = bnb.functional.dequantize_4bit(packed, state)
    assert torch.equal(again, bnb.functional.dequantize_4bit(whole, their_state))


def test_quantizing_to_int8_in_pieces_gives_bitsandbytes_bits(monkeypatch):
    monkeypatch.setattr(quantize, "PIECE", 640)
    weight = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    layer = quantize.cpu_linear("int8", torch.float32)(64, 100, bias=False)
    layer.quantize_(weight)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    assert torch.equal(layer.weight.CB, codes)
    assert torch.equal(layer.weight.SCB, scales)


def test_a_model_that_is_there_already_can_be_quantized(talker_dir, load_talker):
    model, _ = load_talker(talker_dir)
    precision = BitsandbytesPrecision("nf4", torch.float32, ignore_modules={"lm_head"})
    converted = precision.convert_module(model)
    assert isinstance(converted.transformer.h[0].attn.qkv, OnLoad)
    assert type(converted.lm_head) is nn.Linear
    built = loaded(talker_dir, "nf4")[1].module
    assert torch.equal(
        converted.transformer.h[0].attn.qkv.weight, built.transformer.h[0].attn.qkv.weight
    )


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_experts_are_quantized_too(tmp_path, mode):
    from litgpt import GPT, Config
    from litgpt.utils import save_config

    config = Config.from_name("phi1-test-moe")
    torch.manual_seed(0)
    plain = GPT(config).eval()
    torch.save(plain.state_dict(), tmp_path / "lit_model.pth")
    save_config(config, tmp_path)
    _, model = loaded(tmp_path, mode)
    stacks = [m for m in model.module.modules() if hasattr(m, "as_linears")]
    assert stacks
    assert all(isinstance(layer, OnLoad) for stack in stacks for layer in stack.linears)
    assert not [name for name, p in model.module.named_parameters() if p.ndim == 3]
    ids = torch.arange(100, 140)[None]
    with torch.inference_mode():
        expected, logits = plain(ids), model(ids)
        model.module.set_kv_cache(batch_size=1)  # one token visits few experts
        one = model(ids[:, :1], torch.tensor([0]), input_pos_maxp1=1)
    error = (logits - expected).norm() / expected.norm()
    assert error < (0.05 if mode == "int8" else 0.35)
    assert (one[0, 0] - logits[0, 0]).norm() / logits[0, 0].norm() < 0.05
    assert held_bytes(model.module) < held_bytes(plain)
    converted = BitsandbytesPrecision(mode, torch.float32).convert_module(plain)
    with torch.inference_mode():
        again = converted(ids)
    assert (again - logits).norm() / logits.norm() < 0.02


def test_qlora_learns_on_a_cpu_and_validation_does_not_stop_it(talker_dir, load_talker):
    """LoRA's gradients equal those beside the dequantised weights, also after an evaluation."""
    from litgpt.lora import GPT, mark_only_lora_as_trainable
    from litgpt.utils import num_parameters

    lora = dict(lora_r=4, lora_alpha=8, lora_query=True, lora_value=True, lora_mlp=True)
    torch.manual_seed(0)
    _, model = loaded(talker_dir, "nf4", **lora)
    mark_only_lora_as_trainable(model.module)
    counted = num_parameters(GPT(model.module.config))
    built = quantize.cpu_linear("nf4", torch.float32)(64, 128, bias=False)  # not loaded yet
    assert num_parameters(built) == 64 * 128
    assert num_parameters(model.module) == counted
    plain = GPT(model.module.config)
    plain.load_state_dict(
        {k: v for k, v in model.module.state_dict().items() if ".linear.weight" not in k},
        strict=False,
    )
    for name, layer in model.module.named_modules():
        if isinstance(layer, OnLoad):
            plain.get_submodule(name).weight.data = dequantised(layer)
    mark_only_lora_as_trainable(plain)
    ids = torch.arange(100, 164)[None]
    gradients = []
    for net in (model, plain):
        net.eval()
        with torch.no_grad():
            net(ids)
        net.train()
        logits = net(ids)
        F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        module = net.module if net is model else net
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) > 4
    for name, theirs in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], theirs, rtol=1e-3, atol=1e-6)


def test_litgpts_commands_take_our_plugin():
    import importlib

    from phi_lit.seam_table import BITSANDBYTES_USERS

    for name in BITSANDBYTES_USERS:
        assert importlib.import_module(name).BitsandbytesPrecision is BitsandbytesPrecision


def test_generate_quantized_on_a_cpu_prints_text(chatml_dir, capsys):
    from litgpt.generate.base import main

    main(chatml_dir, prompt="Hello", quantize="bnb.nf4", precision="32-true", max_new_tokens=5)
    assert "Hello" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(quantize="bnb.nf5"), ["bnb.nf5", "Did you mean 'bnb.nf4'"]),
        (dict(quantize="nf4"), ["--quantize nf4", "bnb.nf4"]),
        (dict(quantize="bnb.nf4", precision="bf16-mixed"), ["bf16-mixed", "bf16-true"]),
        (dict(prompt="  "), ["the prompt is empty"]),
        (dict(prompt="a\udce9"), ["not valid UTF-8"]),
        (dict(prompt="x" * 3000), ["3,0", "2,048 at most"]),
        (dict(prompt="x" * 2000, max_new_tokens=500), ["--max_new_tokens 500", "at most"]),
        (dict(max_new_tokens=0), ["max_new_tokens is 0"]),
        (dict(prompt="", quantize="bnb.x", max_new_tokens=-1), ["empty", "bnb.x", "-1"]),
    ],
)
def test_what_cannot_work_is_told_in_one_line_before_weights_load(chatml_dir, options, words):
    from litgpt.generate.base import main

    with pytest.raises(UserError) as caught:
        main(chatml_dir, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_little_memory_is_told_with_what_would_fit(talker_dir, monkeypatch):
    from phi_lit import checks

    state = torch.load(talker_dir / "lit_model.pth")
    for precision, size in (("32-true", 4), ("bf16-true", 2)):
        needed = checks.predicted_bytes(state, None, precision)
        assert needed == size * sum(value.numel() for value in state.values())
    for mode in MODES:
        needed = checks.predicted_bytes(state, f"bnb.{mode}", "32-true")
        model = loaded(talker_dir, mode)[1].module
        held = held_bytes(model) - sum(buffer.nbytes for buffer in model.buffers())
        assert held == pytest.approx(needed, rel=0.06)
    options = dict(precision="32-true", max_new_tokens=5)
    checks.check_inference(talker_dir, quantize=None, **options)
    monkeypatch.setattr(checks, "free_bytes", lambda *_: 500_000)
    with pytest.raises(UserError, match=r"as 32-true, but 0.0 GB are free; --quantize bnb.nf4"):
        checks.check_inference(talker_dir, quantize=None, **options)
    checks.check_inference(talker_dir, quantize="bnb.nf4", **options)


def test_without_bitsandbytes_one_line_says_how_to_get_it(run_python, chatml_dir):
    code = (
        "import sys; sys.modules['bitsandbytes'] = None; from litgpt.__main__ import main; main()"
    )
    done = run_python("-c", code, "chat", chatml_dir, "--quantize", "bnb.nf4", check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "phi_lit: error: --quantize bnb.* takes bitsandbytes: pip install 'phi-lit[quantize]'."
    ]


def test_int8_training_is_refused_on_a_cpu():
    with pytest.raises(UserError, match="int8-training needs a GPU"):
        BitsandbytesPrecision("int8-training", torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "most"), [("nf4", 240), ("int8", 265)])
def test_memory_of_a_process_truly_falls(run_python, smollm2, mode, most):
    """SmolLM2 has 311 MiB of weights in bfloat16; what a process keeps once it is loaded, in MiB.

    The quantized weights are 126 and 183; the rest is what the allocator has not given back.
    """
    code = f"""
import json, sys, torch, lightning as L
from pathlib import Path
from litgpt import GPT, Config
from litgpt.utils import load_checkpoint
from phi_lit.quantize import BitsandbytesPrecision, import_bitsandbytes
import_bitsandbytes()
def status(key):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) / 1024
plugin = BitsandbytesPrecision("{mode}", torch.bfloat16)
fabric = L.Fabric(devices=1, accelerator="cpu", plugins=plugin)
before = status("RssAnon")
with fabric.init_module(empty_init=True):
    model = GPT(Config.from_file(Path(sys.argv[1]) / "model_config.yaml", block_size=512))
load_checkpoint(fabric, model, Path(sys.argv[1]) / "lit_model.pth")
print(json.dumps([status("RssAnon") - before]))
"""
    (grown,) = json.loads(run_python("-c", code, smollm2).stdout.splitlines()[-1])
    assert grown < most
