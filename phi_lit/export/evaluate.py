"""`litgpt evaluate` for checkpoints that never were on the hub: a config.json is made for them.

LitGPT converts the weights and hands the directory to lm-eval, which loads it with transformers and
finds no config.json. Everything else is LitGPT's own.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import torch

from phi_lit.errors import UserError


def convert_and_evaluate(
    checkpoint_dir: Path,
    tasks: str | None = None,
    out_dir: Path | None = None,
    force_conversion: bool = False,
    num_fewshot: int | None = None,
    batch_size: int | str = 1,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    limit: float | None = None,
    seed: int = 1234,
    save_filepath: Path | None = None,
    access_token: str | None = None,
) -> None:
    """Evaluate a model with the LM Evaluation Harness.

    Arguments:
        checkpoint_dir: Directory where the `lit_model.pth` and tokenizer files are located.
        out_dir: Directory in which to save the converted checkpoints for evaluation.
            Saves to `checkpoint_dir`/evaluate by default.
        force_conversion: Set to `True` to reconvert the model and override
            an existing model.pth from a previous evaluation call.
        tasks: CSV of task names to evaluate. Example: "hellaswag,truthfulqa_mc2,mmlu"
        num_fewshot: Number of examples in few-shot context.
        batch_size: Batch size configuration as positive integer value (default: 1),
            "auto", in the format 'auto:N', where 'auto:4' recomputes the batch size 4 times.
        device: Device to use for evaluation, for example, "cuda" or "cuda:0".
        limit: Limit on number of examples per task.
        seed: Random seed.
        save_filepath: The file where the results will be saved.
            Saves to `out_dir/results.json` by default.
        access_token: Optional API token to access models with restrictions.
    """
    arguments = dict(locals())
    from litgpt.utils import extend_checkpoint_dir

    from phi_lit.seams import stock

    if find_spec("lm_eval") is None:
        raise UserError("litgpt evaluate needs lm-eval: pip install 'phi-lit[evaluate]' brings it")
    local = extend_checkpoint_dir(Path(checkpoint_dir))
    if tasks is not None and (local / "lit_model.pth").is_file():
        _give_config(local, Path(out_dir or local / "evaluate"))
    stock("litgpt.eval.evaluate.convert_and_evaluate")(**arguments)


def _give_config(checkpoint_dir: Path, out_dir: Path) -> None:
    """Put a config.json where the converted weights go, if the checkpoint has none to copy there.

    Raises:
        UserError: no architecture of transformers computes the model, the weights are unreadable,
            or the checkpoint's config.json is for another vocabulary.
    """
    from phi_lit.export.command import open_checkpoint
    from phi_lit.export.configuration import HUB_CONFIG, checkpoint_words, words_for
    from phi_lit.tensors import load_file

    config = open_checkpoint(checkpoint_dir)
    words = words_for(config, checkpoint_dir)
    load_file(checkpoint_dir / "lit_model.pth")
    if (checkpoint_dir / HUB_CONFIG).is_file():
        if words.get("vocab_size", config.padded_vocab_size) != config.padded_vocab_size:
            raise UserError(
                f"{checkpoint_dir / HUB_CONFIG} says vocab_size {words['vocab_size']}, but the "
                f"model has {config.padded_vocab_size} rows; write that number there"
            )
        return
    words = checkpoint_words(config, None, checkpoint_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / HUB_CONFIG).write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
