"""The start-up hook, in Python processes of its own: what it touches; and torch survives it."""

import pytest

LOADED = "import sys; print(sorted(m for m in sys.modules if m.split('.')[0] in {})); "
KNOWS = (
    "import litgpt.config as c, litgpt.prompts as p; "
    "assert 'phi-1' in c.name_to_config and c.Config.from_name('microsoft/phi-1').n_layer == 24; "
    "assert type(p.model_name_to_prompt_style('phi-1')).__name__ == 'Default'; "
    "assert len(c.configs) == len(c.name_to_config)"
)


def loaded(packages):
    return LOADED.format(set(packages))


def test_interpreter_start_without_torch_is_untouched(run_python):
    done = run_python("-c", loaded({"phi_lit", "wrapt", "torch", "litgpt"}))
    assert done.stdout.strip() == "[]"


def test_importing_torch_loads_the_hooks_and_nothing_of_litgpt(run_python):
    done = run_python("-W", "error", "-c", "import torch; " + loaded({"phi_lit", "litgpt"}))
    assert done.stdout.strip() == str(
        ["phi_lit", "phi_lit.autoload", "phi_lit.errors", "phi_lit.seam_table", "phi_lit.seams"]
    )
    assert done.stderr == ""


@pytest.mark.parametrize(
    "first",
    [
        "import litgpt.config",
        "import torch, lightning, litgpt.__main__",
        "import phi_lit.registry, phi_lit.seams, litgpt.model",
        "import litgpt; from phi_lit.autoload import register; register(); register()",
    ],
)
def test_litgpt_knows_us_whatever_is_imported_first(run_python, first):
    run_python("-c", f"{first}; {KNOWS}")


def test_hooks_can_be_put_on_after_litgpt_was_imported(run_python):
    late = "import litgpt; from phi_lit.autoload import hook_litgpt; hook_litgpt(); "
    run_python("-c", late + KNOWS, autoload=False)


def test_autoload_switched_off_leaves_litgpt_as_it_is(run_python):
    code = "import litgpt.config as c; assert 'phi-1' not in c.name_to_config; "
    done = run_python("-c", code + loaded({"phi_lit"}), autoload=False)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("broken", ["wrapt", "phi_lit.seams"])
@pytest.mark.parametrize("options", [(), ("-W", "error")], ids=["default", "warnings-are-errors"])
def test_an_error_in_us_is_a_warning_and_torch_goes_on(run_python, broken, options):
    code = f"import sys; sys.modules[{broken!r}] = None; import torch; print(torch.ones(2).sum())"
    done = run_python(*options, "-c", code)
    assert done.stdout.strip() == "tensor(2.)"
    assert "phi_lit could not hook into LitGPT" in done.stderr
    assert broken in done.stderr


def test_spawned_children_know_us(run_python, tmp_path):
    script = tmp_path / "spawns.py"
    script.write_text(
        "import multiprocessing\n"
        "def layers(name):\n"
        "    from litgpt import Config\n"
        "    return Config.from_name(name).n_layer\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(layers, ['phi-1', 'phi1-small']))\n",
        encoding="utf-8",
    )
    assert run_python(script).stdout.strip() == "[24, 20]"


def test_a_user_error_ends_a_litgpt_program_as_one_line_and_exit_code_1(run_python):
    code = "from litgpt import Config; Config.from_name('phi1-smal')"
    done = run_python("-c", code, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("phi_lit: error: 'phi1-smal' is not a supported")
    assert "'phi1-small'" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_litgpt_is_refused_in_one_line_with_both_versions(run_python, tmp_path):
    import importlib.util
    import shutil
    from pathlib import Path

    installed = Path(importlib.util.find_spec("litgpt").origin).parent
    ignore = shutil.ignore_patterns("__pycache__")
    other = Path(shutil.copytree(installed, tmp_path / "litgpt", ignore=ignore))
    source = (other / "prompts.py").read_text(encoding="utf-8")
    before = "def model_name_to_prompt_style(model_name: str)"
    assert before in source
    after = before.replace("model_name: str", "model_name: str, system: str = ''")
    (other / "prompts.py").write_text(source.replace(before, after), encoding="utf-8")
    (tmp_path / "litgpt-9.0.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: litgpt\nVersion: 9.0\n"
    (tmp_path / "litgpt-9.0.dist-info" / "METADATA").write_text(metadata, encoding="utf-8")
    done = run_python("-m", "litgpt", "download", "list", check=False, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("phi_lit: error: phi_lit ")
    assert " was written against litgpt 0.5.13, but " in done.stderr
    assert "litgpt 9.0 is installed: litgpt.prompts.model_name_to_prompt_style" in done.stderr
    assert "(model_name, system=) where (model_name) was expected" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    run_python("-W", "error", "-c", "import torch", PYTHONPATH=str(tmp_path))
