"""The tokenizer inside a GGUF file, as the files of a tokenizer directory.

llama.cpp's byte-level BPE vocabularies are written ("gpt2" in its words), with the way of cutting
text that the file names: transformers' own loader ignores that name, so that its SmolLM2 cuts runs
of spaces before digits differently from the SmolLM2 that was trained.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTROL = 3
"""llama.cpp's token type of special tokens; `USER_DEFINED` are added tokens of ordinary text."""
USER_DEFINED = 4

SPLITS_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""What `tokenizer.ggml.pre` names where each digit stands alone and the rest is cut as in GPT-2."""
AS_GPT2 = {"gpt-2", "phi-2", "olmo", "jais", "mpt"}
"""Where all is cut as in GPT-2."""
LLAMA3 = {"llama-bpe", "llama3", "llama-v3"}
"""Where text is cut as in Llama 3."""
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"


def check_tokenizer(metadata_of: dict[str, Any]) -> list[str]:
    """Say what keeps this vocabulary from becoming a tokenizer.json."""
    kind, cut = metadata_of.get("tokenizer.ggml.model"), metadata_of.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        return [f"its tokenizer is of the kind {kind!r}; only byte-level BPE ('gpt2') is imported"]
    faults = [f"it has no {key}" for key in (_TOKENS, _MERGES) if key not in metadata_of]
    known = SPLITS_DIGITS | AS_GPT2 | LLAMA3
    if cut not in known:
        names = ", ".join(sorted(known))
        faults.append(f"its tokenizer cuts text as {cut!r}; known are {names}")
    return faults


def write_tokenizer(metadata_of: dict[str, Any], longest: int, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
        metadata_of: the file's keys and values; `check_tokenizer` found nothing wrong.
        longest: the model's context, in tokens.
        directory: where to write.
    """
    build_tokenizer(metadata_of).save(str(directory / "tokenizer.json"))
    tokens = metadata_of[_TOKENS]
    ids = {
        name: metadata_of[f"tokenizer.ggml.{key}_token_id"]
        for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata_of
    }
    template = metadata_of.get("tokenizer.chat_template")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        **{f"{name}_token": tokens[token] for name, token in ids.items()},
    }
    # LitGPT's tokenizer cuts a leading <bos> off unless told to use it: <|im_start|> of every chat
    settings["add_bos_token"] = bool(
        metadata_of.get("tokenizer.ggml.add_bos_token")
        or ("bos" in ids and template and tokens[ids["bos"]] in template)
    )
    if template:
        settings["chat_template"] = template
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
    _write_json(directory / "tokenizer_config.json", settings)
    _write_json(directory / "generation_config.json", generation)


def build_tokenizer(metadata_of: dict[str, Any]) -> "Tokenizer":
    """Return the byte-level BPE of the file's vocabulary and merges; nothing is added to a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    tokens, types = metadata_of[_TOKENS], metadata_of.get("tokenizer.ggml.token_type", [])
    merges = [tuple(merge.split(" ", 1)) for merge in metadata_of[_MERGES]]
    cut = metadata_of["tokenizer.ggml.pre"]
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)}, merges, ignore_merges=cut in LLAMA3
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(cut)
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [token for token, its in zip(tokens, types, strict=False) if its == kind]
        tokenizer.add_tokens([AddedToken(t, normalized=False, special=special) for t in added])
    return tokenizer


def _pre_tokenizer(cut: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if cut in LLAMA3:
        split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, bytes_only])
    as_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if cut in SPLITS_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), as_gpt2])
    return as_gpt2


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
