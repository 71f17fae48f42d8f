"""`phi-lit export`: transformers computes the same from it, LitGPT gets the same back, and what
cannot be exported is refused before anything is written."""

import json
import os
import resource
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import cut_short, write_checkpoint
from litgpt import GPT, Config
from litgpt.utils import save_config

from phi_lit.errors import UserError
from phi_lit.export.command import export

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = dict(
    n_layer=2, n_embd=64, n_head=4, head_size=16, block_size=64, vocab_size=320,
    padded_vocab_size=320, intermediate_size=96, n_query_groups=2,
)  # fmt: skip
SHAPES = {
    "phi": ("phi1-test", {}, False),
    "phi, one key and value head for all, tied": ("phi1-test", dict(n_query_groups=1), True),
    "phi-2's proportions": ("phi-2", {**SMALL, "n_query_groups": 4}, False),
    "Pythia": ("pythia-14m", {**SMALL, "n_query_groups": 4}, False),
    "Llama, scaled positions": ("Llama-3.2-1B", SMALL, False),
    "Llama, tied": ("SmolLM2-135M", SMALL, True),
    "Qwen2.5, tied": ("Qwen2.5-0.5B", SMALL, True),
}


def hub_logits(directory, ids, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    with torch.inference_mode():
        return model(ids).logits


def litgpt_logits(model, ids):
    with torch.inference_mode():
        return model.eval()(ids)


def some_ids(config, length=48):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (2, length), generator=generator)


def back_in_litgpt(directory):
    """`litgpt convert_to_litgpt DIRECTORY`: the weights and the configuration."""
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    convert_hf_checkpoint(directory)
    weights = torch.load(directory / "lit_model.pth", weights_only=True)
    return weights, Config.from_file(directory / "model_config.yaml")


def assert_same_weights(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.fixture
def tiny(tiny_checkpoint_dir, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint_dir, tmp_path / "phi1-test"))


@pytest.mark.parametrize(("name", "changes", "tied"), SHAPES.values(), ids=SHAPES)
def test_transformers_computes_the_same_and_litgpt_gets_the_same_back(
    name, changes, tied, tiny_tokenizer_dir, tmp_path
):
    config = Config.from_name(name, **changes)
    model = write_checkpoint(tmp_path / "lit", tiny_tokenizer_dir, config, tied=tied)
    export(tmp_path / "lit", tmp_path / "hub")
    ids = some_ids(config)
    ours, theirs = litgpt_logits(model, ids), hub_logits(tmp_path / "hub", ids)
    assert ours.std() > 0.1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    words = json.loads((tmp_path / "hub" / "config.json").read_text())
    # Where LitGPT would not make the head anew on the way back, both matrices are written.
    assert words["tie_word_embeddings"] is (tied and "phi" not in name)
    assert words["vocab_size"] == config.padded_vocab_size
    weights, found = back_in_litgpt(tmp_path / "hub")
    assert_same_weights(weights, model.state_dict())
    assert found == config


def test_a_mixture_that_transformers_has_is_exported_with_its_own_config(
    tiny_tokenizer_dir, tmp_path
):
    config = Config.from_name("Mixtral-8x7B-v0.1", **SMALL, n_expert=4)
    model = write_checkpoint(tmp_path / "lit", tiny_tokenizer_dir, config)
    transformers.MixtralConfig(
        vocab_size=7,  # of before the vocabulary was resized
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=96, max_position_embeddings=64, num_local_experts=4,
        num_experts_per_tok=2, rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.rope_base)},
    ).save_pretrained(tmp_path / "lit")  # fmt: skip
    export(tmp_path / "lit", tmp_path / "hub")
    ids = some_ids(config)
    theirs = hub_logits(tmp_path / "hub", ids)
    torch.testing.assert_close(theirs, litgpt_logits(model, ids), rtol=0, atol=1e-5)
    assert_same_weights(back_in_litgpt(tmp_path / "hub")[0], model.state_dict())


def test_real_weights_go_to_transformers_and_back(smollm2, tmp_path):
    """SmolLM2-135M, in several files: the logits on real text, and every weight on the way back."""
    export(smollm2, tmp_path / "hub", max_shard_size="200MB", verify=False)
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 3
    assert all((tmp_path / "hub" / file).stat().st_size < 200_100_000 for file in files)
    config = Config.from_file(smollm2 / "model_config.yaml")
    wanted = torch.load(smollm2 / "lit_model.pth", mmap=True, weights_only=True)
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict(wanted, assign=True)
    model.cos, model.sin = model.rope_cache()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    text = "Every prime number greater than 2 is odd, because an even one has 2 as a divisor."
    ids = tokenizer(text, return_tensors="pt").input_ids
    ours, theirs = litgpt_logits(model, ids), hub_logits(tmp_path / "hub", ids)
    assert (theirs - ours).abs().max() <= 1e-5 * ours.std()  # they go up to 41
    weights, found = back_in_litgpt(tmp_path / "hub")
    assert_same_weights(weights, wanted)
    assert found == config


