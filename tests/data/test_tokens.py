import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from phi_lit.data.encoders import Encoders
from phi_lit.data.shards import token_dtype
from phi_lit.data.sources import open_source
from phi_lit.data.stream import SeenBefore
from phi_lit.data.tokenizer import load_tokenizer, train_bpe
from phi_lit.data.tokens import TokenStore
from phi_lit.errors import UserError

END = 256  # of the byte-level test tokenizer, in which "a" is 64 and "b" is 65


@pytest.fixture
def corpus(tmp_path):
    """300 small files, of which two hold the same text."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    for i in range(300):
        (directory / f"{i:03}.txt").write_text(f"document {i % 299} " * (1 + i % 7))
    return directory


@pytest.fixture
def build(tmp_path, tiny_tokenizer_dir):
    """Build a store of one or more sources; what was said is left in `build.said`."""

    def run(*specs, tokenizer=tiny_tokenizer_dir, data_dir=tmp_path / "tokens", **settings):
        run.said = []
        sources = [open_source(spec if isinstance(spec, dict) else str(spec)) for spec in specs]
        settings = {"num_workers": 1, "val_fraction": 0.1, **settings}
        return TokenStore.build(data_dir, sources, tokenizer, say=run.said.append, **settings)

    return run


def contents(store: TokenStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.path.iterdir())}


def whole(store: TokenStore, split: str) -> list[int]:
    return store.split(split)[:].tolist()


def documents(store: TokenStore, split: str) -> list[tuple[int, ...]]:
    ids, found, start = whole(store, split), [], 0
    for end in [i for i, id_ in enumerate(ids) if id_ == END]:
        found.append(tuple(ids[start:end]))
        start = end + 1
    assert start == len(ids)
    return found


# ---------------------------------------------------------------------------------------- layout


def test_the_layout_of_tiny_documents_is_exact(tmp_path, build):
    for name, text in {"1": "ab", "2": "b", "3": "aaa", "4": "bb"}.items():
        (tmp_path / f"{name}.txt").write_text(text)
    store = build(f"{tmp_path}/*.txt", val_fraction=0.3, split_seed=5)
    assert whole(store, "train") == [64, 65, END, 64, 64, 64, END, 65, 65, END]
    assert whole(store, "val") == [65, END]
    assert contents(store)["train-00000.bin"] == np.array(whole(store, "train"), "<u2").tobytes()
    assert {path.name for path in store.path.iterdir()} == {
        "train-00000.bin",
        "val-00000.bin",
        "manifest.json",
    }


def test_text_cannot_forge_a_boundary(tmp_path, build):
    (tmp_path / "a.txt").write_text("<|endoftext|>" * 3)
    (tmp_path / "b.txt").write_text("b")
    store = build(f"{tmp_path}/*.txt")
    assert (whole(store, "train") + whole(store, "val")).count(END) == 2


def test_the_manifest_counts_what_is_there(corpus, build):
    (corpus / "x.txt").write_bytes(b"\xff")
    store = build({"path": str(corpus), "name": "mine", "licence": "MIT"})
    manifest = store.manifest
    split = {name: manifest["splits"][name] for name in ("train", "val")}
    assert split["train"]["documents"] + split["val"]["documents"] == 300
    texts = [path.read_text() for path in sorted(corpus.glob("[0-9]*.txt"))]
    assert split["train"]["bytes"] + split["val"]["bytes"] == sum(map(len, texts))
    assert split["val"]["tokens"] == len(whole(store, "val"))
    (report,) = manifest["sources"]
    assert (report["name"], report["licence"], report["documents"]) == ("mine", "MIT", 300)
    assert report["skipped"] == {"counts": {"not UTF-8": 1}, "examples": ["x.txt (not UTF-8)"]}
    assert manifest["duplicates"] == 300 - len(set(texts))
    assert manifest["dtype"] == "uint16"
    assert manifest["tokenizer"]["vocab_size"] == store.vocab_size == 257


@pytest.mark.parametrize(("size", "name"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_are_as_wide_as_the_vocabulary_needs(size, name):
    assert token_dtype(size).name == name


# ----------------------------------------------------------------------------------------- split


def test_no_document_is_on_both_sides(corpus, build):
    store = build(corpus)
    train, val = documents(store, "train"), documents(store, "val")
    assert len(train) + len(val) == 300
    assert not set(train) & set(val)
    assert 10 < len(val) < 60
    assert set(documents(build(corpus, split_seed=7), "val")) != set(val)


def test_identical_documents_of_different_sources_land_on_the_same_side(tmp_path, corpus, build):
    copy = tmp_path / "copy"
    copy.mkdir()
    for i in range(0, 300, 3):
        (copy / f"again{i}.txt").write_bytes((corpus / f"{i:03}.txt").read_bytes())
    store = build(corpus, copy)
    assert not set(documents(store, "train")) & set(documents(store, "val"))
    assert store.manifest["duplicates"] >= 100


def test_a_small_corpus_still_holds_one_document_out(tmp_path, build):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    tiny = build(f"{tmp_path}/*.txt", val_fraction=1e-9)
    assert (len(documents(tiny, "train")), len(documents(tiny, "val"))) == (2, 1)
    greedy = build(f"{tmp_path}/*.txt", val_fraction=1 - 1e-9)
    assert (len(documents(greedy, "train")), len(documents(greedy, "val"))) == (1, 2)


def test_a_single_document_is_refused_and_leaves_nothing(tmp_path, build):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("the same")
    with pytest.raises(UserError, match="a single document"):
        build(f"{tmp_path}/*.txt")
    assert list((tmp_path / "tokens").iterdir()) == []


# --------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(("weight", "times"), [(2, {2}), (2.5, {2, 3}), (0.5, {0, 1})])
def test_weights_repeat_training_documents(corpus, build, weight, times):
    once = documents(build(corpus), "train")
    store = build({"path": str(corpus), "weight": weight})
    weighted = documents(store, "train")
    assert {weighted.count(text) / once.count(text) for text in once} == times
    assert weighted == documents(build({"path": str(corpus), "weight": weight}), "train")
    assert 0.9 < len(weighted) / (weight * len(once)) < 1.1
    assert store.manifest["sources"][0]["documents"] == 300


def test_held_out_documents_are_never_repeated(corpus, build):
    val = documents(build(corpus), "val")
    assert documents(build({"path": str(corpus), "weight": 2.5}), "val") == val
    assert set(documents(build({"path": str(corpus), "weight": 0.5}), "val")) < set(val)


# ----------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("processes", [False, True])
def test_the_bytes_are_the_same_for_any_number_of_workers(
    corpus, build, tmp_path, monkeypatch, processes
):
    monkeypatch.setattr("phi_lit.data.stream.CHUNK_BYTES", 500)
    monkeypatch.setattr(Encoders, "WARM_UP", 2)
    monkeypatch.setattr(Encoders, "THREADS_ENOUGH", 1 if processes else 9)
    stores = [
        build(corpus, num_workers=n, data_dir=tmp_path / str(n), shard_tokens=2000)
        for n in (1, 2, 3)
    ]
    assert contents(stores[0]) == contents(stores[1]) == contents(stores[2])
    assert len(stores[0].shards("train")) > 3
    assert stores[0].path.name == stores[2].path.name


@pytest.fixture
def two_children(tiny_tokenizer_dir, monkeypatch):
    """Encoders whose two child processes are ready."""
    monkeypatch.setattr(Encoders, "WARM_UP", 1)
    monkeypatch.setattr(Encoders, "THREADS_ENOUGH", 1)
    with Encoders(load_tokenizer(tiny_tokenizer_dir), token_dtype(257), 2) as encoders:
        encoders.submit(["start them"])
        for thread in encoders._starting:
            thread.join()
        assert encoders._idle.qsize() == 2
        yield encoders


def test_children_encode_as_this_process_does(two_children):
    futures = [two_children.submit(["ab"] * n) for n in range(1, 20)]
    for n, future in enumerate(futures, start=1):
        assert future.result().ids.tolist() == [64, 65, END] * n
        assert future.result().lengths.tolist() == [3] * n
    assert two_children._idle.qsize() == 2


def test_a_dead_child_is_reported(two_children):
    for child in two_children._children:
        child.kill()
    with pytest.raises(UserError, match=r"tokenizing process died \(exit status -9\)"):
        two_children.submit(["x"]).result()


# -------------------------------------------------------------------------------- reuse or anew


def test_the_same_inputs_are_not_tokenized_twice(corpus, build):
    first = build(corpus)
    assert "no store is there yet" in build.said[0]
    assert build.said[-1].startswith(f"tokens: made {first.path} (")
    again = build(corpus)
    assert again.path == first.path
    assert len(build.said) == 1
    assert build.said[0].startswith(f"tokens: using {first.path} (")


def test_a_changed_tokenizer_is_another_store(corpus, build, tmp_path):
    first = build(corpus)
    train_bpe(["document 1 document 2 " * 50], 300, tmp_path / "bpe")
    second = build(corpus, tokenizer=tmp_path / "bpe")
    assert second.path != first.path
    assert f"tokenizer differs from {first.path.name}" in build.said[0]
    assert first.fingerprint != second.fingerprint


def test_a_changed_file_is_another_store(corpus, build):
    first = build(corpus)
    (corpus / "000.txt").write_text("something else")
    second = build(corpus)
    assert second.path != first.path
    assert second.digest != first.digest
    assert f"sources differs from {first.path.name}" in build.said[0]


# ---------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("shard", ["train-00000.bin", "val-00000.bin"])
def test_a_damaged_shard_is_named(corpus, build, shard):
    store = build(corpus)
    path = store.path / shard
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 1
    path.write_bytes(flipped)
    for verify in ("auto", "full"):
        with pytest.raises(UserError, match=f"{shard} is not the file that was written: its sha"):
            TokenStore.open(store.path, verify=verify)
    TokenStore.open(store.path, verify="sizes")
    path.write_bytes(content[:-2])
    with pytest.raises(UserError, match=f"{shard} holds .* bytes instead of"):
        TokenStore.open(store.path, verify="sizes")
    path.unlink()
    with pytest.raises(UserError, match=f"{shard} is missing"):
        build(corpus)


def test_a_large_store_is_checked_by_samples(corpus, build, monkeypatch):
    monkeypatch.setattr("phi_lit.data.tokens.FULL_CHECK_BYTES", 0)
    store = build(corpus)
    TokenStore.open(store.path)
    shard = store.path / "train-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(UserError, match="a sample of it differs"):
        TokenStore.open(store.path)


def test_what_is_no_store_is_refused(corpus, build, tmp_path):
    with pytest.raises(UserError, match="not a finished token store"):
        TokenStore.open(tmp_path)
    store = build(corpus)
    manifest = store.path / "manifest.json"
    manifest.write_text(json.dumps({**store.manifest, "version": 99}))
    with pytest.raises(UserError, match="format version 99; this phi_lit reads 1"):
        TokenStore.open(store.path)
    manifest.write_text('{"format": "else"}')
    with pytest.raises(UserError, match="not the manifest of a token store"):
        TokenStore.open(store.path)
    manifest.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        TokenStore.open(store.path)


@pytest.mark.parametrize("key", ["version", "dtype", "digest", "settings", "splits", "sources"])
def test_a_manifest_with_parts_missing_is_damaged_and_stops_no_other_store(corpus, build, key):
    store = build(corpus)
    manifest = {name: value for name, value in store.manifest.items() if name != key}
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="format version None" if key == "version" else "damaged"):
        TokenStore.open(store.path)
    assert build(corpus, val_fraction=0.2).path != store.path


def test_a_shard_without_permission_is_damaged(corpus, build):
    """As nobody, where this process is root: nothing is closed to root."""
    path = build(corpus).path
    (path / "val-00000.bin").chmod(0)
    code = (
        "import os, sys; from pathlib import Path; from phi_lit.data.tokens import TokenStore\n"
        "os.geteuid() or os.setuid(65534)\n"
        "TokenStore.open(Path(sys.argv[1]), verify='sizes')"
    )
    for directory in [path, *path.parents][:-1]:
        if os.geteuid() == 0:
            directory.chmod(directory.stat().st_mode | 0o055)
    command = [sys.executable, "-c", code, str(path)]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert "UserError: token shard" in said
    assert "val-00000.bin cannot be read (Permission denied)" in said


# ------------------------------------------------------------------------- interruption and disk


PROGRAM = """
import sys, time
from pathlib import Path
from phi_lit.data import encoders, stream
from phi_lit.data.sources import open_source
from phi_lit.data.tokens import TokenStore
stream.CHUNK_BYTES, encoders.Encoders.WARM_UP, encoders.Encoders.THREADS_ENOUGH = 500, 4, 1
slow = encoders.encode_documents
def encode(*args):
    time.sleep(float(sys.argv[4]))
    return slow(*args)
