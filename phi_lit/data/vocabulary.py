"""What a tokenizer directory says: the file's settings, the end-of-text token, the fingerprint.

Only reading and judging of facts lives here; encoding is in `engines.py` and `tiktoken_engine.py`.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from phi_lit.errors import UserError

END_OF_TEXT = "<|endoftext|>"
"""What ends a document in codegen's vocabulary, and in every tokenizer that has it."""


def read_settings(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises:
        UserError: unreadable, broken JSON, or not an object.
    """
    try:
        settings = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(
            f"{path} is broken JSON ({error}). Copy it again, or make a new tokenizer directory."
        ) from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds a JSON {type(settings).__name__}, not an object.")
    return settings


@cache
def byte_of_char() -> dict[str, int]:
    """Return GPT-2's alphabet: the printable character that stands for each byte in a vocabulary.

    Printable Latin-1 bytes stand for themselves, the other 68 for characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


def end_of_text(directory: Path, ids: dict[str, int]) -> tuple[str, int]:
    """Return the token that ends a document, and its id.

    `<|endoftext|>` where the vocabulary has it, else the end-of-sequence token that the directory's
    own settings name, as LitGPT reads them.

    Args:
        directory: the tokenizer directory.
        ids: the whole vocabulary, added tokens included.

    Raises:
        UserError: there is none.
    """
    if END_OF_TEXT in ids:
        return END_OF_TEXT, ids[END_OF_TEXT]
    token_of = {i: token for token, i in ids.items()}
    for name, key in (("tokenizer_config", "eos_token"), ("generation_config", "eos_token_id")):
        path = directory / f"{name}.json"
        if not path.is_file():
            continue
        found = read_settings(path).get(key)
        if isinstance(found, dict):
            found = found.get("content")
        if isinstance(found, list) and found:
            found = found[0]
        if isinstance(found, int):
            found = token_of.get(found)
        if found in ids:
            return found, ids[found]
    raise UserError(
        f"{directory} has no end-of-text token: no {END_OF_TEXT} in its vocabulary, and no "
        "eos_token in tokenizer_config.json that is. Name one there; it goes between documents."
    )


def fingerprint(settings: dict[str, Any], ids: dict[str, int], eot_id: int) -> str:
    """Return the SHA-256 of what decides the ids of a text, as hex.

    The model, the normalizer, the pre-tokenizer and the added tokens decide; the file's layout, its
    decoder, its template and its special tokens don't (no text becomes a special token here), so
    adding a padding token keeps the fingerprint.

    Args:
        settings: a tokenizer.json.
        ids: its whole vocabulary as read; the ids written for added tokens are only wishes.
        eot_id: what goes between documents.
    """
    normalizer = settings.get("normalizer")
    flags = ["single_word", "lstrip", "rstrip", *(["normalized"] if normalizer else [])]
    added = [
        [ids[token["content"]], token["content"], *(bool(token.get(flag)) for flag in flags)]
        for token in settings.get("added_tokens") or []
        if not token.get("special")
    ]
    facts = {
        "model": _model_facts(settings["model"]),
        "added": sorted(added),
        "normalizer": normalizer,
        "pre_tokenizer": _without_offsets(settings.get("pre_tokenizer")),
        "eot_id": eot_id,
    }
    return _digest(json.dumps(facts, sort_keys=True, separators=(",", ":")))


def merge_pairs(model: dict[str, Any]) -> list[list[str]]:
    """Return a BPE model's merges in order; files write them as pairs or as "left right"."""
    pairs = model.get("merges") or []
    return [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in pairs]


def covers_bytes(model: dict[str, Any]) -> bool:
    """Say whether a BPE vocabulary holds all 256 bytes, so that no text is ever unknown to it."""
    vocab = model.get("vocab")
    return isinstance(vocab, dict) and byte_of_char().keys() <= vocab.keys()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _model_facts(model: dict[str, Any]) -> dict[str, Any]:
    """Return a model's settings without those that are off (files differ in writing them).

    The vocabulary and the merges go in as digests: sorted JSON of 50,000 tokens takes long.
    """
    facts = {key: value for key, value in model.items() if value not in (None, "", False)}
    if isinstance(vocab := facts.get("vocab"), dict):
        in_order = sorted(vocab.items(), key=lambda item: item[1])
        facts["vocab"] = _digest("\0".join(f"{i} {token}" for token, i in in_order))
    if "merges" in facts:
        merges = _digest("\0".join(f"{left} {right}" for left, right in merge_pairs(model)))
        facts |= {"type": "BPE", "merges": merges}
    if covers_bytes(model):
        for key in ("unk_token", "fuse_unk"):
            facts.pop(key, None)
    return facts


def _without_offsets(part: Any) -> Any:
    """Return a pre-tokenizer's settings without what only places offsets, defaults filled in."""
    if isinstance(part, list):
        return [_without_offsets(inner) for inner in part]
    if not isinstance(part, dict):
        return part
    kept = {key: _without_offsets(value) for key, value in part.items() if key != "trim_offsets"}
    if kept.get("type") == "ByteLevel":
        kept.setdefault("use_regex", True)
    return kept
