"""Imports point one way, and importing phi_lit costs nothing (house.md's arrows, as a test)."""

import ast
import sys
from pathlib import Path

import pytest

import phi_lit

ROOT = Path(phi_lit.__file__).parent.parent
HEAVY = {"torch", "litgpt", "lightning", "datasets", "matplotlib", "transformers", "tiktoken"}


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Return the modules that a file imports, those under TYPE_CHECKING aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names: set[str] = set()
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1])
            module = f"{base}.{node.module}".rstrip(".") if node.level else str(node.module)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        if not (top_level_only and isinstance(node, ast.FunctionDef)):
            pending += ast.iter_child_nodes(node)
    return names


def files(below: str) -> list[Path]:
    return sorted((ROOT / below).rglob("*.py"))


def inside(names: set[str], *packages: str) -> set[str]:
    return {n for n in names if any(n == p or n.startswith(f"{p}.") for p in packages)}


def test_data_never_imports_train():
    found = {path.name: inside(imported(path), "phi_lit.train") for path in files("phi_lit/data")}
    assert found
    assert not {name: bad for name, bad in found.items() if bad}


def test_extensions_never_import_phi_lit():
    found = {p.name: inside(imported(p), "phi_lit") for p in files("extensions")}
    assert not {name: bad for name, bad in found.items() if bad}
    assert not (ROOT / "extensions" / "__init__.py").exists()  # a namespace, as in LitGPT


def test_autoload_needs_only_the_standard_library_and_wrapt():
    allowed = sys.stdlib_module_names | {"wrapt", "phi_lit"}
    for name in ("autoload", "seams", "errors", "__init__"):
        path = ROOT / "phi_lit" / f"{name}.py"
        assert {module.split(".")[0] for module in imported(path, top_level_only=True)} <= allowed
    autoload = imported(ROOT / "phi_lit" / "autoload.py")
    assert {module.split(".")[0] for module in autoload} <= allowed


@pytest.mark.parametrize(
    "module", ["phi_lit", "phi_lit.autoload", "phi_lit.seams", "phi_lit.registry", "phi_lit.data"]
)
def test_importing_these_loads_nothing_heavy(run_python, module):
    code = f"import sys, {module}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    assert not HEAVY & set(run_python("-c", code).stdout.split())


def test_heavy_packages_are_imported_inside_functions_only():
    lazy = HEAVY - {"torch", "litgpt", "lightning"}
    for path in files("phi_lit"):
        top = {module.split(".")[0] for module in imported(path, top_level_only=True)}
        assert not lazy & top, path


def test_only_seams_names_what_it_replaces():
    """No other file assigns to an attribute of a LitGPT or Lightning module."""
    for path in files("phi_lit"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = [
            ast.unparse(target)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
        ]
        assert not [t for t in targets if t.startswith(("litgpt.", "lightning."))], path