encoders.encode_documents = encode
TokenStore.build(
    Path(sys.argv[1]), [open_source(sys.argv[2])], Path(sys.argv[3]), num_workers=2,
    val_fraction=0.1, shard_tokens=1500,
)
"""


def start(data_dir, corpus, tokenizer, pause=0.0, **kwargs) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, data_dir, corpus, tokenizer, str(pause)]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, **kwargs)


def wait_for_commits(path: Path, count: int) -> None:
    while True:
        journals = [json.loads(found.read_text()) for found in path.glob("*/journal.json")]
        if journals and len(journals[0]["shards"]["train"]) >= count:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_killed_preparation_goes_on_and_ends_with_the_same_bytes(
    tmp_path, corpus, tiny_tokenizer_dir, shards
):
    quiet = start(tmp_path / "quiet", corpus, tiny_tokenizer_dir)
    killed = start(tmp_path / "killed", corpus, tiny_tokenizer_dir, pause=0.05)
    wait_for_commits(tmp_path / "killed", shards)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (unfinished,) = (tmp_path / "killed").iterdir()
    with pytest.raises(UserError, match="not a finished token store"):
        TokenStore.open(unfinished)
    again = start(tmp_path / "killed", corpus, tiny_tokenizer_dir)
    assert "an earlier run did not finish it" in (said := again.communicate()[1])
    assert "going on after" in said
    assert quiet.wait() == again.returncode == 0, said
    (one,), (other,) = ((tmp_path / name).iterdir() for name in ("quiet", "killed"))
    assert contents(TokenStore.open(one)) == contents(TokenStore.open(other))
    assert not list(other.glob(".*"))


def test_an_input_that_changed_meanwhile_is_read_from_the_start(
    tmp_path, corpus, build, monkeypatch
):
    """As a hub data set may: its description stays the same, its text does not."""
    monkeypatch.setattr("phi_lit.data.sources.Source.describe", lambda self: {"never": "changes"})
    monkeypatch.setattr("phi_lit.data.stream.CHUNK_BYTES", 500)
    real = os.replace

    def stop_at_the_manifest(source, target):
        if Path(target).name == "manifest.json":
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_the_manifest)
        with pytest.raises(KeyboardInterrupt):
            build(corpus, shard_tokens=1500)
    (corpus / "007.txt").write_text("another text")
    changed = build(corpus, shard_tokens=1500)
    assert "starting over" in build.said[-2]
    straight = build(corpus, shard_tokens=1500, data_dir=tmp_path / "elsewhere")
    assert contents(changed) == contents(straight)


def test_an_error_leaves_only_what_the_journal_names(corpus, build, monkeypatch, tmp_path):
    """The disk fails between a commit's two renames, after earlier commits."""
    monkeypatch.setattr("phi_lit.data.stream.CHUNK_BYTES", 500)
    real = os.replace

    def fail(source, target):
        if Path(target).name == "train-00002.bin":
            real(source, target)
            raise OSError(errno.ENOSPC, "full")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(UserError, match="the disk is full"):
            build(corpus, shard_tokens=1500)
    (path,) = (tmp_path / "tokens").iterdir()
    shards = json.loads((path / "journal.json").read_text())["shards"]
    named = {shard["file"] for split in shards.values() for shard in split}
    assert {"train-00000.bin", "train-00001.bin"} <= named
    assert {found.name for found in path.iterdir()} == {"journal.json", *named}


