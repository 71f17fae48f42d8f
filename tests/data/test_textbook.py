import json
import math
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from litgpt.tokenizer import Tokenizer

from phi_lit.data.textbook import CodeTextbook
from phi_lit.data.tokenizer import train_bpe
from phi_lit.data.tokens import TokenStore
from phi_lit.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    for i in range(40):
        (directory / f"{i:02}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 3)
    return directory


@pytest.fixture
def textbook(tmp_path, corpus, tiny_tokenizer_dir):
    """Make a connected data module with rows of 16."""

    def make(length=16, connect=None, **settings) -> CodeTextbook:
        defaults = {"sources": [str(corpus)], "data_dir": tmp_path / "tokens", "num_workers": 1}
        data = CodeTextbook(**{**defaults, "val_fraction": 0.2, **settings})
        connect = {"tokenizer_dir": tiny_tokenizer_dir} if connect is None else connect
        data.connect(batch_size=3, max_seq_length=length, **connect)
        return data

    return make


def ready(data: CodeTextbook) -> CodeTextbook:
    data.prepare_data()
    data.setup()
    return data


def test_rows_of_text_come_out(textbook, tiny_tokenizer_dir):
    data = ready(textbook())
    batch = next(iter(data.train_dataloader()))
    assert batch.shape == (3, 17)
    assert "x" in Tokenizer(tiny_tokenizer_dir).decode(batch[0])
    assert {tuple(row) for batch in data.val_dataloader() for row in batch.tolist()}
    assert data.vocab_size == 257


def test_the_seed_orders_the_rows_and_nothing_else(textbook):
    one, same, other = (ready(textbook(seed=seed)) for seed in (1, 1, 2))
    rows = [next(iter(data.train_dataloader())) for data in (one, same, other)]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    val = [torch.cat(list(data.val_dataloader())) for data in (one, other)]
    assert torch.equal(*val)
    assert one.identity() == same.identity()
    assert one.identity()["tokens"] == other.identity()["tokens"]


def test_identity_changes_with_all_that_moves_a_row(textbook, corpus):
    first = ready(textbook()).identity()
    json.dumps(first)
    assert ready(textbook(seed=7)).identity() != first
    assert ready(textbook(length=8)).identity() != first
    assert ready(textbook(split_seed=7)).identity() != first
    (corpus / "00.py").write_text("changed = True\n")
    assert ready(textbook()).identity() != first


def test_a_named_store_needs_no_sources(textbook, corpus, tmp_path):
    made = ready(textbook())
    for path in corpus.iterdir():
        path.unlink()
    store = made._opened.path
    again = ready(textbook(store=store, sources=["stdlib"]))
    assert again.identity() == made.identity()


@pytest.fixture
def other_tokenizer_dir(tmp_path):
    train_bpe([Path(__file__).read_text()], 320, tmp_path / "bpe")
    return tmp_path / "bpe"


def test_a_named_store_of_another_tokenizer_is_refused(textbook, other_tokenizer_dir):
    store = ready(textbook())._opened.path
    with pytest.raises(UserError, match="made with another tokenizer than"):
        textbook(store=store, connect={"tokenizer_dir": other_tokenizer_dir}).prepare_data()


def test_a_corpus_smaller_than_a_row_is_refused(textbook):
    data = textbook(length=100_000)
    data.prepare_data()
    with pytest.raises(UserError, match=r"the train split holds .* tokens, less than one row of"):
        data.setup()
    data = textbook(length=1000)
    data.prepare_data()
    with pytest.raises(UserError, match=r"the val split holds .*\. Raise val_fraction"):
        data.setup()


def test_a_missing_tokenizer_says_which_command_makes_one(textbook):
    with pytest.raises(UserError, match="`phi-lit tokenizer codegen` makes phi-1's"):
        textbook(connect={}).prepare_data()


def test_two_different_tokenizers_are_refused(textbook, tiny_tokenizer_dir, other_tokenizer_dir):
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    textbook(tokenizer_dir=tiny_tokenizer_dir, connect={"tokenizer": tokenizer})
    with pytest.raises(UserError, match="different tokenizers"):
        textbook(tokenizer_dir=other_tokenizer_dir, connect={"tokenizer": tokenizer})


def test_a_bad_source_is_refused_when_the_module_is_connected(textbook):
    with pytest.raises(UserError, match="Did you mean 'stdlib'"):
        textbook(sources=["stdlb"])


def config(tmp_path, corpus, tokenizer_dir, **data) -> dict:
    return {
        "model_name": "pythia-14m",
        "model_config": {
            "name": "tiny", "block_size": 16, "vocab_size": 257, "padded_vocab_size": 512,
            "n_layer": 1, "n_head": 2, "n_embd": 16,
        },
        "out_dir": str(tmp_path / "out"),
        "tokenizer_dir": str(tokenizer_dir),
        "data": {
            "class_path": "phi_lit.CodeTextbook",
            "init_args": {
                "sources": [{"path": str(corpus), "weight": 2}],
                "data_dir": str(tmp_path / "tokens"),
                "tokenizer_dir": str(tokenizer_dir),
                "val_fraction": 0.2,
                **data,
            },
        },
        "train": {
            "max_tokens": 16 * 24, "global_batch_size": 4, "micro_batch_size": 2,
            "save_interval": 3, "log_interval": 1, "lr_warmup_steps": 1,
        },
        "eval": {"interval": 2, "max_iters": 2},
        "logger_name": "csv",
        "devices": 1,
    }  # fmt: skip


def pretrain(
    run_python, tmp_path, settings, *more, autoload=False, check=True
) -> subprocess.CompletedProcess:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = ("-m", "litgpt", "pretrain", "--config", tmp_path / "config.yaml", *more)
    return run_python(*command, cwd=tmp_path, autoload=autoload, check=check)


def test_litgpts_own_loop_trains_saves_and_resumes(
    tmp_path, corpus, tiny_tokenizer_dir, run_python
):
    """Stock LitGPT, our hooks off: the module is chosen by class path like any other."""
    settings = config(tmp_path, corpus, tiny_tokenizer_dir)
    done = pretrain(run_python, tmp_path, settings)
    assert "loss train:" in done.stdout
    step = tmp_path / "out" / "step-00000003"
    checkpoint = torch.load(step / "lit_model.pth", weights_only=True)
    assert checkpoint["train_dataloader"] == {"position": 12}
    written = yaml.safe_load((step / "hyperparameters.yaml").read_text())["data"]
    assert written["init_args"]["sources"] == [{"path": str(corpus), "weight": 2}]
    settings["train"]["max_tokens"] *= 2
    again = pretrain(run_python, tmp_path, settings, "--resume", step / "lit_model.pth")
    assert "iter 8 step 4" in again.stdout
    later = torch.load(tmp_path / "out" / "step-00000009" / "lit_model.pth", weights_only=True)
    assert later["train_dataloader"] == {"position": 36}


@pytest.fixture
def parser():
    """Reads a data module as LitGPT's commands do."""
    from jsonargparse import ArgumentParser, set_parsing_settings
    from litgpt.data import DataModule

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataModule)
    return parser