def test_the_pipeline_writes_what_litgpt_writes(tiny, tmp_path):
    from litgpt.generate.base import generate
    from litgpt.tokenizer import Tokenizer

    export(tiny, tmp_path / "hub")
    write = transformers.pipeline("text-generation", str(tmp_path / "hub"), device="cpu")
    written = write("def f(x):", max_new_tokens=12, do_sample=False)[0]["generated_text"]
    config = Config.from_file(tiny / "model_config.yaml")
    model = GPT(config).eval()
    model.load_state_dict(torch.load(tiny / "lit_model.pth"))
    model.set_kv_cache(1)
    tokenizer = Tokenizer(tiny)
    prompt = tokenizer.encode("def f(x):")
    ids = generate(model, prompt, len(prompt) + 12, temperature=0.0, eos_id=tokenizer.eos_id)
    assert written == write.tokenizer.decode(ids, skip_special_tokens=True)
    assert len(written) > len("def f(x):")


@pytest.mark.parametrize(("word", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_other_number_formats_round_once(word, dtype, tiny, tmp_path):
    export(tiny, tmp_path / "hub", dtype=word)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert model.dtype == getattr(torch, dtype)
    weights, _ = back_in_litgpt(tmp_path / "hub")
    wanted = torch.load(tiny / "lit_model.pth")
    assert_same_weights(weights, {n: t.to(getattr(torch, dtype)) for n, t in wanted.items()})


def test_files_are_no_larger_than_asked_and_none_is_missing(tiny, tmp_path):
    export(tiny, tmp_path / "hub", max_shard_size="100KB")
    index = json.loads((tmp_path / "hub" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {path.name for path in (tmp_path / "hub").glob("*.safetensors")}
    assert len(files) > 5
    alone = {file for file in files if list(index["weight_map"].values()).count(file) == 1}
    sizes = {file: (tmp_path / "hub" / file).stat().st_size for file in files - alone}
    assert max(sizes.values()) < 100_000 + 2_000  # the header
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "hub").iterdir()}
    assert len(modes) == 1  # safetensors' own files would be their owner's alone


def test_a_resized_vocabulary_keeps_its_rows_and_its_new_token(tiny, tmp_path):
    """From 512 rows to 258, the tokenizer's 257 ids and one that was added, as Orca adds [PAD]."""
    from tokenizers import AddedToken, Tokenizer

    config = Config.from_name("phi1-test", vocab_size=258, padded_vocab_size=258)
    state = torch.load(tiny / "lit_model.pth")
    for name in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias"):
        state[name] = state[name][:258].clone()
    torch.save(state, tiny / "lit_model.pth")
    save_config(config, tiny)
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("[PAD]")])
    tokenizer.save(str(tiny / "tokenizer.json"))
    settings = json.loads((tiny / "tokenizer_config.json").read_text())
    (tiny / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "[PAD]"}))
    export(tiny, tmp_path / "hub")
    hub = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert hub.get_input_embeddings().weight.shape == (258, 64)
    assert hub.config.pad_token_id == hub.generation_config.pad_token_id == 257
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hub").pad_token_id == 257
    weights, found = back_in_litgpt(tmp_path / "hub")
    assert_same_weights(weights, state)
    assert found == config  # and not phi1-test's own 512 rows