def test_two_processes_at_once_make_one_store(tmp_path, corpus, tiny_tokenizer_dir):
    first = start(tmp_path / "t", corpus, tiny_tokenizer_dir, pause=0.05)
    wait_for_commits(tmp_path / "t", 1)
    first.send_signal(signal.SIGSTOP)  # until the second has come
    second = start(tmp_path / "t", corpus, tiny_tokenizer_dir)
    said = [""]
    while "waiting for it" not in said[0]:
        line = second.stderr.readline()
        assert line, said
        said[0] += line
    first.send_signal(signal.SIGCONT)
    both = [second, first]
    said = [said[0] + second.communicate()[1], first.communicate()[1]]
    assert [process.returncode for process in both] == [0, 0], said
    assert sum("waiting for it" in text for text in said) == 1
    assert sum("tokens: using" in text for text in said) == 1
    (path,) = (tmp_path / "t").iterdir()
    TokenStore.open(path, verify="full")


def test_a_limit_on_file_size_is_one_line_and_leaves_nothing(tmp_path, corpus, tiny_tokenizer_dir):
    process = start(
        tmp_path / "t",
        corpus,
        tiny_tokenizer_dir,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600)),
    )
    last = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 1
    assert last.startswith("phi_lit.errors.UserError: cannot write")
    assert "the file size limit is reached" in last
    assert list((tmp_path / "t").iterdir()) == []


