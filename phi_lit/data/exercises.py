"""CodeExercises: functions to complete from their docstrings, in the paper's form or prompt masked.

The paper finetunes on them as it pretrains: problem and solution in one flat array, cut into rows
(arXiv 2306.11644, section 2.3). That is `mode: paper`, for `litgpt finetune_full`. `mode: sft`
shows one function at a time and learns the solution only, for every finetuning command of LitGPT.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from litgpt.tokenizer import Tokenizer
from torch.utils.data import DataLoader

from phi_lit.data.examples import ExampleSource
from phi_lit.data.sources import open_sources
from phi_lit.data.supervised import Supervised
from phi_lit.data.textbook import CodeTextbook
from phi_lit.errors import UserError

Mode = Literal["paper", "sft"]


@dataclass
class CodeExercises(Supervised):
    """Docstring -> solution: in one flat array (paper), or one at a time, prompt masked (sft)."""

    mode: Mode = "paper"
    """paper: problems and solutions in one flat array, everything learned, for finetune_full; sft:
    one function at a time, the solution learned, for all of LitGPT's finetuning commands."""
    data_dir: Path = Path("data/code-exercises")
    """Holds the prepared tokens, one directory for every combination of sources and tokenizer."""
    tokenizer_dir: Path | None = None
    """The tokenizer directory, where the command's own does not reach this."""
    num_workers: int | None = None
    """Cores to tokenize the flat array on; all by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._flat: CodeTextbook | None = None

    def connect(
        self,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 1,
        max_seq_length: int | None = None,
        tokenizer_dir: Path | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what only the training command knows; see `Supervised` and `CodeTextbook`.

        Raises:
            UserError: a source or a setting is written wrongly, or LitGPT's own loop, which takes
                one example at a time, is given the flat array.
        """
        if self.mode not in get_args(Mode):
            raise UserError(f"mode is {self.mode!r}; choose paper or sft.")
        if self.mode == "sft":
            super().connect(tokenizer, batch_size, max_seq_length)
            return
        directory = tokenizer_dir or self.tokenizer_dir
        if directory is None:
            raise UserError(
                "the flat array (data.mode: paper) is for `litgpt finetune_full` and `pretrain`; "
                "this command takes one example at a time: set data.init_args.mode: sft."
            )
        if self._flat is None:  # a command connects again when it knows how many rows it takes
            self._flat = CodeTextbook(
                sources=open_sources(self.sources, ExampleSource),  # type: ignore[arg-type]
                data_dir=self.data_dir,
                val_fraction=self.val_fraction,
                split_seed=self.split_seed,
                seed=self.seed,
                num_workers=self.num_workers,
            )
        self._flat.connect(tokenizer, batch_size, max_seq_length, tokenizer_dir=directory)

    def prepare_data(self) -> None:
        """Find what is prepared, or prepare it."""
        self._flat.prepare_data() if self._flat else super().prepare_data()

    def setup(self, stage: str = "") -> None:
        """Open what is prepared."""
        self._flat.setup(stage) if self._flat else super().setup(stage)

    def train_dataloader(self) -> DataLoader:
        """Return the loader of training rows or examples."""
        return self._flat.train_dataloader() if self._flat else super().train_dataloader()

    def val_dataloader(self) -> DataLoader:
        """Return the loader of held-out rows or examples."""
        return self._flat.val_dataloader() if self._flat else super().val_dataloader()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; the model's padded vocabulary must not be smaller."""
        return self._flat.vocab_size if self._flat else super().vocab_size

    @property
    def eot_id(self) -> int | None:
        """The token between two documents of the flat array, or None for single examples."""
        return self._flat.eot_id if self._flat else None

    def identity(self) -> dict[str, Any]:
        """Return what a resumed run must find unchanged for its place to mean the same."""
        return self._flat.identity() if self._flat else super().identity()

    def unigram_entropy(self) -> float | None:
        """Return the entropy of single tokens in the flat array, or None for single examples."""
        return self._flat.unigram_entropy() if self._flat else None
