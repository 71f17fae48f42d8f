"""The most fragile promise: after an install, plain `litgpt` knows us, from wheel and checkout.

Each kind is installed into a new virtual environment that sees the dependencies of this one (links
to everything in its site-packages but phi_lit) and nothing of the checkout.
"""

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import phi_lit

ROOT = Path(phi_lit.__file__).resolve().parent.parent
SOURCE = ("phi_lit", "extensions", "config_hub", "pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").is_file(), reason="needs the checkout that is to be installed"
)


def run(*command, cwd, check=True, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "VIRTUAL"))}
    env |= {"COLUMNS": "200", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    env.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_checkout(target: Path) -> Path:
    target.mkdir()
    for name in SOURCE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, target / name)
    return target


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory) -> Path:
    """Return a directory of links to everything installed here, phi_lit left out."""
    directory = tmp_path_factory.mktemp("dependencies")
    places = [*site.getsitepackages(), site.getusersitepackages()]
    for place in [p for p in places if p in sys.path]:
        for entry in Path(place).iterdir():
            link = directory / entry.name
            ours = "phi_lit" in entry.name or entry.name in ("phi-lit.egg-link", "extensions")
            if not ours and entry.suffix != ".pth" and not link.exists():
                link.symlink_to(entry)
    return directory


@pytest.fixture(scope="module")
def new_environment(tmp_path_factory, dependencies):
    """Make virtual environments that hold LitGPT's own console script and no phi_lit."""

    def make(name: str) -> Path:
        home = tmp_path_factory.mktemp(name)
        run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = Path(run(home / "bin" / "python", "-c", ask, cwd=home).strip())
        (packages / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
        script = home / "bin" / "litgpt"
        lines = (Path(sys.executable).parent / "litgpt").read_text(encoding="utf-8").splitlines()
        script.write_text("\n".join([f"#!{home}/bin/python", *lines[1:]]) + "\n", encoding="utf-8")
        script.chmod(0o755)
        code = "from importlib.util import find_spec; print(find_spec('phi_lit'))"
        assert run(home / "bin" / "python", "-c", code, cwd=home).strip() == "None"
        return home

    return make


def install(home: Path, *what) -> None:
    run(
        sys.executable, "-m", "pip", "--python", home / "bin" / "python", "install",
        "--no-index", "--no-deps", "--no-build-isolation", *what, cwd=home,
    )  # fmt: skip


def assert_litgpt_knows_us(home: Path, lies_in: Path) -> None:
    """Run plain `litgpt` and `python -m litgpt` away from the checkout, ours from `lies_in`."""
    away = home / "away"
    away.mkdir()
    bin_dir = home / "bin"
    code = (
        "import torch, phi_lit, litgpt; from litgpt import Config; "
        "assert Config.from_name('phi-1').n_layer == 24; print(phi_lit.__file__)"
    )
    where = Path(run(bin_dir / "python", "-c", code, cwd=away).strip())
    assert where.resolve().is_relative_to(lies_in.resolve())
    code = (
        "import litgpt, extensions.phi_moe as moe; from litgpt import GPT, Config; "
        "model = GPT(Config.from_name('phi1-test-moe')); "
        "assert type(model.transformer.h[0].mlp) is moe.PhiMoE; print(moe.__file__)"
    )
    where = Path(run(bin_dir / "python", "-c", code, cwd=away).strip())
    assert where.resolve().is_relative_to(lies_in.resolve())
    help_text = run(bin_dir / "litgpt", "pretrain", "--help", cwd=away)
    assert "--train.lr_schedule" in help_text
    assert "--train.attention_dropout" in help_text
    names = run(bin_dir / "python", "-m", "litgpt", "pretrain", "list", cwd=away).splitlines()
    assert {"phi-1", "phi1-small", "phi1-nano", "phi-1_5"} <= set(names)
    listed = run(bin_dir / "phi-lit", "configs", cwd=away)
    configs = [path.name for path in (ROOT / "config_hub").glob("*.yaml")]
    assert configs
    assert all(name in listed for name in configs)
    assert str(ROOT) not in listed
    assert "prepare" in run(bin_dir / "python", "-m", "phi_lit", "--help", cwd=away)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Build the sdist, and the wheel from that sdist; return their directory."""
    source = copy_of_checkout(tmp_path_factory.mktemp("source") / "checkout")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    return out


def test_wheel_from_sdist_holds_every_module_and_config(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = [*ROOT.glob("phi_lit/**/*.py"), *ROOT.glob("extensions/**/*.py")]
    assert {str(path.relative_to(ROOT)) for path in modules} <= names
    assert "phi_lit/py.typed" in names
    packaged = {name.rpartition("config_hub/")[2] for name in names if "config_hub/" in name}
    assert {path.name for path in (ROOT / "config_hub").glob("*.yaml")} <= packaged
    assert not any(name.startswith(("tests", "benchmarks")) for name in names)


def test_litgpt_knows_us_after_the_wheel_is_installed(built, new_environment):
    home = new_environment("wheel")
    (wheel,) = built.glob("*.whl")
    install(home, wheel)
    assert_litgpt_knows_us(home, lies_in=home)
    run(
        sys.executable, "-m", "pip", "--python", home / "bin" / "python", "uninstall", "-y",
        "phi-lit", cwd=home,
    )  # fmt: skip
    code = "from litgpt.config import name_to_config; print('phi-1' in name_to_config)"
    assert run(home / "bin" / "python", "-c", code, cwd=home).strip() == "False"
    assert (home / "bin" / "litgpt").is_file()


def test_litgpt_knows_us_after_an_editable_install(tmp_path, new_environment):
    source = copy_of_checkout(tmp_path / "checkout")
    home = new_environment("editable")
    install(home, "-e", source)
    assert_litgpt_knows_us(home, lies_in=source)
