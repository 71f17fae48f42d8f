"""Examples for supervised finetuning: the view of a store that a training loop indexes.

LitGPT's loops and ours read it the same way: item i is a mapping with `input_ids` and `labels` of
equal length, labels being `IGNORE` in the question. Here is decided what is held out and what
becomes of an example longer than a row. Packing several into a row is `packing.py`'s.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from litgpt.data import DataModule, get_sft_collate_fn
from litgpt.prompts import Default, PromptStyle, prompt_styles
from litgpt.tokenizer import Tokenizer
from torch.utils.data import DataLoader, Dataset

from phi_lit.data.building import say_once
from phi_lit.data.example_store import Encoder, ExampleStore, prepare_examples
from phi_lit.data.examples import ExampleSource
from phi_lit.data.padding import padding_id
from phi_lit.data.sources import open_sources
from phi_lit.errors import UserError, did_you_mean
from phi_lit.scramble import MASK, mix, mix_array

TooLong = Literal["drop", "truncate", "split"]

IGNORE = -100
"""Labels with this id never enter a loss (PyTorch's and LitGPT's number)."""


class ExampleDataset(Dataset):  # type: ignore[misc]
    """Some examples of a store, each cut to what fits in a row.

    Args:
        store: where the ids are.
        chosen: which examples, by number.
        max_length: ids in a row, or None for no limit.
        too_long: what becomes of a longer example: "drop" leaves it out; "truncate" keeps its
            first ids; "split" cuts it into pieces that overlap by one id, so that every id of the
            answer is learned once (a later piece has no question before it).
        mask_prompt: learn the answers only.
    """

    def __init__(
        self,
        store: ExampleStore,
        chosen: np.ndarray,
        *,
        max_length: int | None,
        too_long: TooLong,
        mask_prompt: bool,
    ) -> None:
        self._store = store
        sizes = store.lengths[chosen]
        lengths, starts = sizes.sum(1), store.starts[chosen]
        masked = sizes[:, 0] if mask_prompt else np.zeros(len(sizes), np.int64)
        over = lengths > (max_length or np.inf)
        self.counts = {"examples": len(chosen), "longer than a row": int(over.sum())}
        """What was found, by name."""
        if max_length is not None and too_long == "drop":
            starts, lengths, masked = (array[~over] for array in (starts, lengths, masked))
        elif max_length is not None and too_long == "truncate":
            lengths = np.minimum(lengths, max_length)
        elif max_length is not None:
            starts, lengths, masked = _split(starts, lengths, masked, max_length)
        # The first id of a row is nobody's target: none stands before it.
        targets = lengths - np.maximum(masked, 1)
        learnt = targets > 0
        self.counts["left without a target"] = int((~learnt).sum())
        self._starts, self._masked = starts[learnt], masked[learnt]
        number = np.searchsorted(store.starts, self._starts, side="right") - 1
        self._asked = store.lengths[number, 0]
        self.lengths: np.ndarray = lengths[learnt]
        """Ids of every item (int64)."""
        self.n_targets = int(targets[learnt].sum())
        """Ids to learn, all items together."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, item: int) -> dict[str, Any]:
        length = int(self.lengths[item])
        ids = torch.from_numpy(self._store.read(int(self._starts[item]), length))
        labels = ids.clone()
        labels[: int(self._masked[item])] = IGNORE
        # LitGPT reports both numbers; the ids of its prompt template are not told apart here.
        return {
            "input_ids": ids,
            "labels": labels,
            "token_counts": {"raw": length, "raw_plus_prompt_template": length},
        }

    def question(self, item: int) -> torch.Tensor:
        """Return the ids of the question that an item begins with (T,), int64."""
        return torch.from_numpy(self._store.read(int(self._starts[item]), int(self._asked[item])))


