"""The engines that turn text into ids: any tokenizer.json, and sentencepiece's tokenizer.model.

They are exact and slow. `tiktoken_engine.py` gives the same ids some ten times faster for the
tokenizers it can prove itself equal on. None adds a token of its own at either end of a text.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Engine(Protocol):
    """Turns texts into arrays of ids, and ids back into text."""

    name: str

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, special tokens written out."""


def id_type(vocab_size: int) -> np.dtype:
    """Return the narrowest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def without_surrogates(text: str) -> str:
    """Return the text with surrogate pairs joined and lone surrogates replaced by U+FFFD.

    JSON's escapes can spell surrogates that no encoder accepts.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TokenizersEngine:
    """The `tokenizers` library on a tokenizer.json: the reference for every other engine."""

    name = "tokenizers"

    def __init__(self, tokenizer: "Tokenizer", dtype: np.dtype) -> None:
        # A document that spells <|endoftext|> is text like any other: it can't forge a boundary.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer, self._dtype = tokenizer, dtype

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of one text, without the threads that a later fork would trip over."""
        encoding = self.tokenizer.encode(without_surrogates(text), add_special_tokens=False)
        return np.array(encoding.ids, dtype=self._dtype)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text."""
        try:
            found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # what it says of a str with surrogates
            whole = [without_surrogates(text) for text in texts]
            found = self.tokenizer.encode_batch_fast(whole, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self._dtype) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, special tokens written out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


class SentencePieceEngine:
    """sentencepiece on a tokenizer.model, as LitGPT reads it (control tokens in text are text)."""

    name = "sentencepiece"

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_file=str(path))
        self.vocab_size: int = self._processor.vocab_size()
        self.eot_id: int = self._processor.eos_id()
        self._dtype = id_type(self.vocab_size)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text."""
        whole = [without_surrogates(text) for text in texts]
        return [np.array(ids, dtype=self._dtype) for ids in self._processor.encode(whole)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids."""
        return self._processor.decode([int(i) for i in ids])
