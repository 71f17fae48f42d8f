"""Tokenizers as directories: opening one, and the commands that make one.

`load_tokenizer` opens any directory that LitGPT reads and encodes batches of documents as fast as
that can be done with exactly the same ids. `codegen.py` and `small_bpe.py` make directories.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from phi_lit.data.codegen import build_codegen
from phi_lit.data.engines import Engine, SentencePieceEngine, TokenizersEngine, id_type
from phi_lit.data.small_bpe import train_bpe
from phi_lit.data.tiktoken_engine import TiktokenEngine, UnsuitedError
from phi_lit.data.vocabulary import end_of_text, fingerprint, read_settings
from phi_lit.errors import UserError

if TYPE_CHECKING:
    from phi_lit.data.sources import Source

__all__ = ["TextTokenizer", "build_codegen", "codegen", "load_tokenizer", "train", "train_bpe"]

_TOLD: set[tuple[Path, str]] = set()


class TextTokenizer:
    """A tokenizer directory, opened. Pickling keeps the path: the other process opens it again.

    Text is only ever text: `<|endoftext|>` spelled in a document is encoded letter by letter like
    anything else, so a document can't forge a boundary. Added tokens for runs of white space do
    apply. Nothing is added at either end of a text.

    Attributes:
        directory: where it was read from.
        eot_id: the token that goes between documents.
        vocab_size: the highest id + 1, added tokens included.
        fingerprint: SHA-256 of what decides the ids; the same for every copy of a tokenizer.
        why_slow: why `engine` is not tiktoken, or nothing.
    """

    def __init__(
        self,
        directory: Path,
        engine: Engine,
        *,
        eot_id: int,
        vocab_size: int,
        fingerprint: str,
        why_slow: str = "",
    ) -> None:
        self.directory = directory
        self.eot_id, self.vocab_size, self.fingerprint = eot_id, vocab_size, fingerprint
        self.why_slow = why_slow
        self._engine = engine

    @property
    def engine(self) -> str:
        """What encodes: "tiktoken", "tokenizers" or "sentencepiece"."""
        return self._engine.name

    @property
    def dtype(self) -> np.dtype:
        """The type of the ids: uint16, or uint32 where the vocabulary needs it."""
        return id_type(self.vocab_size)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text, as arrays of `dtype`."""
        return self._engine.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, special tokens written out."""
        return self._engine.decode(ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.directory), self.fingerprint)


def load_tokenizer(directory: Path | str) -> TextTokenizer:
    """Open a tokenizer directory: tokenizer.json, or sentencepiece's tokenizer.model.

    tiktoken's engine is used where its ids are proved to be the same; otherwise one line on
    standard error says why it isn't.

    Raises:
        UserError: no such directory, no tokenizer in it, a broken file, no end-of-text token.
    """
    tokenizer = _open(Path(directory))
    told = (tokenizer.directory, tokenizer.why_slow)
    if tokenizer.why_slow and told not in _TOLD:
        _TOLD.add(told)
        print(
            f"phi_lit: {directory}: using {tokenizer.engine}, some ten times slower than tiktoken, "
            f"because {tokenizer.why_slow}.",
            file=sys.stderr,
        )
    return tokenizer


def codegen(
    out_dir: Path = Path("checkpoints/codegen-tokenizer"), from_dir: Path | None = None
) -> None:
    """Make the tokenizer of phi-1: codegen-350M-mono's, 50,295 ids, no download.

    Args:
        out_dir: The tokenizer directory to make.
        from_dir: A directory with codegen's tokenizer.json, or its id on the hub
            (Salesforce/codegen-350M-mono), to take it from; it has to be the same.
    """
    build_codegen(out_dir, from_dir)
    _report(out_dir)


def train(
    out_dir: Path = Path("checkpoints/small-tokenizer"),
    vocab_size: int = 4096,
    sources: list[str | dict[str, Any]] | dict[str, Any] | str | None = None,
    max_mb: int = 200,
) -> None:
    """Train a small tokenizer on a corpus, for models too small for 51,200 ids.

    Args:
        out_dir: The tokenizer directory to make.
        vocab_size: How many ids, white space and `<|endoftext|>` included.
        sources: Where the text comes from, as in CodeTextbook; Python's standard library by
            default.
        max_mb: Millions of characters to read at most, from the first source on.
    """
    if max_mb < 1:
        raise UserError(f"max_mb is {max_mb}; choose at least 1.")
    from phi_lit.data.sources import open_sources

    opened: list[Source] = open_sources("stdlib" if sources is None else sources)
    train_bpe(_texts(opened, max_mb * 1_000_000), vocab_size, out_dir)
    _report(out_dir)


def _texts(sources: "Sequence[Source]", limit: int) -> Iterator[str]:
    """Yield the sources' documents until `limit` characters have been read."""
    left = limit
    for source in sources:
        source.check()
        for document in source.documents():
            yield document.text
            left -= len(document.text)
            if left <= 0:
                return


