"""Data sets of the Hugging Face hub, through `datasets` (imported only when one is asked for)."""

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from phi_lit.errors import UserError

if TYPE_CHECKING:
    from phi_lit.data.sources import Source

_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}


def read_hub(source: "Source") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a name and the columns of every row of a source's data set.

    Raises:
        UserError: it cannot be opened, lacks the columns, or the connection broke.
    """
    dataset = _open(source)
    names = dataset.column_names
    if names is not None:
        source.rows.check_names(names)
        dataset = dataset.select_columns([n for n in names if n in source.rows.needed()])
    try:
        for number, row in enumerate(dataset):
            yield f"{source.hub}#{number}", row
    except hub_errors() as error:
        if isinstance(error, ValueError):  # what the files hold, not the way to them
            raise
        raise UserError(
            f"{source.label}: reading stopped: {first_line(error)}. Run the same command again: "
            "it goes on from the last part written."
        ) from error


def _open(source: "Source") -> Any:
    """Open the data set: an iterable of dicts with `column_names` and `select_columns`.

    The revision is resolved to a commit first, so that all files come from the same one; it is left
    in `source.commit`.

    Raises:
        UserError: it does not exist, is gated, has no such configuration or cannot be reached.
    """
    import datasets

    assert source.hub is not None
    local = os.path.isdir(source.hub)
    trouble = None
    if not local and source.commit is None:
        source.commit, trouble = _commit(source.hub, source.revision)
    revision = None if local else source.commit or source.revision
    try:
        if source.data_files is None:
            return datasets.load_dataset(
                source.hub,
                source.config,
                split=source.split,
                streaming=source.streaming,
                revision=revision,
            )
        root = source.hub if local else f"hf://datasets/{source.hub}@{revision or 'main'}"
        return datasets.load_dataset(
            _builder(source.data_files),
            data_files={source.split: f"{root}/{source.data_files}"},
            split=source.split,
            streaming=source.streaming,
        )
    except hub_errors() as error:
        reason = trouble or first_line(error)
        raise UserError(
            f"{source.label}: the data set cannot be opened: {reason}. Check its id, "
            "`config`, `split` and your connection; a gated one needs `hf auth login`."
        ) from error


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub and datasets raise for refusals and broken connections."""
    errors: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError)
    with suppress(ImportError):  # what huggingface_hub talks through from 1.0 on
        import httpx

        errors += (httpx.HTTPError,)
    return errors


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _builder(data_files: str) -> str:
    """Return the name of datasets' reader for files of that name."""
    stem = data_files.removesuffix(".gz").removesuffix(".zst")
    return _BUILDERS.get(os.path.splitext(stem)[1], "text")


def _commit(hub: str, revision: str | None) -> tuple[str | None, str | None]:
    """Return the commit that a revision means now, or else what kept the hub from saying it."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(hub, revision=revision, timeout=10).sha, None
    except Exception as error:  # not fatal: offline with a warm cache, load_dataset succeeds
        return None, first_line(error)
