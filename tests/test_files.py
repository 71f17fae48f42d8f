"""Files and directories are whole or not there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from phi_lit.errors import UserError, did_you_mean
from phi_lit.files import PARTIAL, RETIRED, staged_dir, write_atomic


def test_near_names_are_offered() -> None:
    assert did_you_mean("phi1_small", ["phi1-small", "phi-1"]) == " Did you mean 'phi1-small'?"
    assert did_you_mean("zebra", ["phi-1"]) == ""


def test_a_failed_build_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with staged_dir(target) as directory:
        (directory / "a").write_text("old")
    with pytest.raises(RuntimeError), staged_dir(target) as directory:
        (directory / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["made"]


def test_a_replace_killed_between_its_renames_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "made"
    retired = tmp_path / f".made{RETIRED}1"
    retired.mkdir()
    (retired / "a").write_text("old")
    with pytest.raises(RuntimeError), staged_dir(target):
        raise RuntimeError
    assert (target / "a").read_text() == "old"


def test_leftovers_of_a_killed_writer_are_removed_by_the_next(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, pathlib; from phi_lit.files import staged_dir\n"
        "with staged_dir(pathlib.Path(sys.argv[1])) as d:\n"
        "    (d / 'a').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    target = tmp_path / "made"
    done = subprocess.run([sys.executable, "-c", program, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    assert any(PARTIAL in name for name in os.listdir(tmp_path))
    with staged_dir(target) as directory:
        (directory / "a").write_text("whole")
    assert os.listdir(tmp_path) == ["made"]


def test_a_path_through_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a directory") as refused:
        write_atomic(tmp_path / "file" / "x", "content")
    assert "\n" not in str(refused.value)


def test_a_full_disk_is_refused_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A file size limit makes the write itself fail half way, as a full disk does."""
    program = (
        "import pathlib, resource, signal, sys\n"
        "from phi_lit.errors import show_user_errors\n"
        "from phi_lit.files import staged_dir\n"
        "show_user_errors()\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with staged_dir(pathlib.Path(sys.argv[1])) as d:\n"
        "    (d / 'a').write_bytes(bytes(5000))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "made")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("phi_lit: error: cannot write")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys; from phi_lit.files import staged_dir\n"
        "with staged_dir(pathlib.Path(sys.argv[1])) as d:\n"
        "    (d / 'a').write_text('slow'); print(flush=True); sys.stdin.read()"
    )
    target = tmp_path / "made"
    slow = subprocess.Popen(
        [sys.executable, "-c", program, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert slow.stdout is not None
    slow.stdout.readline()
    with staged_dir(target) as directory:
        (directory / "a").write_text("fast")
    slow.communicate()
    assert slow.returncode == 0
    assert (target / "a").read_text() == "slow"
    assert os.listdir(tmp_path) == ["made"]


@pytest.mark.parametrize("name", [".", "../here"])
def test_the_current_directory_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the current directory"), staged_dir(Path(name)):
        pass
    assert os.listdir(tmp_path) == ["here"]


def test_a_path_that_ends_in_dots_is_made_beside_itself(tmp_path: Path) -> None:
    with staged_dir(tmp_path / "made" / "x" / "..") as directory:
        assert directory.parent == tmp_path
    assert os.listdir(tmp_path) == ["made"]
