"""Instruct: instructions with a teacher's answers, as in Orca (arXiv 2306.02707).

A system message, an instruction and the answer of a larger model; only the answer is learned. What
this module adds to `supervised.py` is its defaults.
"""

from dataclasses import dataclass
from pathlib import Path

from litgpt.prompts import PromptStyle

from phi_lit.data.supervised import Supervised


@dataclass
class Instruct(Supervised):
    """System message, instruction and a teacher's answer, of which the answer is learned (Orca)."""

    data_dir: Path = Path("data/instructions")
    """Holds the prepared examples, one directory for every combination of sources, tokenizer and
    prompt style."""
    prompt_style: str | PromptStyle = "freewilly2"
    """What is put around system message and instruction, in training as in `litgpt chat` later
    (`litgpt.prompts`); freewilly2 is the form that models trained in Orca's way took up."""
