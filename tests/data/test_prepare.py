import base64
import json
import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from phi_lit.data.prepare import prepare
from phi_lit.data.sources import open_source
from phi_lit.data.tokens import TokenStore
from phi_lit.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    directory = tmp_path / "corpus"
    directory.mkdir()
    for i in range(20):
        (directory / f"{i:02}.py").write_text(f"x = {i % 19}\n" * 10)
    (directory / "latin.py").write_bytes(b"\xff")
    return directory


@pytest.fixture(scope="module")
def hub():
    """A stand-in for the hub's upload endpoints: keeps what is committed in `hub.files`."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status=200, **body):
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):
            if self.headers.get("Authorization") != "Bearer hf_write":
                self.answer(401, error="Invalid username or password.")
            else:
                self.answer(name="me", sha="0" * 40, type="user")

        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if self.path.startswith("/api/repos/create"):
                self.answer(url=f"{hub.url}/datasets/me/tokens", name="me/tokens")
            elif "/preupload/" in self.path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self.answer(files=files)
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        value = line["value"]
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                self.answer(commitUrl=f"{hub.url}/x", commitOid="1" * 40, success=True)
            else:
                self.answer(errors=[], warnings=[])

        def log_message(self, *_):
            pass

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{hub.server_port}"
    hub.files = {}
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


def test_the_report_tells_what_was_made(tmp_path, corpus, tiny_tokenizer_dir, capsys):
    sources = [{"path": str(corpus), "name": "mine", "licence": "MIT"}]
    prepare(
        sources, tiny_tokenizer_dir, tmp_path / "tokens", val_fraction=0.3, seq_length=16,
        num_workers=1,
    )  # fmt: skip
    said = capsys.readouterr()
    (path,) = (tmp_path / "tokens").iterdir()
    store = TokenStore.open(path)
    for split in ("train", "val"):
        held = store.manifest["splits"][split]
        rows = (held["tokens"] - 1) // 16
        (line,) = [line for line in said.out.splitlines() if line.split()[0] == split]
        assert line.split()[1:9] == [
            f"{held['documents']:,}", "documents", f"{held['tokens']:,}", "tokens",
            f"{rows:,}", "rows", "of", "16",
        ]  # fmt: skip
        assert "1.00 bytes per token" in line
    assert "from mine: 20 documents, 0.0 MB; licence MIT" in said.out
    assert "skipped 1 not UTF-8: latin.py (not UTF-8)" in said.out
    assert "duplicates seen: about 1 documents" in said.out
    assert "mine: licence MIT" in said.err
    assert "tokens/s" in said.err


def test_a_dry_run_lists_licences_and_writes_nothing(tmp_path, corpus, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare([str(corpus), "stdlib"], dry_run=True)
    said = capsys.readouterr().out
    assert "stdlib: licence PSF-2.0" in said
    assert f"{corpus}: licence not stated" in said
    assert {path.name for path in tmp_path.iterdir()} == {"corpus"}


def test_a_dry_run_looks_at_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"blob_id": "x"}\n')
    with pytest.raises(UserError, match="no column named text or content; it has blob_id"):
        prepare(str(tmp_path / "a.jsonl"), dry_run=True)


def test_mistakes_are_told_before_anything_is_done(tmp_path, corpus, tiny_tokenizer_dir):
    with pytest.raises(UserError, match="give --tokenizer_dir"):
        prepare(str(corpus))
    with pytest.raises(UserError, match="seq_length is 0"):
        prepare(str(corpus), tiny_tokenizer_dir, seq_length=0)
    with pytest.raises(UserError, match="a data set's id is owner/name"):
        prepare(str(corpus), tiny_tokenizer_dir, tmp_path / "t", push_to_hub="tokens")
    assert not (tmp_path / "t").exists()


def run_prepare(run_python, tmp_path, corpus, tokenizer, hub, token, check=True):
    return run_python(
        "-m", "phi_lit", "prepare", "--sources", corpus, "--tokenizer_dir", tokenizer,
        "--data_dir", tmp_path / "tokens", "--push_to_hub", "me/tokens", "--num_workers", "1",
        HF_ENDPOINT=hub.url, HF_TOKEN=token, HF_HOME=str(tmp_path / "hf"), check=check,
    )  # fmt: skip


def test_the_store_is_uploaded_with_a_card(tmp_path, corpus, tiny_tokenizer_dir, run_python, hub):
    done = run_prepare(run_python, tmp_path, corpus, tiny_tokenizer_dir, hub, "hf_write")
    assert f"uploaded to {hub.url}/datasets/me/tokens" in done.stdout
    (path,) = (tmp_path / "tokens").iterdir()
    assert set(hub.files) == {"README.md", *(file.name for file in path.iterdir())}
    for file in path.iterdir():
        assert hub.files[file.name] == file.read_bytes()
    assert b"licence not stated" in hub.files["README.md"]


def test_without_a_login_nothing_is_prepared(tmp_path, corpus, tiny_tokenizer_dir, run_python, hub):
    done = run_prepare(run_python, tmp_path, corpus, tiny_tokenizer_dir, hub, "no", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("phi_lit: error: cannot upload to me/tokens:")
    assert "hf auth login" in done.stderr
    assert not (tmp_path / "tokens").exists()


def test_without_a_network_the_upload_is_refused_in_one_line(
    tmp_path, corpus, tiny_tokenizer_dir, run_python
):
    nothing = SimpleNamespace(url="http://127.0.0.1:9")
    done = run_prepare(
        run_python, tmp_path, corpus, tiny_tokenizer_dir, nothing, "hf_write", check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("phi_lit: error: cannot upload to me/tokens:")
    assert not (tmp_path / "tokens").exists()


def test_a_connection_that_breaks_while_reading_is_a_user_error(monkeypatch):
    import datasets
    import httpx

    def rows():
        yield {"text": "one"}
        raise httpx.ReadTimeout("too slow")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stream)
    source = open_source({"hub": "a/b"})
    source.commit = "0" * 40
    with pytest.raises(UserError, match="reading stopped: too slow"):
        list(source.documents())


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
sys.argv[0] = "phi-lit"
from phi_lit.__main__ import main
main()
"""