def test_a_training_run_is_exported_with_its_recipe_data_and_loss(
    tiny_tokenizer_dir, tmp_path, monkeypatch
):
    """`litgpt pretrain`, then `phi-lit export final`: the card tells what the run recorded."""
    import litgpt.pretrain
    from huggingface_hub import ModelCard
    from jsonargparse import CLI, set_docstring_parse_options

    monkeypatch.chdir(tmp_path)
    set_docstring_parse_options(attribute_docstrings=True)
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / "text" / f"{number}.txt").write_text(
            f"def f{number}(x):\n    return {number}\n" * 9
        )
    sources = [{"path": "text", "licence": "CC0-1.0", "name": "functions"}]
    recipe = {
        "model_name": "phi1-test", "out_dir": "out", "precision": "32-true", "logger_name": "csv",
        "tokenizer_dir": str(tiny_tokenizer_dir),
        "data": {
            "class_path": "CodeTextbook",
            "init_args": {"sources": sources, "val_fraction": 0.2, "num_workers": 1},
        },
        "train": {
            "global_batch_size": 4, "micro_batch_size": 4, "max_steps": 3, "save_interval": 3,
            "lr_schedule": "linear", "lr_warmup_steps": 1, "compile": "off",
        },
        "eval": {"interval": 3, "max_iters": 2},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(recipe))
    CLI(litgpt.pretrain.setup, args=["--config", "run.yaml"])
    export(Path("out/final"), Path("hub"), license="apache-2.0")
    card = ModelCard.load("hub/README.md")
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    loss = [row["val_loss"] for row in rows if "val_loss" in row][-1]
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.eval_results[0].metric_value == pytest.approx(loss)
    assert f"| held-out loss, nats per token | {loss:.4f} |" in card.text
    assert "step 3" in card.text
    assert "- functions: licence CC0-1.0" in card.text
    assert "litgpt pretrain --config hyperparameters.yaml" in card.text
    assert yaml.safe_load(Path("hub/hyperparameters.yaml").read_text())["train"]["max_steps"] == 3
    config = Config.from_file("out/final/model_config.yaml")
    model = GPT(config)
    model.load_state_dict(torch.load("out/final/lit_model.pth")["model"])
    ids = some_ids(config)
    torch.testing.assert_close(hub_logits("hub", ids), litgpt_logits(model, ids), rtol=0, atol=1e-5)
    in_checkpoint = json.loads(Path("out/final/config.json").read_text())
    assert in_checkpoint["architectures"] == ["PhiForCausalLM"]
    assert in_checkpoint["eos_token_id"] == 256


def test_lora_is_exported_once_it_is_merged(tiny, tmp_path, monkeypatch):
    """`litgpt finetune_lora`'s checkpoint before `litgpt merge_lora` and after it."""
    from litgpt.lora import GPT as LoraGPT
    from litgpt.lora import Config as LoraConfig
    from litgpt.lora import lora_filter
    from litgpt.scripts.merge_lora import merge_lora

    lora = dict(lora_r=4, lora_alpha=8, lora_query=True, lora_value=True, lora_projection=True)
    model = LoraGPT(LoraConfig.from_file(tiny / "model_config.yaml", **lora)).eval()
    model.load_state_dict(torch.load(tiny / "lit_model.pth"), strict=False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned = tmp_path / "tuned"
    shutil.copytree(tiny, tuned, ignore=shutil.ignore_patterns("lit_model.pth"))
    weights = {
        name: value for name, value in model.state_dict().items() if lora_filter(name, value)
    }
    torch.save({"model": weights}, tuned / "lit_model.pth.lora")
    recorded = {"checkpoint_dir": str(tiny), "precision": "32-true", "access_token": "hf_secret"}
    (tuned / "hyperparameters.yaml").write_text(yaml.safe_dump({**recorded, **lora}))
    with pytest.raises(UserError, match=r"LoRA weights are not merged yet.*litgpt merge_lora"):
        export(tuned, tmp_path / "hub")
    merge_lora(tuned)
    export(tuned, tmp_path / "hub")
    ids = some_ids(model.config)
    ours = litgpt_logits(model, ids)
    torch.testing.assert_close(hub_logits(tmp_path / "hub", ids), ours, rtol=0, atol=1e-5)
    assert (ours - hub_logits_of_base(tiny, ids)).abs().max() > 0.01
    assert "litgpt finetune_lora" in (tmp_path / "hub" / "README.md").read_text()
    for path in (tmp_path / "hub").glob("*.[my]*"):
        assert "hf_secret" not in path.read_text()


def hub_logits_of_base(directory, ids):
    model = GPT(Config.from_file(directory / "model_config.yaml")).eval()
    model.load_state_dict(torch.load(directory / "lit_model.pth"))
    return litgpt_logits(model, ids)


def test_the_harness_s_scores_are_in_the_card(tiny, tmp_path):
    from huggingface_hub import ModelCard

    results = {
        "results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.25, "acc_stderr,none": 0.01}},
        "n-shot": {"arc_easy": 5},
    }
    (tiny / "evaluate").mkdir()
    (tiny / "evaluate" / "results.json").write_text(json.dumps(results))
    export(tiny, tmp_path / "hub")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert "| arc_easy, acc | 0.2500 | lm-eval, 5-shot |" in card.text
    [result] = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        "arc_easy",
        "acc",
        0.25,
    )