def _split(
    starts: np.ndarray, lengths: np.ndarray, masked: np.ndarray, max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut every example into pieces of at most `max_length` that overlap by one id."""
    step = max_length - 1
    pieces = np.maximum(1, -(-(lengths - 1) // step))
    whole = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(whole)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = number * step
    cut = np.minimum(lengths[whole] - offset, max_length)
    hidden = np.maximum(masked[whole] - offset, (number > 0).astype(np.int64))
    return starts[whole] + offset, cut, np.minimum(hidden, cut)


@dataclass
class Supervised(DataModule):
    """What data modules of examples share; a YAML names one of its kinds."""

    sources: list[str | dict[str, Any]] | dict[str, Any] | str = "stdlib"
    """Where the examples come from: `stdlib` (the standard library's documented functions, no
    download), presets such as `code-exercises` and `flan-1m`, paths to .json, .jsonl and .parquet
    files, hub ids, or mappings with the keys of `phi_lit.data.examples.ExampleSource` (prompt,
    answer, system, where, weight, ...)."""
    data_dir: Path = Path("data/examples")
    """Holds the prepared examples, one directory for every combination of sources, tokenizer and
    prompt style."""
    prompt_style: str | PromptStyle = "default"
    """What is put around a question, in training as in `litgpt chat` later (`litgpt.prompts`)."""
    mask_prompt: bool = True
    """Learn the answers only, not the questions."""
    max_length: int | None = None
    """Ids of an example, question and answer together; default: the command's
    train.max_seq_length."""
    too_long: TooLong = "drop"
    """What becomes of a longer example: drop, truncate (its end is lost), or split (into rows that
    go on where the last one ended)."""
    val_fraction: float = 0.01
    """Share of the examples held out for validation."""
    split_seed: int = 42
    """Decides which examples are held out (not the order of the rows)."""
    seed: int = 42
    """Decides the order of the examples in LitGPT's own loops; ours takes the command's."""

    def __post_init__(self) -> None:
        super().__init__()
        if isinstance(self.prompt_style, str):
            self.prompt_style = _style(self.prompt_style)
        self._tokenizer: Tokenizer | None = None
        self._sources: list[ExampleSource] = []
        self._store: ExampleStore | None = None
        self._batch_size, self._max_length = 1, self.max_length
        self._reported = ""

    def connect(
        self,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 1,
        max_seq_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what only the training command knows.

        Args:
            tokenizer: LitGPT's, from the checkpoint directory.
            batch_size: examples in a micro-batch.
            max_seq_length: ids in a row.
            **kwargs: of no use here.

        Raises:
            UserError: a source or a setting is written wrongly.
        """
        faults = []
        if not 0 < self.val_fraction < 1:
            faults.append(f"val_fraction is {self.val_fraction}; choose more than 0, less than 1")
        if self.too_long not in get_args(TooLong):
            faults.append(f"too_long is {self.too_long!r}; choose {', '.join(get_args(TooLong))}")
        if self.max_length is not None and self.max_length < 2:
            faults.append(f"max_length is {self.max_length}; an example has at least 2 ids")
        if faults:
            raise UserError("; ".join(faults) + ".")
        self._sources = open_sources(self.sources, ExampleSource)
        self._tokenizer, self._batch_size = tokenizer, batch_size
        limits = [limit for limit in (self.max_length, max_seq_length) if limit and limit > 0]
        self._max_length = min(limits) if limits else None

    def prepare_data(self) -> None:
        """Find the encoded examples, or encode them (LitGPT calls this on the first rank first).

        Raises:
            UserError: no tokenizer, no end-of-text token, an unusable source, a full disk.
        """
        if self._tokenizer is None:
            raise UserError(
                "no tokenizer: examples are encoded with that of the checkpoint directory, or with "
                "the command's --tokenizer_dir."
            )
        assert isinstance(self.prompt_style, PromptStyle)
        self._store = prepare_examples(
            self.data_dir,
            self._sources,
            Encoder(self._tokenizer, self.prompt_style),
            say=say_once(),
        )

    def setup(self, stage: str = "") -> None:
        """Choose what is held out, and say what does not fit in a row.

        Raises:
            UserError: nothing is left to train on, or to hold out.
        """
        assert self._store is not None, "prepare_data comes before setup"
        held = held_out(self._store.hashes, self.val_fraction, self.split_seed)
        once = np.zeros(len(held), bool)  # a repetition would only weigh the validation loss
        once[np.unique(self._store.hashes, return_index=True)[1]] = True
        train, val = np.flatnonzero(~held), np.flatnonzero(held & once)
        self.train_dataset, self.test_dataset = self._view(train), self._view(val)
        for split, dataset in (("train", self.train_dataset), ("validation", self.test_dataset)):
            if not len(dataset):
                raise UserError(
                    f"no example is left in the {split} split of {len(held):,}: "
                    f"{_told(dataset.counts)} (rows of {self._max_length} ids). Choose longer rows "
                    "(train.max_seq_length), too_long: truncate or split, or more examples."
                )
        if (report := self._report()) != self._reported:
            say_once()(report)
        self._reported = report

    def _report(self) -> str:
        train, val = self.train_dataset, self.test_dataset
        lost = {
            name: train.counts[name] + val.counts[name]
            for name in ("longer than a row", "left without a target")
        }
        fate = {"drop": "dropped", "truncate": "truncated", "split": "split"}[self.too_long]
        notes = [
            f"{n:,} {name}{f' of {self._max_length:,} ids: {fate}' if 'longer' in name else ''}"
            for name, n in lost.items()
            if n
        ]
        return (
            f"  {len(train):,} to train on, {len(val):,} held out; {train.n_targets:,} of "
            f"{int(train.lengths.sum()):,} ids to learn" + "".join(f"; {note}" for note in notes)
        )

    def _view(self, chosen: np.ndarray) -> ExampleDataset:
        assert self._store is not None
        return ExampleDataset(
            self._store,
            chosen,
            max_length=self._max_length,
            too_long=self.too_long,
            mask_prompt=self.mask_prompt,
        )

    def train_dataloader(self) -> DataLoader:
        """Return a loader that shuffles, pads each batch to its longest, and can be indexed."""
        return self._loader(self.train_dataset, torch.Generator().manual_seed(self.seed))

    def val_dataloader(self) -> DataLoader:
        """Return the loader of held-out examples, in an order that is always the same."""
        return self._loader(self.test_dataset, None)

    def _loader(self, dataset: ExampleDataset, generator: torch.Generator | None) -> DataLoader:
        assert self._tokenizer is not None
        return DataLoader(
            dataset,
            batch_size=self._batch_size,
            shuffle=generator is not None,
            generator=generator,
            collate_fn=get_sft_collate_fn(
                pad_id=padding_id(self._tokenizer) or 0, ignore_index=IGNORE
            ),
        )

    def question(self) -> torch.Tensor:
        """Return the ids of the first held-out question (T,), int64, its prompt style included."""
        return self.test_dataset.question(0)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; the model's padded vocabulary must not be smaller."""
        assert self._store is not None
        return self._store.vocab_size

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must find unchanged for its place to mean the same."""
        assert self._store is not None
        settings = self._store.manifest["settings"]
        return {
            "examples": self._store.manifest["digest"],
            "encoding": settings["encoding"],
            "max_length": self._max_length,
            **{
                name: getattr(self, name)
                for name in ("mask_prompt", "too_long", "val_fraction", "split_seed")
            },
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.sources})"


def held_out(hashes: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Tell for every example whether it is held out, by the hash of its text and a seed.

    Equal texts are always on the same side. Both sides get at least one text, where there are two.
    """
    values = mix_array(hashes ^ np.uint64(mix(seed & MASK)))
    threshold = np.uint64(min(int(fraction * 2**64), 2**64 - 1))
    held = values < threshold
    if not held.any():
        held = values == values.min()
    elif held.all():
        held = values != values.max()
    return held


def _style(name: str) -> PromptStyle:
    styles = {"default": Default, **prompt_styles}
    if name not in styles:
        raise UserError(
            f"prompt_style is {name!r}.{did_you_mean(name, styles)} LitGPT's are "
            f"{', '.join(sorted(styles))}."
        )
    return styles[name]()


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
