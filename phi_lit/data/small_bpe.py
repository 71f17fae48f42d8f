"""A small tokenizer for small models: byte-level BPE trained on a corpus in seconds.

At 51,200 ids the head would be most of a nano model's work on a CPU. This one splits text as
codegen does (GPT-2's pattern, runs of white space as added tokens), so it reads code alike; only
the merges are fewer and made for the corpus.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from phi_lit.data.codegen import (
    RUNS,
    byte_level_tokenizer,
    refuse_foreign_directory,
    write_tokenizer,
)
from phi_lit.data.vocabulary import END_OF_TEXT, merge_pairs
from phi_lit.errors import UserError
from phi_lit.progress import progress

SMALLEST = 256 + 1 + len(RUNS)
"""Ids without a single merge: the bytes, `<|endoftext|>` and the runs."""


def train_bpe(
    texts: Iterable[str], vocab_size: int, out_dir: Path, *, total: int | None = None
) -> None:
    """Train a byte-level BPE and write it as a tokenizer directory.

    The same texts give the same file. Ids are the bytes, the merges in order, `<|endoftext|>`, then
    codegen's runs. Memory grows with the number of distinct words, not with the text.

    Args:
        texts: the corpus, document by document.
        vocab_size: how many ids in all.
        out_dir: made, or replaced if it is a tokenizer directory.
        total: the number of texts, if known, for the progress bar.

    Raises:
        UserError: `vocab_size` is out of range, or more than the texts have words for; or `out_dir`
            can't be written.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    if not SMALLEST < vocab_size <= 2**20:
        raise UserError(
            f"vocab_size is {vocab_size}; choose {SMALLEST + 1} to {2**20} "
            f"({SMALLEST} ids are bytes, {END_OF_TEXT} and runs of white space)."
        )
    refuse_foreign_directory(out_dir)
    tokenizer = Tokenizer(models.BPE())
    # Added tokens don't exist yet: cut the runs out as they will, so that no merge learns one.
    runs = pre_tokenizers.Split(Regex(" {2,31}|\t{2,9}"), "removed")
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([runs, bytes_of_words])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1 - len(RUNS),
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_counted(texts, total), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    found = len(vocab) + 1 + len(RUNS)
    if found < vocab_size:
        raise UserError(
            f"the texts are too few for {vocab_size} ids: they gave {found}. "
            f"Ask for vocab_size {found}, or give more text."
        )
    vocab[END_OF_TEXT] = len(vocab)
    merges = [(left, right) for left, right in merge_pairs(model)]
    write_tokenizer(byte_level_tokenizer(vocab, merges), "PreTrainedTokenizerFast", out_dir)


def _counted(texts: Iterable[str], total: int | None) -> Iterator[str]:
    with progress(total, "reading", "documents") as bar:
        for text in texts:
            yield text
            bar.update()