def test_a_tokenizer_class_that_changes_the_ids_is_replaced(tiny, tmp_path):
    """The tiny tokenizer calls itself GPT-2's but has none of GPT-2's merges."""
    export(tiny, tmp_path / "hub")
    hub = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    text = "  def f(x):\t# Größe\n"
    assert hub(text).input_ids == hub.backend_tokenizer.encode(text).ids
    assert hub.decode(hub(text).input_ids) == text
    assert hub.eos_token_id == 256


def test_how_the_base_model_stops_is_kept_and_its_broken_json_mended(tiny, tmp_path):
    (tiny / "generation_config.json").write_text('{"eos_token_id": [256, 10], "top_p": 0.6,}')
    export(tiny, tmp_path / "hub")
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "hub")
    assert (found.eos_token_id, found.top_p) == ([256, 10], 0.6)
    (tiny / "generation_config.json").write_text("{")
    refused("cannot be opened by LitGPT: Failed to parse JSON", tiny, tmp_path / "other")


# ------------------------------------------------------------------------------- memory and disk


def anonymous_mb():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1000
    pytest.skip("this kernel does not count anonymous memory")


@pytest.mark.parametrize(("dtype", "shard", "limit"), [(None, "5GB", 20), ("bf16", "10MB", 50)])
def test_the_weights_are_never_in_memory_as_a_whole(
    dtype, shard, limit, tmp_path, tiny_tokenizer_dir
):
    """118 MB of them: unchanged they go from file to file, cast one output file at a time."""
    config = Config.from_name("phi1-test", n_layer=36, n_embd=256, n_head=4)
    write_checkpoint(tmp_path / "lit", tiny_tokenizer_dir, config)
    size = (tmp_path / "lit" / "lit_model.pth").stat().st_size / 1e6
    assert size > 110
    export(tmp_path / "lit", tmp_path / "warm", verify=False)  # imports and their memory
    peak, done = [0.0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_mb())

    before = anonymous_mb()
    watcher = threading.Thread(target=watch)
    watcher.start()
    export(tmp_path / "lit", tmp_path / "hub", dtype=dtype, max_shard_size=shard, verify=False)
    done.set()
    watcher.join()
    assert peak[0] - before < limit


def test_a_full_disk_is_one_line_and_leaves_the_old_export(tiny, tmp_path):
    export(tiny, tmp_path / "hub")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*hub: the file size limit is reached"):
            export(tiny, tmp_path / "hub")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"phi1-test", "hub"}


