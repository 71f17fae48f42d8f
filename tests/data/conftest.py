"""Tokenizer directories that several tests of the data read."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def codegen_dir(tmp_path_factory) -> Path:
    """Codegen's tokenizer, 50,295 ids."""
    from phi_lit.data.codegen import build_codegen

    directory = tmp_path_factory.mktemp("codegen") / "tokenizer"
    build_codegen(directory)
    return directory


@pytest.fixture(scope="session")
def small_dir(tmp_path_factory, library_texts) -> Path:
    """A small BPE of 4,096 ids, trained on a part of the standard library."""
    from phi_lit.data.small_bpe import train_bpe

    directory = tmp_path_factory.mktemp("small") / "tokenizer"
    train_bpe(library_texts[::3], 4096, directory)
    return directory


@pytest.fixture(scope="session")
def library_texts() -> list[str]:
    """Every file of the standard library that is UTF-8, its tests included."""
    import sysconfig

    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "dist-packages"}.isdisjoint(path.parts):
            try:
                texts.append(path.read_bytes().decode())
            except UnicodeDecodeError:  # test data in old encodings
                continue
    assert len(texts) > 500
    return texts


@pytest.fixture(scope="session")
def library_exercises() -> list:
    """The standard library's documented functions, cut after their docstrings."""
    from phi_lit.data.documented import exercises
    from phi_lit.data.trees import Skipped

    return list(exercises(Skipped()))
