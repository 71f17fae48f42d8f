"""Sending an export to the hub, with the hub's own client.

The client reads the token from HF_TOKEN or `hf auth login` and the address from HF_ENDPOINT. What
the hub has already is not sent again, so the same command goes on after a broken connection.
"""

import re
from pathlib import Path
from typing import Any

from phi_lit.data.hub import first_line, hub_errors
from phi_lit.errors import UserError

REPLACED = ["*.safetensors", "*.safetensors.index.json"]
"""Weights of an earlier push that this one has no file for are removed in the same commit."""


def check_name(repo: str) -> None:
    """Raise a `UserError` unless `repo` is an id such as the hub gives."""
    part = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9])?"
    if not re.fullmatch(f"{part}/{part}", repo) or "--" in repo or ".." in repo:
        raise UserError(
            f"push is {repo!r}; a model's id on the hub is owner/name, of letters, digits, '-', "
            "'_' and '.'"
        )


def check_login(repo: str) -> None:
    """Ask the hub who we are, before anything is made.

    Raises:
        UserError: there is no token, the hub does not accept it, or it cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.whoami()
    except hub_errors() as error:
        raise UserError(
            f"cannot push to {repo} at {api.endpoint}: {first_line(error)}. Log in with `hf auth "
            "login` or set HF_TOKEN, with a token that may write; `--dry_run true` needs neither. "
            "Nothing was written"
        ) from error


def listing(directory: Path, repo: str, revision: str | None) -> str:
    """Return what would be sent: every file with its size."""
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    width = max(map(len, sizes))
    lines = [f"  {name:<{width}}  {size:>15,} bytes" for name, size in sizes.items()]
    total = f"{len(sizes)} files, {sum(sizes.values()):,} bytes"
    return "\n".join([f"{repo} ({revision or 'main'}) would get {total}:", *lines])


def push(directory: Path, repo: str, *, private: bool, revision: str | None) -> str:
    """Make the repository if need be and send every file of an export in one commit.

    Args:
        directory: the export.
        repo: owner/name.
        private: whether a new repository is private; one that exists keeps what it is.
        revision: the branch to send to (made if need be); the main one by default.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub refuses, or the connection broke.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done: Any = api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            revision=revision,
            commit_message="Exported by phi-lit",
            delete_patterns=REPLACED,
        )
    except hub_errors() as error:
        raise UserError(
            f"{repo}: the push failed: {first_line(error)}. {directory} is whole; run the same "
            "command again, and what has arrived is not sent again"
        ) from error
    return str(done.commit_url)
