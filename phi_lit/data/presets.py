"""Public data sets by short name: the open replicas of phi-1's data and the general texts.

The paper's CodeTextbook and CodeExercises were never published; these are what others made in their
image. Each entry says where it lies, which columns make a document, and under which terms. Data
sets that hold identifiers instead of text are entries too, so that asking for one says why not.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from phi_lit.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Preset:
    """A public data set: what to read from it and what its owner asks.

    Args:
        hub: its id on the Hugging Face hub.
        licence: as its card states it; read the card before you train on it.
        config: the configuration's name, where it has several.
        columns: the columns that make a document, joined by a blank line.
        template: in place of `columns`, a text with `{column}` where values go.
        example: (prompt, answer) or (prompt, answer, system message), as columns or templates,
            where its rows are questions with answers.
        where: values that columns must have.
        data_files: the files inside the repository, for those that are published with a loading
            script, which `datasets` no longer runs.
        strip: what surrounds every text and is cut off (see `Source.strip`).
        note: what to know before using it.
        refused: why it cannot be used at all.
    """

    hub: str
    licence: str
    config: str | None = None
    columns: str | list[str] | None = None
    template: str | None = None
    example: tuple[str, ...] = ()
    where: dict[str, Any] = field(default_factory=dict)
    data_files: str | None = None
    strip: Literal["gutenberg"] | None = None
    note: str = ""
    refused: str = ""


_IDS_ONLY = (
    "it holds no text, only identifiers of files to fetch from Software Heritage. Fetch them first "
    "(its card shows how), save a `text` column as parquet and give that path as the source"
)

PRESETS: dict[str, Preset] = {
    # Exercises and short programs
    "code-exercises": Preset(
        "jinaai/code_exercises",
        "CC-BY-NC-SA-4.0",
        template="{problem}{solution}",
        example=("problem", "solution"),
        note="made by GPT-3.5 in the image of CodeExercises; not for commercial use",
    ),
    "tiny-codes": Preset(
        "nampdn-ai/tiny-codes",
        "MIT",
        template="{prompt}\n\n{response}\n",
        example=("{prompt}\n\n", "{response}\n"),
        where={"programming_language": "Python"},
        note="gated: accept its terms on the hub and log in",
    ),
    # Instructions with a teacher's answers, as in Orca
    "flan-5m": Preset(
        "Open-Orca/OpenOrca",
        "MIT; written by ChatGPT, whose terms of use apply to its output",
        template="{system_prompt}\n\n{question}\n\n{response}\n",
        example=("question", "response", "system_prompt"),
        data_files="3_5M-GPT3_5-Augmented.parquet",
        note="an open replica of Orca's FLAN-5M: some 3.2 M questions of FLAN with answers",
    ),
    "flan-1m": Preset(
        "Open-Orca/OpenOrca",
        "MIT; written by GPT-4, whose terms of use apply to its output",
        template="{system_prompt}\n\n{question}\n\n{response}\n",
        example=("question", "response", "system_prompt"),
        data_files="1M-GPT4-Augmented.parquet",
        note="an open replica of Orca's FLAN-1M: some 1 M questions of FLAN with answers",
    ),
    # Textbooks
    "textbooks": Preset(
        "open-phi/textbooks",
        "none stated: ask its owner",
        columns="markdown",
        note="its `concepts` and `outline` change type between revisions; only `markdown` is read",
    ),
    "programming-books": Preset(
        "open-phi/programming_books_llama",
        "none stated: ask its owner; made with Llama, whose licence applies to its output",
        columns="markdown",
    ),
    "textbooks-lite": Preset(
        "SciPhi/textbooks-are-all-you-need-lite",
        "Llama 2 Community License",
        columns="completion",
    ),
    "textbook-quality-programming": Preset(
        "vikp/textbook_quality_programming",
        "none stated: ask its owner",
        columns="markdown",
    ),
    "cosmopedia": Preset(
        "HuggingFaceTB/cosmopedia",
        "Apache-2.0",
        config="stanford",
        columns="text",
        note="other configurations: auto_math_text, khanacademy, openstax, stories, "
        "web_samples_v1, web_samples_v2, wikihow",
    ),
    # Code to filter
    "the-stack-dedup": Preset(
        "bigcode/the-stack-dedup",
        "each file's own permissive licence, and The Stack's terms of use",
        columns="content",
        data_files="data/python/*.parquet",
        note="gated: accept its terms on the hub and log in; unfiltered, the paper kept about 1/5",
    ),
    "github-code-clean": Preset(
        "codeparrot/github-code-clean",
        "each file's own licence (column `license`)",
        columns="code",
        where={"language": "Python"},
        data_files="data/*.parquet",
        note="unfiltered; add `license: mit` to `where` to keep one licence",
    ),
    # General text
    "refinedweb": Preset("tiiuae/falcon-refinedweb", "ODC-By-1.0", columns="content"),
    "c4": Preset("allenai/c4", "ODC-By-1.0", config="en", columns="text"),
    "pile-dedup": Preset(
        "EleutherAI/the_pile_deduplicated",
        "none stated: its parts have licences of their own, some of them contested",
        columns="text",
    ),
    "gutenberg": Preset(
        "sedthh/gutenberg_english",
        "MIT for the collection; its books are in the public domain in the USA, and Project "
        "Gutenberg's own licence and trademark apply where its name is kept",
        columns="TEXT",
        strip="gutenberg",
        note="48,000 English books; elsewhere than in the USA a book may still be protected",
    ),
    "redpajama": Preset(
        "togethercomputer/RedPajama-Data-1T-Sample",
        "each part's own licence (see its card)",
        columns="text",
        data_files="*.jsonl",
        note="the 1B-token sample; the whole of RedPajama lies outside the hub: download it and "
        "give its .jsonl.zst files as a `path`",
    ),
    "slimpajama": Preset(
        "cerebras/SlimPajama-627B",
        "each part's own licence (see its card)",
        columns="text",
        note="RedPajama cleaned and deduplicated",
    ),
    # No text inside
    "python-edu": Preset(
        "HuggingFaceTB/smollm-corpus", "ODC-By-1.0", config="python-edu", refused=_IDS_ONLY
    ),
    "stack-edu": Preset("HuggingFaceTB/stack-edu", "see its card", refused=_IDS_ONLY),
    "the-stack-v2": Preset("bigcode/the-stack-v2", "see its card", refused=_IDS_ONLY),
    "the-stack-v2-dedup": Preset("bigcode/the-stack-v2-dedup", "see its card", refused=_IDS_ONLY),
}
"""The data sets by name. None of them could be fetched where this table was written (no network):
its facts are from the cards; a wrong column is reported with those that the data set has."""


def find_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        UserError: there is none, or it holds no text.
    """
    if name not in PRESETS:
        usable = [key for key, preset in PRESETS.items() if not preset.refused]
        raise UserError(
            f"there is no preset {name!r}.{did_you_mean(name, usable)} "
            f"Presets: {', '.join(sorted(usable))}."
        )
    preset = PRESETS[name]
    refuse_ids_only(preset.hub, preset.config)
    return preset


def refuse_ids_only(hub: str, config: str | None) -> None:
    """Raise a `UserError` if that data set on the hub is known to hold no text."""
    for preset in PRESETS.values():
        same_config = preset.config is None or preset.config == config
        if preset.refused and preset.hub.lower() == hub.lower() and same_config:
            raise UserError(
                f"{hub}{f' ({config})' if config else ''} cannot be trained on: {preset.refused}."
            )
