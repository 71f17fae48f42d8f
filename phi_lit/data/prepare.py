"""`phi-lit prepare`: any sources into a token store, ahead of training and with a report.

What the Agora READMEs call build_dataset. A training run prepares its tokens by itself; this is for
doing it where the cores are, looking at what came out, and sharing it.
"""

from pathlib import Path
from typing import Any

from phi_lit.data.building import prepare_store, say_on_stderr
from phi_lit.data.hub import first_line, hub_errors
from phi_lit.data.rows import count_rows
from phi_lit.data.sources import Source, open_sources
from phi_lit.data.tokens import MANIFEST, SPLITS, TokenStore
from phi_lit.errors import UserError


def prepare(
    sources: list[str | dict[str, Any]] | dict[str, Any] | str | None = None,
    tokenizer_dir: Path | None = None,
    data_dir: Path = Path("data/tokens"),
    val_fraction: float = 0.01,
    seed: int = 42,
    seq_length: int = 2048,
    num_workers: int | None = None,
    push_to_hub: str | None = None,
    dry_run: bool = False,
) -> None:
    """Turn text into the token store that CodeTextbook trains from, and report what is in it.

    Args:
        sources: Where the text comes from, as in CodeTextbook: `stdlib`, presets, paths, globs, hub
            ids or mappings. Python's standard library by default.
        tokenizer_dir: The tokenizer directory.
        data_dir: Holds one directory for every combination of sources and tokenizer; training finds
            it there again if its data.init_args say the same.
        val_fraction: Share of the documents held out for validation.
        seed: Decides which documents are held out (CodeTextbook's split_seed).
        seq_length: The row length to report rows for; the tokens can be cut to any.
        num_workers: Cores to tokenize on; all by default.
        push_to_hub: A data set id on the Hugging Face hub (owner/name) to upload the store to.
        dry_run: Only list the sources with their licences and look at their first documents.
    """
    opened: list[Source] = open_sources("stdlib" if sources is None else sources)
    if seq_length < 1:
        raise UserError(f"seq_length is {seq_length}; choose at least 1.")
    if dry_run:
        for source in opened:
            print(source.licence_line())
            source.check()
        print("every source has text; nothing was written")
        return
    if tokenizer_dir is None:
        raise UserError(
            "no tokenizer: give --tokenizer_dir. `phi-lit tokenizer codegen` makes phi-1's, "
            "`phi-lit tokenizer train` a small one."
        )
    if push_to_hub is not None:
        _check_login(push_to_hub)  # before hours of work, not after
    store = prepare_store(
        data_dir,
        opened,
        tokenizer_dir,
        val_fraction=val_fraction,
        split_seed=seed,
        num_workers=num_workers,
    )
    print(report(store, seq_length))
    if push_to_hub is not None:
        upload(store, push_to_hub)


def report(store: TokenStore, seq_length: int) -> str:
    """Return what a store holds: a line per split and source, duplicates and what was skipped."""
    manifest = store.manifest
    lines = [f"{store.path}: {store.dtype.name}, tokenizer {store.fingerprint[:12]}"]
    for split in SPLITS:
        held = manifest["splits"][split]
        # The <|endoftext|> after each document stands for no byte of text.
        ratio = held["bytes"] / max(held["tokens"] - held["documents"], 1)
        lines.append(
            f"  {split:<6}{held['documents']:>12,} documents {held['tokens']:>15,} tokens "
            f"{count_rows(held['tokens'], seq_length):>11,} rows of {seq_length:,}   "
            f"{ratio:.2f} bytes per token"
        )
    for found in manifest["sources"]:
        weight = f", read {found['weight']:g} times" if found["weight"] != 1 else ""
        commit = f", commit {found['commit'][:10]}" if found["commit"] else ""
        lines.append(
            f"  from {found['name']}: {found['documents']:,} documents, "
            f"{found['bytes'] / 1e6:,.1f} MB{weight}{commit}; "
            f"licence {found['licence'] or 'not stated'}"
        )
        counts = found["skipped"]["counts"]
        if counts:
            what = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
            lines.append(f"    skipped {what}: {'; '.join(found['skipped']['examples'][:5])}")
    lines.append(f"  duplicates seen: about {manifest['duplicates']:,} documents (kept)")
    return "\n".join(lines)


def upload(store: TokenStore, repo: str) -> None:
    """Upload a store to the hub as a data set, with a card that names its sources' licences.

    Raises:
        UserError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    say_on_stderr(f"uploading {store.path} to {repo}")
    try:
        api.create_repo(repo, repo_type="dataset", private=True, exist_ok=True)
        api.upload_file(
            path_or_fileobj=_card(store).encode(),
            path_in_repo="README.md",
            repo_id=repo,
            repo_type="dataset",
        )
        api.upload_folder(
            folder_path=store.path,
            repo_id=repo,
            repo_type="dataset",
            allow_patterns=["*.bin", MANIFEST],
        )
    except hub_errors() as error:
        raise UserError(f"{repo}: the upload failed: {first_line(error)}") from error
    print(f"uploaded to {api.endpoint}/datasets/{repo} (private until you open it there)")


def _check_login(repo: str) -> None:
    from huggingface_hub import HfApi

    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"push_to_hub is {repo!r}; a data set's id is owner/name.")
    try:
        HfApi().whoami()
    except hub_errors() as error:
        raise UserError(
            f"cannot upload to {repo}: {first_line(error)}. Log in with `hf auth login`, or set "
            "HF_TOKEN, with a token that may write; nothing was prepared."
        ) from error


def _card(store: TokenStore) -> str:
    return (
        "# Tokens\n\nPrepared by phi_lit: raw little-endian ids, documents separated by "
        f"`<|endoftext|>` ({store.manifest['tokenizer']['eot_id']}); see `{MANIFEST}`. Download "
        "the directory and give it to CodeTextbook as `store`.\n\n"
        f"```\n{report(store, 2048)}\n```\n"
    )