def test_a_full_disk_keeps_whole_shards_and_goes_on_when_there_is_room(
    tmp_path, corpus, build, monkeypatch
):
    monkeypatch.setattr("phi_lit.data.stream.CHUNK_BYTES", 500)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(UserError, match="the disk is full"):
            build(corpus, data_dir=disk, shard_tokens=1500)
        (path,) = disk.iterdir()
        names = {found.name for found in path.iterdir()}
        assert {"journal.json", "train-00000.bin"} <= names
        assert not [name for name in names if "partial" in name or name == "manifest.json"]
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        store = build(corpus, data_dir=disk, shard_tokens=1500)
        straight = build(corpus, data_dir=tmp_path / "elsewhere", shard_tokens=1500)
        assert contents(store) == contents(straight)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, corpus, build):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .* is a file, not a directory"):
        build(corpus, data_dir=tmp_path / "file" / "tokens")


# ----------------------------------------------------------------------------------------- other


def test_an_empty_source_is_refused_before_anything_is_written(tmp_path, corpus, build):
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no text to train on: it skipped 1 empty"):
        build(corpus, tmp_path / "void")
    assert not (tmp_path / "tokens").exists()


def test_a_source_that_turns_out_empty_leaves_nothing(tmp_path, corpus, build):
    rows = "".join(json.dumps({"text": "x", "lang": "c"}) + "\n" for _ in range(100))
    (tmp_path / "a.jsonl").write_text(rows)
    with pytest.raises(UserError, match="only rows with"):
        build(corpus, {"path": str(tmp_path / "a.jsonl"), "where": {"lang": "py"}})
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2])
def test_a_validation_share_that_leaves_a_side_empty_is_refused(corpus, build, fraction):
    with pytest.raises(UserError, match="val_fraction is"):
        build(corpus, val_fraction=fraction)


