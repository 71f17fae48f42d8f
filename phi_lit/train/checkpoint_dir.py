"""What makes a directory a LitGPT checkpoint, and what to say of one that is none.

LitGPT's own check prints a paragraph about downloads; most wrong directories here are a run's
`out_dir` where its `final/` was meant, or shards that have not been joined.
"""

from pathlib import Path

from litgpt.utils import auto_download_checkpoint, extend_checkpoint_dir

from phi_lit.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""What LitGPT reads a tokenizer from, and its chat template, of which a checkpoint has some."""


def find_checkpoint_dir(named: Path, access_token: str | None = None) -> Path:
    """Return the checkpoint directory of that name, downloaded if it is an id on the hub.

    Raises:
        UserError: it is no id, and no directory that holds a checkpoint.
    """
    directory = extend_checkpoint_dir(Path(named))
    is_hub_id = len(directory.parts) == 2 and directory.parts[0] not in ("checkpoints", "/")
    if is_hub_id and not directory.exists():
        directory = auto_download_checkpoint(model_name=named, access_token=access_token)
    require_checkpoint(directory)
    return directory


def require_checkpoint(directory: Path, *, tokenizer: bool = True) -> None:
    """Raise a `UserError` unless a directory holds weights, config and (if wanted) a tokenizer.

    Whether the files are whole is seen where they are read: `tensors.load_file`, and
    `checkpoint.read_manifest` where a run of ours wrote them.
    """
    if not directory.is_dir():
        what = "is a file, not a checkpoint directory" if directory.exists() else "does not exist"
        raise UserError(f"checkpoint directory {directory} {what}.{_nearby(directory)}")
    missing = [name for name in ("lit_model.pth", "model_config.yaml") if _lacks(directory, name)]
    if tokenizer and all(_lacks(directory, name) for name in TOKENIZER_FILES[:2]):
        missing.append("tokenizer.json (or tokenizer.model)")
    if tokenizer and _lacks(directory, "tokenizer_config.json"):
        missing.append("tokenizer_config.json")
    if missing:
        raise UserError(
            f"{directory} is no checkpoint: it lacks {', '.join(missing)}.{_nearby(directory)}"
        )


def _lacks(directory: Path, name: str) -> bool:
    return not (directory / name).is_file()


def _nearby(directory: Path) -> str:
    """Return what was probably meant."""
    if list(directory.glob("shard-*.pth")):
        return f" Its shards are not joined yet: `phi-lit consolidate {directory}`."
    for name in ("final", "latest"):
        if not _lacks(directory / name, "lit_model.pth"):
            return f" Did you mean {directory / name}?"
    return " `litgpt download` and our own runs (out_dir/final) leave such directories."