def test_a_full_disk_is_one_line(tmp_path, corpus, tiny_tokenizer_dir, run_python):
    for path in corpus.glob("0*.py"):
        path.write_text(path.name * 200)
    done = run_python(
        "-c", LIMITED, "prepare", "--sources", corpus, "--tokenizer_dir", tiny_tokenizer_dir,
        "--data_dir", tmp_path / "tokens", "--num_workers", "1", check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("phi_lit: error: cannot write")
    assert "the file size limit is reached" in last
    assert list((tmp_path / "tokens").iterdir()) == []


def test_a_read_only_output_is_one_line(tmp_path, corpus, tiny_tokenizer_dir, run_python):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = False
    if os.geteuid() == 0:  # permissions do not hold root back
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)]
        mounted = not subprocess.run(mount, capture_output=True, check=False).returncode
        if not mounted:
            pytest.skip("root writes everywhere, and a file system cannot be mounted here")
    else:
        disk.chmod(0o555)
    try:
        done = run_python(
            "-m", "phi_lit", "prepare", "--sources", corpus, "--tokenizer_dir",
            tiny_tokenizer_dir, "--data_dir", disk / "tokens", "--num_workers", "1", check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("phi_lit: error: cannot write")
        assert ("the file system is read-only" if mounted else "permission denied") in last
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def test_a_store_that_is_reused_is_reported_as_this_call_names_it(
    tmp_path, corpus, tiny_tokenizer_dir, capsys
):
    for name, licence in (("mine", "MIT"), ("ours", "BSD")):
        sources = {"path": str(corpus), "name": name, "licence": licence}
        prepare(sources, tiny_tokenizer_dir, tmp_path / "t", val_fraction=0.3, num_workers=1)
        said = capsys.readouterr()
        assert f"from {name}: 20 documents, 0.0 MB; licence {licence}" in said.out
    assert "tokens: using" in said.err