@pytest.mark.parametrize(
    "wrong", [{"num_workers": 0}, {"num_workers": -1}, {"split_seed": 2**63}, {"split_seed": 1e99}]
)
def test_numbers_out_of_range_are_refused_before_anything_is_made(corpus, build, tmp_path, wrong):
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
        build(corpus, **wrong)
    assert not (tmp_path / "tokens").exists()


def test_the_commit_of_a_hub_source_without_revision_is_told(tmp_path, build, monkeypatch):
    import datasets

    texts = datasets.IterableDataset.from_generator(lambda: ({"text": f"{i}"} for i in range(50)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: texts)
    monkeypatch.setattr("phi_lit.data.hub._commit", lambda *_: ("c" * 40, None))
    for _ in range(2):  # made, then used
        build("some/set")
        assert f"some/set: these tokens stay those of commit {'c' * 40}" in build.said[-1]
    build({"hub": "some/set", "revision": "main"})
    assert not [line for line in build.said if "stay those of" in line]


def test_no_source_at_all_is_refused(build):
    with pytest.raises(UserError, match="no source is given"):
        build()


def test_repetitions_are_never_missed():
    seen = SeenBefore()
    texts = [os.urandom(32) for _ in range(1000)]
    assert sum(map(seen.add, texts)) == 0
    assert sum(map(seen.add, texts)) == 1000
