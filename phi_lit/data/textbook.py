"""CodeTextbook: the data module that a YAML names, for LitGPT's loop and for ours.

It only connects the parts: sources become a token store (`building.py`), the store is cut into rows
(`rows.py`). Named after the paper's pretraining data, of which it reproduces the layout, not the
text: what it reads is up to `sources`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer

from phi_lit.data.building import is_first_process, prepare_store, say_once
from phi_lit.data.rows import VAL_SEED, RowLoader, count_rows
from phi_lit.data.sources import Source, open_sources
from phi_lit.data.tokens import TokenStore, Verify
from phi_lit.errors import UserError

_COUNTED = 100_000_000
_PROBE = "def f(x):\n    '''One  two'''\n\treturn x ** 2 # Größe 数\n"


@dataclass
class CodeTextbook(DataModule):
    """Rows of one long array of tokens, from any mix of sources (the paper's layout)."""

    sources: list[str | dict[str, Any]] | dict[str, Any] | str = "stdlib"
    """Where the text comes from: `stdlib` (Python's standard library and its language reference, no
    download), presets such as `textbooks`, paths, globs, hub ids, or mappings with the keys of
    `phi_lit.data.sources.Source` (columns, template, where, weight, ...)."""
    data_dir: Path = Path("data/tokens")
    """Holds the prepared tokens, one directory for every combination of sources and tokenizer."""
    store: Path | None = None
    """A prepared directory to use as it is (it has a manifest.json), in place of `sources`."""
    tokenizer_dir: Path | None = None
    """The tokenizer directory, where the command's own `tokenizer_dir` does not reach this."""
    val_fraction: float = 0.01
    """Share of the documents held out for validation."""
    split_seed: int = 42
    """Decides which documents are held out (not the order of the rows)."""
    seed: int = 42
    """Decides the order of the rows in every epoch; a change needs no new preparation."""
    num_workers: int | None = None
    """Cores to tokenize on; all by default. The tokens are the same for any number."""
    verify: Verify = "auto"
    """How to check prepared tokens: `sizes`, `full` (sha256), or `auto` (full up to 512 MB)."""

    def __post_init__(self) -> None:
        super().__init__()
        self._sources: list[Source] = []
        self._tokenizer_dir: Path | None = None
        self._store_path: Path | None = None
        self._micro_batch, self._row_length = 1, 0

    def connect(
        self,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 1,
        max_seq_length: int | None = None,
        tokenizer_dir: Path | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what only the training command knows.

        Args:
            tokenizer: LitGPT's, from the command's `tokenizer_dir`.
            batch_size: rows in a micro-batch.
            max_seq_length: tokens in a row.
            tokenizer_dir: where `tokenizer` was read from (LitGPT's own loop does not tell).
            **kwargs: of no use here.

        Raises:
            UserError: a source is written wrongly, or the tokenizer is not the one that this module
                was told to use.
        """
        # Not in __post_init__: jsonargparse makes the object while it tries types, where it takes a
        # ValueError for a type that does not fit and prints all of its attempts.
        self._sources = open_sources(self.sources)
        self._micro_batch, self._row_length = batch_size, max_seq_length or 0
        self._tokenizer_dir = tokenizer_dir or self.tokenizer_dir
        if tokenizer is not None and self.tokenizer_dir is not None:
            self._compare(tokenizer, self.tokenizer_dir)

    def prepare_data(self) -> None:
        """Find the prepared tokens, or prepare them (LitGPT calls this on the first rank first).

        Raises:
            UserError: no tokenizer, an unusable source, damaged tokens, a full disk.
        """
        # One rank reading everything is enough.
        verify = self.verify if is_first_process() else "sizes"
        if self.store is not None:
            found = TokenStore.open(self.store, verify=verify)
            self._check_tokenizer(found)
        else:
            found = prepare_store(
                self.data_dir,
                self._sources,
                self._directory(),
                val_fraction=self.val_fraction,
                split_seed=self.split_seed,
                num_workers=self.num_workers,
                verify=verify,
                say=say_once(),
            )
        self._store_path = found.path

    def setup(self, stage: str = "") -> None:
        """Open the tokens.

        Raises:
            UserError: a split holds less than one row.
        """
        assert self._store_path is not None, "prepare_data comes before setup"
        self._opened = TokenStore.open(self._store_path, verify="sizes")
        for split, cure in (
            ("train", "Add text, or train with shorter rows"),
            ("val", "Raise val_fraction, add text, or train with shorter rows"),
        ):
            tokens = self._opened.tokens(split)
            if count_rows(tokens, self._row_length) < 1:
                raise UserError(
                    f"the {split} split holds {tokens:,} tokens, less than one row of "
                    f"{self._row_length:,} + 1. {cure}."
                )

    def train_dataloader(self) -> RowLoader:
        """Return the endless loader of training rows, this rank's share."""
        return self._loader("train", self.seed, endless=True)

    def val_dataloader(self) -> RowLoader:
        """Return the loader of held-out rows: one pass, in an order that is always the same."""
        return self._loader("val", VAL_SEED, endless=False)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; the model's padded vocabulary must not be smaller."""
        return self._opened.vocab_size

    @property
    def eot_id(self) -> int:
        """The token that stands between two documents."""
        return self._opened.eot_id

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must find unchanged for its place in the rows to mean the same.

        `tokens` is a hash over the token streams, `tokenizer` its fingerprint, `seed` orders the
        rows, `row_length` cuts them.
        """
        return {
            "tokens": self._opened.digest,
            "tokenizer": self._opened.fingerprint,
            "seed": self.seed,
            "row_length": self._row_length,
        }

    def unigram_entropy(self) -> float:
        """Return the entropy of single tokens in the training split, in nats per token.

        It is the loss of the best guess that knows how often every token comes and no context: a
        model above it has not learnt to read. Counted over the first 100 M tokens.
        """
        tokens = self._opened.split("train")
        counts = np.zeros(self._opened.vocab_size, np.int64)
        for start in range(0, min(len(tokens), _COUNTED), _COUNTED // 100):
            counts += np.bincount(tokens[start : start + _COUNTED // 100], minlength=len(counts))
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())

    def _loader(self, split: str, seed: int, endless: bool) -> RowLoader:
        return RowLoader(
            self._opened.split(split),
            row_length=self._row_length,
            micro_batch=self._micro_batch,
            seed=seed,
            endless=endless,
        )

    def _directory(self) -> Path:
        if self._tokenizer_dir is None:
            raise UserError(
                "no tokenizer: give the command --tokenizer_dir (or data.init_args.tokenizer_dir). "
                "`phi-lit tokenizer codegen` makes phi-1's, `phi-lit tokenizer train` a small one."
            )
        return self._tokenizer_dir

    def _check_tokenizer(self, found: TokenStore) -> None:
        """Raise if a store that was named is of another tokenizer than the command's."""
        if self._tokenizer_dir is None:
            return
        from phi_lit.data.tokenizer import load_tokenizer

        if load_tokenizer(self._tokenizer_dir).fingerprint != found.fingerprint:
            raise UserError(
                f"the tokens in {found.path} were made with another tokenizer than "
                f"{self._tokenizer_dir}. Name the one they were made with, or prepare them anew."
            )

    def _compare(self, tokenizer: Tokenizer, directory: Path) -> None:
        """Raise if LitGPT's tokenizer, which goes into checkpoints, encodes unlike ours."""
        from phi_lit.data.tokenizer import load_tokenizer

        ours = load_tokenizer(directory).encode_batch([_PROBE])[0].tolist()
        if tokenizer.encode(_PROBE, bos=False).tolist() != ours:
            raise UserError(
                f"data.init_args.tokenizer_dir {directory} and the command's tokenizer_dir hold "
                "different tokenizers; name the same one, or only the command's."
            )

    def __repr__(self) -> str:
        return f"CodeTextbook({self.store or self.sources})"