def _report(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    print(
        f"{directory}: {tokenizer.vocab_size:,} ids, end of text {tokenizer.eot_id}, "
        f"engine {tokenizer.engine}, fingerprint {tokenizer.fingerprint[:12]}"
    )


def _reopen(directory: str, fingerprint: str) -> TextTokenizer:
    """Open a tokenizer again in another process, silently."""
    tokenizer = _open(Path(directory))
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"the tokenizer in {directory} was changed while it was in use.")
    return tokenizer


def _open(directory: Path) -> TextTokenizer:
    hint = "`phi-lit tokenizer codegen` or `phi-lit tokenizer train` makes one"
    if not directory.is_dir():
        what = "is a file, not a directory" if directory.exists() else "does not exist"
        raise UserError(f"tokenizer directory {directory} {what}; {hint}.")
    config = directory / "tokenizer_config.json"
    if config.is_file() and "tokenizer_class" not in read_settings(config):
        raise UserError(
            f"{config} names no tokenizer_class, and LitGPT needs one: "
            'add "tokenizer_class": "PreTrainedTokenizerFast".'
        )
    if (directory / "tokenizer.json").is_file():
        return _open_json(directory)
    if (directory / "tokenizer.model").is_file():
        return _open_sentencepiece(directory)
    raise UserError(
        f"{directory} is no tokenizer directory (no tokenizer.json, no tokenizer.model); {hint}."
    )


def _open_json(directory: Path) -> TextTokenizer:
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    settings = read_settings(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises plain Exceptions
        raise UserError(f"{path} is no tokenizer that `tokenizers` reads: {error}.") from error
    ids = tokenizer.get_vocab(with_added_tokens=True)
    eot, eot_id = end_of_text(directory, ids)
    vocab_size = max(ids.values()) + 1
    slow = TokenizersEngine(tokenizer, id_type(vocab_size))
    if eot_id in slow.encode(eot):
        raise UserError(
            f"{path}: text that spells {eot} becomes the token itself, so a document could forge a "
            'boundary. Give it "special": true among the added_tokens there.'
        )
    engine: Engine = slow
    why_slow = ""
    try:
        engine = TiktokenEngine(settings, slow, id_type(vocab_size))
    except UnsuitedError as reason:
        why_slow = str(reason)
    return TextTokenizer(
        directory,
        engine,
        eot_id=eot_id,
        vocab_size=vocab_size,
        fingerprint=fingerprint(settings, ids, eot_id),
        why_slow=why_slow,
    )


def _open_sentencepiece(directory: Path) -> TextTokenizer:
    import hashlib

    path = directory / "tokenizer.model"
    try:
        engine = SentencePieceEngine(path)
    except ImportError as error:
        raise UserError(
            f"{path} needs sentencepiece: `pip install sentencepiece`, or put the same tokenizer's "
            "tokenizer.json beside it."
        ) from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is no sentencepiece model: {error}.") from error
    if engine.eot_id < 0:
        raise UserError(f"{path} has no end-of-sentence token to put between documents.")
    return TextTokenizer(
        directory,
        engine,
        eot_id=engine.eot_id,
        vocab_size=engine.vocab_size,
        fingerprint=hashlib.sha256(path.read_bytes()).hexdigest(),
        why_slow="it is a sentencepiece model",
    )
