"""`litgpt evaluate` on checkpoints that never were on the hub: the real harness, a task on disk."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from litgpt import GPT, Config
from litgpt.tokenizer import Tokenizer
from litgpt.utils import save_config

from phi_lit.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTIONS = [
    {"question": f"Is {n} prime?", "answer": int(n not in (2, 3, 5, 7, 11, 13))}
    for n in range(2, 16)
]


@pytest.fixture
def litgpt(monkeypatch, tmp_path):
    """Run `litgpt <arguments>` in this process, in an empty directory."""
    from litgpt.__main__ import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["litgpt", *map(str, arguments)])
        main()

    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def checkpoint(tiny_checkpoint_dir, tmp_path):
    return Path(shutil.copytree(tiny_checkpoint_dir, tmp_path / "phi1-test"))


@pytest.fixture
def task(tmp_path):
    """A multiple-choice task whose questions lie beside it, as lm-eval defines tasks."""
    rows = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (tmp_path / "questions.jsonl").write_text(rows)
    definition = {
        "task": "primes",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": [" yes", " no"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    path = tmp_path / "primes.yaml"
    path.write_text(yaml.safe_dump(definition))
    return path


def accuracy_by_hand(checkpoint):
    """The share of questions whose right answer is the more likely one, from LitGPT's model."""
    model = GPT(Config.from_file(checkpoint / "model_config.yaml")).eval()
    model.load_state_dict(torch.load(checkpoint / "lit_model.pth"))
    tokenizer = Tokenizer(checkpoint)
    right = 0
    for row in QUESTIONS:
        scores = []
        for choice in (" yes", " no"):
            prompt, answer = tokenizer.encode(row["question"]), tokenizer.encode(choice)
            ids = torch.cat((prompt, answer)).long()
            with torch.inference_mode():
                log_p = model(ids[None, :-1])[0].log_softmax(-1)
            scores.append(log_p.gather(1, ids[1:, None])[-len(answer) :].sum().item())
        right += scores.index(max(scores)) == row["answer"]
    return right / len(QUESTIONS)


def test_the_harness_scores_what_litgpts_own_model_does(litgpt, checkpoint, task, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(checkpoint.parent / "cache"))
    litgpt("evaluate", checkpoint, f"--tasks={task}")
    results = json.loads((checkpoint / "evaluate" / "results.json").read_text())
    expected = accuracy_by_hand(checkpoint)
    assert 0 < expected < 1
    assert results["results"]["primes"]["acc,none"] == pytest.approx(expected)


def test_without_the_harness_one_line_says_what_to_install(litgpt, checkpoint, task, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"pip install 'phi-lit\[evaluate\]'"):
        litgpt("evaluate", checkpoint, f"--tasks={task}")


def test_what_transformers_cannot_compute_is_told_before_converting(litgpt, checkpoint, task):
    pytest.importorskip("lm_eval")
    save_config(Config.from_name("phi1-test-moe"), checkpoint)
    with pytest.raises(UserError, match="is a mixture of experts"):
        litgpt("evaluate", checkpoint, f"--tasks={task}")
    assert not (checkpoint / "evaluate").exists()


def test_a_config_json_of_another_vocabulary_is_told(litgpt, checkpoint, task):
    pytest.importorskip("lm_eval")
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "phi", "vocab_size": 9}))
    with pytest.raises(UserError, match="says vocab_size 9, but the model has 512 rows"):
        litgpt("evaluate", checkpoint, f"--tasks={task}")


def test_convert_from_litgpt_is_litgpts_own(litgpt, checkpoint):
    """Its output holds every weight, whatever we put in place of `lazy_load`."""
    litgpt("convert_from_litgpt", checkpoint, "converted")
    converted = torch.load("converted/model.pth")
    weights = torch.load(checkpoint / "lit_model.pth")
    assert torch.equal(converted["model.embed_tokens.weight"], weights["transformer.wte.weight"])
    joined = [converted[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(joined), weights["transformer.h.1.attn.qkv.weight"])
    assert sum(t.numel() for t in converted.values()) == sum(t.numel() for t in weights.values())


def test_convert_to_litgpt_by_a_models_name_is_litgpts_own(litgpt, checkpoint, tmp_path):
    """Without an export.json, or under another name, nothing of ours decides."""
    transformers = pytest.importorskip("transformers")
    words = json.loads(json.dumps(_hub_words()))
    transformers.PhiForCausalLM(transformers.PhiConfig(**words)).save_pretrained(tmp_path / "x")
    save_config(Config.from_name("phi1-test", block_size=32), tmp_path / "x")
    litgpt("convert_to_litgpt", tmp_path / "x", "--model_name=phi1-test")
    found = Config.from_file(tmp_path / "x" / "model_config.yaml")
    assert found == Config.from_name("phi1-test")


def _hub_words():
    from phi_lit.export.architecture import hub_words

    words = hub_words(Config.from_name("phi1-test"))
    return {k: v for k, v in words.items() if k not in ("architectures", "model_type")}
