"""The YAMLs that come with phi_lit: where they lie, and copies of them to change.

In a checkout (and an editable install) they are in its `config_hub/`; a wheel installs them as data
files below `share/phi_lit/config_hub` of the environment, which package metadata knows.
"""

from importlib import metadata
from pathlib import Path

from phi_lit.errors import UserError
from phi_lit.files import write_atomic


def configs(copy_to: Path | None = None) -> None:
    """List the packaged training configs, or copy them to a directory.

    Args:
        copy_to: Directory to copy every YAML into; files already there are kept, and named.
    """
    found = packaged_configs()
    if copy_to is None:
        for path in found:
            print(f"{path}\n    {_first_comment(path)}")
        return
    for path in found:
        target = copy_to / path.name
        if target.exists():
            print(f"kept {target} (already there)")
        else:
            write_atomic(target, path.read_bytes())
            print(f"wrote {target}")


def packaged_configs() -> list[Path]:
    """Return the YAML files that come with this installation, sorted by name.

    Raises:
        UserError: the installation has none.
    """
    found = _in_checkout() or _in_installation()
    if not found:
        raise UserError(
            "this installation of phi_lit has no config_hub. Reinstall it with pip, or take the "
            "directory config_hub from its source."
        )
    return sorted(found, key=lambda path: path.name)


def _in_checkout() -> list[Path]:
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").is_file():
        return []
    return list((root / "config_hub").glob("*.yaml"))


def _in_installation() -> list[Path]:
    try:
        files = metadata.files("phi-lit") or []
    except metadata.PackageNotFoundError:
        return []
    paths = [Path(str(file.locate())).resolve() for file in files if file.suffix == ".yaml"]
    return [path for path in paths if path.parent.name == "config_hub" and path.is_file()]


def _first_comment(path: Path) -> str:
    """Return what the YAML says of itself in its first line."""
    with open(path, encoding="utf-8") as file:
        return file.readline().lstrip("#").strip()
