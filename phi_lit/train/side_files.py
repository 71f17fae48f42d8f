"""What lies beside the weights in a checkpoint of a run and makes it a LitGPT checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import yaml
from litgpt.prompts import save_prompt_style
from litgpt.utils import save_config

from phi_lit.errors import UserError
from phi_lit.train import checkpoint
from phi_lit.train.checkpoint_dir import TOKENIZER_FILES
from phi_lit.train.job import Job, plain


def weights_file(job: Job) -> str:
    """Return the name of the file with the weights that a run trains."""
    return job.adaptation.weights_file if job.adaptation else checkpoint.MODEL_FILE


def side_files(job: Job) -> Callable[[Path], None]:
    """Return what writes a checkpoint's other files, those that make it LitGPT's."""

    words = hub_config(job)

    def write(directory: Path) -> None:
        if job.adaptation is None:
            save_config(job.config, directory)
        else:  # the base model's: the method's own fields are in hyperparameters.yaml
            assert job.weights_dir is not None
            shutil.copyfile(job.weights_dir / "model_config.yaml", directory / "model_config.yaml")
        if words is not None:
            (directory / "config.json").write_text(words, encoding="utf-8")
        for name in TOKENIZER_FILES if job.tokenizer_dir else ():
            if (job.tokenizer_dir / name).is_file():  # type: ignore[operator]
                shutil.copyfile(job.tokenizer_dir / name, directory / name)  # type: ignore[operator]
        save_prompt_style(job.prompt_style, directory)
        with open(directory / "hyperparameters.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump(plain(job.arguments), file, sort_keys=False)

    return write


def hub_config(job: Job) -> str | None:
    """Return the config.json that transformers (and so `litgpt evaluate`) wants, or None for a
    model that transformers does not have."""
    from phi_lit.export.configuration import checkpoint_words

    try:
        words = checkpoint_words(job.config, job.weights_dir, job.tokenizer_dir)
    except UserError:  # such as a mixture of experts: LitGPT alone computes it
        return None
    return json.dumps(words, indent=2) + "\n"