def test_too_little_room_is_told_before_writing(tiny, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"the export needs 0\.00 GB, but only"):
        export(tiny, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


# -------------------------------------------------------------------------------------- bad input


def refused(match, checkpoint, out_dir, **options):
    """Export, expect one line, and nothing beside the checkpoint."""
    with pytest.raises(UserError, match=match) as caught:
        export(checkpoint, out_dir, **options)
    assert "\n" not in str(caught.value)
    assert not out_dir.exists()


def test_what_is_no_whole_checkpoint_is_named(tiny, tmp_path):
    hub = tmp_path / "hub"
    refused("there is no checkpoint directory", tmp_path / "nowhere", hub)
    weights = tiny / "lit_model.pth"
    weights.rename(tiny / "away")
    refused(r"has no lit_model\.pth: it is no LitGPT checkpoint", tiny, hub)
    (tiny / "shard-00000-of-00002.pth").touch()
    refused(r"in shards\. Run `phi-lit consolidate .*phi1-test` first", tiny, hub)
    (tiny / "lit_model.pth.adapter_v2").touch()
    refused("it is an adapter", tiny, hub)
    (tiny / "away").rename(weights)
    config = (tiny / "model_config.yaml").read_text()
    (tiny / "model_config.yaml").write_text("n_layer: [")
    refused("is not a model's configuration", tiny, hub)
    (tiny / "model_config.yaml").unlink()
    refused(r"has no model_config\.yaml", tiny, hub)
    (tiny / "model_config.yaml").write_text(config.replace("n_layer: 2", "n_layer: 3"))
    refused(r"does not fit model_config\.yaml.*transformer\.h\.2\.\S+ is missing", tiny, hub)
    (tiny / "model_config.yaml").write_text(config)
    cut_short(weights)
    refused("cut short", tiny, hub)


def test_a_tokenizer_that_does_not_belong_to_the_model_is_refused(tiny, tmp_path):
    save_config(Config.from_name("phi1-test", vocab_size=200, padded_vocab_size=200), tiny)
    refused(r"ids up to 256, but the model's embedding has 200 rows", tiny, tmp_path / "hub")
    (tiny / "tokenizer.json").write_text("{")
    refused("no tokenizer that `tokenizers` reads", tiny, tmp_path / "hub")
    (tiny / "tokenizer.json").unlink()
    refused("has no tokenizer", tiny, tmp_path / "hub")


@pytest.mark.parametrize("name", ["phi1-test-moe", "phi1-test-moe-after"])
def test_a_mixture_of_experts_of_ours_is_refused(name, tiny_tokenizer_dir, tmp_path):
    write_checkpoint(tmp_path / "lit", tiny_tokenizer_dir, Config.from_name(name))
    refused("is a mixture of experts.*no architecture of", tmp_path / "lit", tmp_path / "hub")


def test_what_no_architecture_computes_is_refused_with_the_setting(tiny_tokenizer_dir, tmp_path):
    config = Config.from_name("phi1-test", parallel_residual=False, shared_attention_norm=False)
    write_checkpoint(tmp_path / "lit", tiny_tokenizer_dir, config)
    refused(r"differs in parallel_residual \(here False", tmp_path / "lit", tmp_path / "hub")
    config = Config.from_name("Gemma-2-2b", **SMALL)
    write_checkpoint(tmp_path / "gemma", tiny_tokenizer_dir, config)
    refused("models like phi, Llama", tmp_path / "gemma", tmp_path / "hub")


def test_another_models_config_json_is_refused_by_shape_or_by_what_it_computes(tiny, tmp_path):
    export(tiny, tmp_path / "right")
    words = json.loads((tmp_path / "right" / "config.json").read_text())
    for changes, match in (
        ({"intermediate_size": 128}, "do not fit transformers' PhiForCausalLM"),
        ({"model_type": "nonsense"}, "model_type 'nonsense'"),
        ({"rope_parameters": {**words["rope_parameters"], "rope_theta": 500.0}}, "logits differ"),
        ({"hidden_act": "relu"}, "logits differ"),
    ):
        (tiny / "config.json").write_text(json.dumps(words | changes))
        refused(match, tiny, tmp_path / "hub")
    (tiny / "config.json").write_text("{")
    refused("is broken JSON", tiny, tmp_path / "hub")


def test_code_named_by_a_config_json_is_neither_run_nor_passed_on(tiny, tmp_path):
    export(tiny, tmp_path / "plain")
    words = json.loads((tmp_path / "plain" / "config.json").read_text())
    words["auto_map"] = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.Evil",
    }
    words["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tiny / "config.json").write_text(json.dumps(words))
    settings = json.loads((tiny / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.EvilConfig", None]}
    (tiny / "tokenizer_config.json").write_text(json.dumps(settings))
    trace = tmp_path / "ran"
    (tiny / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass EvilConfig: pass\n")
    export(tiny, tmp_path / "hub")
    assert not trace.exists()
    for name in ("config.json", "tokenizer_config.json"):
        written = json.loads((tmp_path / "hub" / name).read_text())
        assert not written.keys() & {"auto_map", "quantization_config"}
    assert not (tmp_path / "hub" / "evil.py").exists()


def test_a_directory_that_is_not_ours_is_left_alone(tiny, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"exists and is not an export of ours.*--overwrite true"):
        export(tiny, precious)
    assert os.listdir(precious) == ["thesis.txt"]
    export(tiny, precious, overwrite=True)
    assert (precious / "config.json").is_file()
    export(tiny, precious, dtype="bf16")  # our own is replaced without a question
    with pytest.raises(UserError, match="out_dir is the checkpoint itself"):
        export(tiny, tiny, overwrite=True)
    with pytest.raises(UserError, match="holds the checkpoint"):
        export(tiny, tmp_path, overwrite=True)
    assert (tiny / "lit_model.pth").is_file()


def test_options_that_make_no_sense_are_refused(tiny, tmp_path):
    hub = tmp_path / "hub"
    refused("max_shard_size is 'huge'; give a size such as", tiny, hub, max_shard_size="huge")
    refused("license is 'MIT License'", tiny, hub, license="MIT License")
    refused("say where, with push OWNER/NAME", tiny, hub, dry_run=True)


def test_the_command_line_writes_beside_the_checkpoint(tiny, monkeypatch, capsys):
    from phi_lit.__main__ import main

    monkeypatch.setattr(sys, "argv", ["phi-lit", "export", str(tiny), "--dtype=bf16"])
    assert main() == 0
    out = capsys.readouterr().out
    assert f"{tiny}-hub: 8 files" in out
    assert "logits within" in out
    assert (tiny.parent / "phi1-test-hub" / "model.safetensors").is_file()