def test_a_yaml_may_name_the_class_short_or_long(parser):
    for name in ("CodeTextbook", "phi_lit.CodeTextbook", "phi_lit.data.textbook.CodeTextbook"):
        words = [f"--data={name}", "--data.sources=[stdlib, {path: ., weight: 2}]"]
        data = parser.instantiate_classes(parser.parse_args(words)).data
        assert isinstance(data, CodeTextbook)
        assert data.sources == ["stdlib", {"path": ".", "weight": 2}]


@pytest.mark.parametrize("source", ["stdlib", {"path": ".", "weight": 2}])
def test_one_source_needs_no_brackets(parser, source):
    settings = {"class_path": "CodeTextbook", "init_args": {"sources": source}}
    data = parser.instantiate_classes(parser.parse_object({"data": settings})).data
    data.connect(max_seq_length=8)
    assert data.sources == source
    assert [opened.label for opened in data._sources] == ["." if "path" in source else "stdlib"]
    word = json.dumps(source) if isinstance(source, dict) else source
    assert (
        parser.parse_args(["--data=CodeTextbook", f"--data.sources={word}"]).data.init_args[
            "sources"
        ]
        == source
    )


def test_a_mistake_in_the_yaml_is_one_line(tmp_path, tiny_tokenizer_dir, run_python):
    settings = config(tmp_path, tmp_path, tiny_tokenizer_dir, sources=[{"pth": "x"}])
    done = pretrain(run_python, tmp_path, settings, autoload=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("phi_lit: error: a source has no key 'pth'. Did you mean 'path'?")
    assert done.stderr.count("a source has no key") == 1


def test_help_tells_every_setting(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--data.help", "phi_lit.CodeTextbook"])
    told = " ".join(capsys.readouterr().out.split())
    for words in ("--data.sources", "Decides the order of the rows", "Cores to tokenize on"):
        assert words in told


def test_unigram_entropy_equals_its_definition(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text("ab" * (number + 1) + "c")
    data = CodeTextbook(
        sources=[str(tmp_path / "text")], data_dir=tmp_path / "data", num_workers=1,
        val_fraction=0.2,
    )  # fmt: skip
    data.connect(batch_size=1, max_seq_length=8, tokenizer_dir=tiny_tokenizer_dir)
    data.prepare_data()
    data.setup()
    tokens = TokenStore.open(data._store_path).split("train")[:].tolist()
    shares = [tokens.count(token) / len(tokens) for token in set(tokens)]
    assert data.unigram_entropy() == pytest.approx(-sum(s * math.log(s) for s in shares))
