"""The tokenizer files of an export, checked: they fit the model, and transformers reads them alike.

`tokenizer_class` can send transformers to a class that builds its tokenizer by rules of its own; if
the ids come out different there, the export names the class that takes tokenizer.json as it is.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from phi_lit.data.vocabulary import read_settings
from phi_lit.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
GENERATION = "generation_config.json"
PLAIN_CLASS = "PreTrainedTokenizerFast"
"""Reads tokenizer.json and nothing else."""

PROBES = (
    "def f(x):\n    '''One  two'''\n\treturn x ** 2  # Größe 数 🙂\n",
    "  leading, inner   runs\t\tand trailing \n\n\n",
    "1234567890 <|endoftext|> </s> [PAD] don't we'll",
)
"""Texts that tell tokenizers apart: white space, digits, other scripts, spelled special tokens."""


def check_vocabulary(checkpoint_dir: Path, padded_vocab_size: int) -> None:
    """Check that the model has a row for every id of the tokenizer.

    Raises:
        UserError: there is no tokenizer, it is broken, or it has more ids than the model has rows.
    """
    path = checkpoint_dir / "tokenizer.json"
    if not path.is_file():
        if (checkpoint_dir / "tokenizer.model").is_file():
            return  # counted by sentencepiece alone, which may not be here
        raise UserError(f"{checkpoint_dir} has no tokenizer (tokenizer.json, or tokenizer.model)")
    ids = _raw(path).get_vocab(with_added_tokens=True)
    highest = max(ids.values(), default=-1)
    if highest >= padded_vocab_size:
        raise UserError(
            f"{path} has ids up to {highest}, but the model's embedding has "
            f"{padded_vocab_size} rows: they are not a pair. Copy the tokenizer that the model was "
            "trained with, or resize the model"
        )


def special_ids(checkpoint_dir: Path) -> dict[str, int | None]:
    """Return the ids that transformers' configurations want, as LitGPT reads them."""
    from litgpt.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer(checkpoint_dir)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the tokenizer in {checkpoint_dir} cannot be opened by LitGPT: {error}"
        ) from error
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": None}
    path = checkpoint_dir / "tokenizer_config.json"
    pad = read_settings(path).get("pad_token") if path.is_file() else None
    if pad is not None:
        ids["pad_token_id"] = tokenizer.token_to_id(
            pad["content"] if isinstance(pad, dict) else pad
        )
    return ids


def write_tokenizer(checkpoint_dir: Path, directory: Path) -> None:
    """Copy the tokenizer's files and see to it that transformers gets the same ids from them.

    Raises:
        UserError: transformers cannot read them, or gets other ids.
    """
    for name in TOKENIZER_FILES:
        if (checkpoint_dir / name).is_file():
            shutil.copyfile(checkpoint_dir / name, directory / name)
    path = directory / "tokenizer_config.json"
    settings = read_settings(path) if path.is_file() else {}
    if settings.pop("auto_map", None) is not None:  # code that an export does not bring along
        _write_json(settings, path)
    if not (directory / "tokenizer.json").is_file() or _read_alike(directory):
        return
    _write_json(settings | {"tokenizer_class": PLAIN_CLASS}, path)
    if not _read_alike(directory):
        raise UserError(
            f"transformers gets other ids than LitGPT from {checkpoint_dir / 'tokenizer.json'}, "
            f"even as a {PLAIN_CLASS}: this tokenizer cannot be exported"
        )


def _write_json(content: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_alike(directory: Path) -> bool:
    from transformers import AutoTokenizer

    raw = _raw(directory / "tokenizer.json")
    try:
        hub = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        return all(
            hub.encode(text, add_special_tokens=False)
            == raw.encode(text, add_special_tokens=False).ids
            for text in PROBES
        )
    except Exception:  # each tokenizer class fails in its own way; the plain one has no way to
        return False


def _raw(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises plain Exceptions
        raise UserError(f"{path} is no tokenizer that `tokenizers` reads: {error}") from error


def has_chat_template(directory: Path) -> bool:
    """Tell whether a tokenizer's files say how messages become text."""
    settings = directory / "tokenizer_config.json"
    inline = settings.is_file() and "chat_template" in read_settings(settings)
    return inline or (directory / "chat_template.jinja").is_file()


def write_generation_config(
    checkpoint_dir: Path, directory: Path, special: dict[str, int | None]
) -> None:
    """Copy generation_config.json, or write one that knows where the model stops."""
    from litgpt.utils import fix_and_load_json
    from transformers import GenerationConfig

    path = checkpoint_dir / GENERATION
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        try:
            known = fix_and_load_json(text)  # the one that Llama 3.2 came with is broken
        except ValueError as error:
            raise UserError(f"{path} is broken JSON ({error}); restore or remove it") from error
        _write_json(known, directory / GENERATION)
    else:
        known = {name: value for name, value in special.items() if value is not None}
        GenerationConfig(**known).save_pretrained(directory)
