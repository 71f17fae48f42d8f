"""A tiny real run: phi1-test on a few files of the standard library, with all of the recipe on."""

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import FILES, RECIPE, merged, pretrain


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source files, and a tokenizer of 512 ids trained on them in `tokenizer/`."""
    from phi_lit.data.tokenizer import train_bpe

    root = tmp_path_factory.mktemp("corpus")
    texts = [Path(sysconfig.get_path("stdlib"), name).read_text(encoding="utf-8") for name in FILES]
    for name, text in zip(FILES, texts, strict=True):
        # In small documents, so that the held-out share can be met.
        for number, start in enumerate(range(0, min(len(text), 6000), 600)):
            (root / "text").mkdir(exist_ok=True)
            (root / "text" / f"{number}-{name}").write_text(text[start : start + 600])
    train_bpe(texts, 512, root / "tokenizer")
    return root


@pytest.fixture(scope="session")
def recipe(corpus: Path) -> Callable[..., dict[str, Any]]:
    """Returns the arguments of a run, as a YAML would hold them."""

    def make(out_dir: Path, **changes: Any) -> dict[str, Any]:
        base = merged(RECIPE, {"out_dir": str(out_dir), "tokenizer_dir": str(corpus / "tokenizer")})
        base["data"]["init_args"] |= {
            "sources": [str(corpus / "text")],
            "data_dir": str(corpus / "tokens"),
        }
        return merged(base, changes)

    return make


@pytest.fixture
def train(
    recipe: Callable[..., dict[str, Any]], one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """Runs `litgpt pretrain` on the recipe in this process; returns the output directory."""

    def run(out_dir: Path, **changes: Any) -> Path:
        pretrain(recipe(out_dir, **changes))
        return out_dir

    return run
