"""A padding token for a tokenizer that has none, such as LLaMA's.

Orca pads with `[[PAD]]`, the 32,001st id of LLaMA's vocabulary (arXiv 2306.02707, section 4). No
padding ever enters a loss here; a token of its own keeps it from being mistaken for text. A model
must have room for the new id: `phi-lit resize` makes it.
"""

import json
from pathlib import Path
from typing import Any

from litgpt.tokenizer import Tokenizer

from phi_lit.data.vocabulary import read_settings
from phi_lit.errors import UserError
from phi_lit.files import write_atomic

PADDING = "[[PAD]]"
"""Orca's padding token."""

_USUAL = (PADDING, "[PAD]", "<pad>", "<|pad|>", "<|padding|>")


def padding_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of a tokenizer's padding token, or None where it has none by a usual name."""
    if tokenizer.backend != "huggingface":
        return None
    ids = (tokenizer.processor.token_to_id(token) for token in _USUAL)
    return next((found for found in ids if found is not None), None)


def pad(tokenizer_dir: Path, out_dir: Path | None = None, token: str = PADDING) -> None:
    """Add a padding token to a tokenizer.

    Args:
        tokenizer_dir: A tokenizer directory with a tokenizer.json, such as LLaMA's.
        out_dir: Where to write the tokenizer with the token; default: where it is.
        token: The token's text.
    """
    out_dir = out_dir or tokenizer_dir
    files, number = with_padding(tokenizer_dir, token)
    for source in sorted(tokenizer_dir.glob("*")):
        if source.name in (
            "tokenizer_config.json", "generation_config.json", "chat_template.jinja"
        ):  # fmt: skip
            files.setdefault(source.name, source.read_text(encoding="utf-8"))
    for name, content in files.items():
        write_atomic(out_dir / name, content)
    print(f"{out_dir}: {token} is id {number:,}")


def with_padding(tokenizer_dir: Path, token: str = PADDING) -> tuple[dict[str, str], int]:
    """Return the files of a tokenizer that has the padding token, by name, and the token's id.

    A tokenizer that has it already is returned as it is.

    Raises:
        UserError: no tokenizer.json, or the token is there as ordinary text.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Processor

    path = tokenizer_dir / "tokenizer.json"
    if not path.is_file():
        what = "only a tokenizer.model, to which" if _has_model(tokenizer_dir) else "none, and so"
        raise UserError(
            f"{tokenizer_dir}: a token is added to a tokenizer.json, and there is {what} no token "
            "can be added; put the same tokenizer's tokenizer.json there."
        )
    if not token.strip():
        raise UserError("the padding token is empty; name it, as in --token '[[PAD]]'.")
    settings = _config(tokenizer_dir)
    named = settings.get("pad_token")
    named = named.get("content") if isinstance(named, dict) else named
    processor = Processor.from_file(str(path))
    before = processor.token_to_id(token)
    if named not in (None, token):
        raise UserError(
            f"{tokenizer_dir} already pads with {named!r}, id {processor.token_to_id(named)}; use "
            "that, or remove pad_token from its tokenizer_config.json."
        )
    if before is not None and not _is_special(settings, path, token):
        raise UserError(
            f"{token!r} is already id {before:,} of {tokenizer_dir}, as ordinary text; choose "
            "another --token."
        )
    processor.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    number = processor.token_to_id(token)
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        decoder[str(number)] = {"content": token, "special": True, "normalized": False}
    settings["pad_token"] = token
    files = {
        "tokenizer.json": processor.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }
    return files, number


def _config(tokenizer_dir: Path) -> dict[str, Any]:
    path = tokenizer_dir / "tokenizer_config.json"
    return read_settings(path) if path.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}


def _is_special(settings: dict[str, Any], path: Path, token: str) -> bool:
    """Tell whether a token that is there is a special one."""
    added = read_settings(path).get("added_tokens") or []
    return any(each.get("content") == token and each.get("special") for each in added)


def _has_model(tokenizer_dir: Path) -> bool:
    return (tokenizer_dir / "tokenizer.model").is_file()
