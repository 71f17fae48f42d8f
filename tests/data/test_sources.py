import datetime
import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from phi_lit.data.sources import Document, Source, open_source, standard_library
from phi_lit.errors import UserError


def documents(spec) -> list[tuple[str, str]]:
    return [tuple(document) for document in open_source(spec).documents()]


def refusal(spec) -> str:
    """What a source is refused with, by its own words or by the look at its first documents."""
    with pytest.raises(UserError) as error:
        open_source(spec).check()
    assert "\n" not in str(error.value)
    return str(error.value)


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# ----------------------------------------------------------------------------------------- trees


def test_a_tree_is_read_in_the_order_of_its_names(tmp_path):
    for name in ("b.py", "a/z.py", "a/b/c.md", "c.bin", ".git/x.py", "__pycache__/y.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = documents(str(tmp_path))
    assert found == [("a/b/c.md",) * 2, ("a/z.py",) * 2, ("b.py",) * 2]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.py", ["a.py", "b.py"]),
        ("**/*.py", ["a.py", "b.py", "sub/c.py", "sub/deep/d.py"]),
        ("sub/**", ["sub/c.py", "sub/deep/d.py", "sub/e.txt"]),
        ("sub/*.py", ["sub/c.py"]),
        ("[!b].py", ["a.py"]),
        ("[!]*", []),
        ("[^b].py", ["b.py"]),
        ("sub[!x]c.py", []),
        ("?.py", ["a.py", "b.py"]),
    ],
)
def test_globs(tmp_path, pattern, names):
    for name in ("a.py", "b.py", "sub/c.py", "sub/deep/d.py", "sub/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    prefix = "sub/" if pattern.startswith("sub/") else ""
    found = [prefix + name for name, _ in documents(f"{tmp_path}/{pattern}")]
    assert found == names


def test_what_cannot_be_read_is_counted_and_named(tmp_path):
    (tmp_path / "good.py").write_text("good")
    (tmp_path / "latin.py").write_bytes("größe".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.py").symlink_to("self.py")
    os.mkfifo(tmp_path / "pipe.py")
    source = open_source(str(tmp_path))
    source.check()
    assert list(source.documents()) == [Document("good.py", "good")]
    assert source.skipped.report() == {
        "counts": {
            "binary": 1,
            "empty": 1,
            "not UTF-8": 1,
            "not a regular file": 1,
            "symlink loop": 2,
            "unreadable": 1,
        },
        "examples": [
            "binary.txt (binary)",
            "empty.txt (empty)",
            "gone.py (unreadable)",
            "latin.py (not UTF-8)",
            "loop (symlink loop)",
            "pipe.py (not a regular file)",
            "self.py (symlink loop)",
        ],
    }


def test_files_without_permission_are_counted(tmp_path):
    (tmp_path / "good.py").write_text("good")
    (tmp_path / "secret.py").write_text("secret")
    (tmp_path / "closed").mkdir()
    (tmp_path / "secret.py").chmod(0)
    (tmp_path / "closed").chmod(0)
    program = (
        "import os, sys\n"
        "from phi_lit.data.sources import open_source\n"
        "os.geteuid() or os.setuid(65534)\n"  # nothing is closed to root
        "source = open_source(sys.argv[1])\n"
        "print([d.id for d in source.documents()], dict(source.skipped.counts))"
    )
    for directory in [tmp_path, *tmp_path.parents][:-1]:  # root may give its files to nobody
        if os.geteuid() == 0:
            directory.chmod(directory.stat().st_mode | 0o055)
    command = [sys.executable, "-c", program, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "['good.py'] {'unreadable': 2}\n"


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert documents(str(tmp_path)) == [("a.txt", "abc")]


def test_a_tree_of_unreadable_files_is_refused_and_says_why(tmp_path):
    (tmp_path / "a.py").write_bytes(b"\xff\xfe")
    assert "holds no text to train on: it skipped 1 not UTF-8, such as a.py" in refusal(
        str(tmp_path)
    )


def test_missing_paths_and_globs_without_matches_are_refused(tmp_path):
    assert "no such file or directory" in refusal({"path": str(tmp_path / "nope")})
    assert "no file found" in refusal(f"{tmp_path}/*.py")
    assert "does not exist" in refusal(f"{tmp_path}/nope/*.py")
    (tmp_path / "data.bin").write_text("x")
    assert "no file with .py" in refusal(str(tmp_path))


def test_compressed_texts(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one"))
    (tmp_path / "b.txt.zst").write_bytes(zstandard.compress(b"two"))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"cut short" * 1000)[:-9])
    (tmp_path / "d.txt.zst").write_bytes(b"not zstandard")
    source = open_source(str(tmp_path))
    assert [document.text for document in source.documents()] == ["one", "two"]
    assert source.skipped.counts == {"unreadable": 2}


# ---------------------------------------------------------------------------------------- tables


ROWS = [{"text": "one", "lang": "py"}, {"text": "two", "lang": "c"}, {"text": "", "lang": "py"}]


@pytest.mark.parametrize("ending", ["parquet", "json", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_every_table_format_gives_the_same_documents(tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if ending == "parquet":
        write_parquet(path, **{key: [row[key] for row in ROWS] for key in ROWS[0]})
    elif ending == "json":
        path.write_text(json.dumps(ROWS, indent=2))
    else:
        pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(ending[6:], bytes)
        path.write_bytes(pack(lines))
    source = open_source(str(path))
    source.check()
    name = f"rows.{ending}"
    assert list(source.documents()) == [(f"{name}#0", "one"), (f"{name}#1", "two")]
    assert source.skipped.counts == {"empty": 1}


def test_json_longer_than_the_reading_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("phi_lit.data.records.PIECE", 7)
    rows = [{"text": "x" * n, "nested": {"a": [1, 2]}} for n in range(1, 60)]
    (tmp_path / "array.json").write_text(json.dumps(rows))
    (tmp_path / "one after the other.json").write_text("\n\n".join(map(json.dumps, rows)))
    for name in ("array.json", "one after the other.json"):
        assert [text for _, text in documents(str(tmp_path / name))] == [r["text"] for r in rows]


def test_template_columns_where_and_limit(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        {"q": "1+1", "a": 2, "kind": "sum"},
        {"q": "2*2", "a": 4, "kind": "product"},
        {"q": "no answer", "a": None, "kind": "sum"},
        {"q": "3+3", "a": 6, "kind": "sum"},
        {"q": "4+4", "a": 8, "kind": "sum"},
    )
    spec = {"path": path, "template": "{q} = {a}\n", "where": {"kind": "sum"}, "max_documents": 2}
    assert [text for _, text in documents(spec)] == ["1+1 = 2\n", "3+3 = 6\n"]
    spec = {"path": path, "columns": ["kind", "q"], "where": {"kind": ["product"]}}
    assert [text for _, text in documents(spec)] == ["product\n\n2*2"]


def test_the_text_column_is_found(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", id=[1, 2], content=["x", "y"])
    assert [text for _, text in documents(path)] == ["x", "y"]


def test_damaged_rows_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": \n[1, 2]\n{"text": "\xff"}\n{"text": 5}\n{"text": "\\ud800"}\n'
    )
    source = open_source(str(path))
    assert [document.text for document in source.documents()] == ["good"]
    assert source.skipped.counts == {
        "not JSON": 1,
        "not an object": 1,
        "not UTF-8": 1,
        "without text": 1,
        "not Unicode text": 1,
    }


def test_json_nested_too_deeply_is_counted(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.jsonl").write_text(f'{{"text": {deep}}}\n{{"text": "good"}}\n')
    (tmp_path / "b.json").write_text(f'[{{"text": "also"}}, {{"text": {deep}}}]')
    source = open_source({"path": [f"{tmp_path}/*.jsonl", f"{tmp_path}/*.json"]})
    assert [document.text for document in source.documents()] == ["good", "also"]
    assert source.skipped.counts == {"not JSON": 1, "damaged": 1}


def test_a_json_row_without_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("phi_lit.data.records.PIECE", 100)
    monkeypatch.setattr("phi_lit.data.records.LONGEST_ROW", 1000)
    rows = [{"text": "short"}, {"text": "x" * 900}, {"text": "x" * 5000}, {"text": "after"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = open_source(str(tmp_path / "a.json"))
    assert [document.text for document in source.documents()] == ["short", "x" * 900]
    assert source.skipped.counts == {"damaged": 1}


def test_a_date_chooses_rows_and_is_described(tmp_path):
    day = datetime.date(2024, 1, 1)
    path = write_parquet(tmp_path / "a.parquet", text=["new", "old"], d=[day, datetime.date.min])
    source = open_source({"path": path, "where": {"d": day}})
    assert [document.text for document in source.documents()] == ["new"]
    assert json.loads(json.dumps(source.describe())) == source.describe()
    assert source.describe()["where"] == {"d": "2024-01-01"}


def test_json_files_of_a_directory_are_read_when_asked_for(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "one"}]')
    assert "name `suffixes: [.json]` to read them" in refusal(str(tmp_path))
    assert documents({"path": str(tmp_path), "suffixes": [".json"]}) == [("a.json#0", "one")]


def test_a_damaged_parquet_file_is_counted(tmp_path):
    write_parquet(tmp_path / "a.parquet", text=["one"])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    source = open_source(f"{tmp_path}/*.parquet")
    assert [document.text for document in source.documents()] == ["one"]
    assert source.skipped.counts == {"damaged": 1}


def test_tables_without_text_are_refused_by_name(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", blob_id=["x"], n=[1], prose=["hello"], void=[""])
    assert "no column named text or content; it has blob_id, n, prose, void" in refusal(path)
    wrong = refusal({"path": path, "columns": "pros"})
    assert "no column pros" in wrong
    assert "Did you mean 'prose'?" in wrong
    assert "column n holds int, not text" in refusal({"path": path, "columns": "n"})
    assert "void is empty in all of the first 1 rows" in refusal({"path": path, "columns": "void"})
    assert "no column lang" in refusal({"path": path, "columns": "prose", "where": {"lang": "py"}})
    lists = write_lines(tmp_path / "b.jsonl", {"text": ["a", "list"]})
    assert "column text holds list, not text" in refusal(lists)
    nothing = write_parquet(tmp_path / "c.parquet", text=pyarrow.array([], pyarrow.string()))
    assert "holds no text to train on" in refusal(nothing)
    filtered = {"path": path, "columns": "prose", "where": {"n": 7}}
    with pytest.raises(UserError, match="only rows with"):
        source = open_source(filtered)
        assert list(source.documents()) == []
        raise source.empty()


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_data_set_through_datasets(tmp_path, streaming, monkeypatch):
    """A local directory laid out as on the hub takes the place of an id: no network here."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repo = tmp_path / "repo"
    repo.mkdir()
    write_parquet(repo / "train-0.parquet", text=["one", None, "three"], n=[1, 2, 3])
    write_parquet(repo / "train-1.parquet", text=["four"], n=[4])
    spec = {"hub": str(repo), "streaming": streaming, "where": {"n": [1, 2, 4]}}
    source = open_source(spec)
    source.check()
    assert [document.text for document in source.documents()] == ["one", "four"]
    assert source.skipped.counts == {"without text": 1}
    assert "no column texts; it has n, text" in refusal({**spec, "columns": "texts"})
    assert "column n holds int" in refusal({**spec, "columns": "n"})
    files = {"hub": str(repo), "streaming": streaming, "data_files": "train-1*.parquet"}
    assert [text for _, text in documents(files)] == ["four"]
    assert "cannot be opened" in refusal({**spec, "split": "nope"})


# ------------------------------------------------------------------------------ standard library


def test_the_standard_library_without_tests_and_with_its_reference_as_prose():
    found = list(standard_library().documents())
    names = [document.id for document in found]
    assert "json/decoder.py" in names
    assert "pydoc_data.topics/for" in names
    assert not [name for name in names if {"test", "tests", "site-packages"} & {*name.split("/")}]
    assert "pydoc_data/topics.py" not in names
    assert 'The "for" statement' in dict(found)["pydoc_data.topics/for"]
    assert sum(len(document.text) for document in found) > 8_000_000
    assert names == [document.id for document in standard_library().documents()]


# ---------------------------------------------------------------------------------------- specs


def test_a_change_of_any_file_changes_the_description(tmp_path):
    (tmp_path / "a.py").write_text("a")
    source = open_source({"path": str(tmp_path), "name": "mine"})
    before = source.describe()
    assert before == open_source(str(tmp_path)).describe()  # a name is only a name
    assert before["files"]["count"] == before["files"]["bytes"] == 1
    os.utime(tmp_path / "a.py", ns=(1, 1))
    touched = source.describe()
    assert touched != before
    (tmp_path / "b.py").write_text("")
    assert source.describe() not in (before, touched)
    json.dumps(source.describe())


def test_words_and_mappings():
    assert open_source("stdlib") == Source(stdlib=True)
    assert open_source("org/name") == Source(hub="org/name")
    assert open_source("/some/where") == Source(path="/some/where")
    assert open_source({"hub": "a/b", "config": "c"}).label == "a/b/c"
    source = Source(stdlib=True, weight=2)
    assert open_source(source) is source


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("stdlb", "Did you mean 'stdlib'?"),
        ({"pth": "x"}, "no key 'pth'. Did you mean 'path'?"),
        ({}, "exactly one of preset, hub, path, stdlib; found none"),
        ({"path": "x", "stdlib": True}, "found path and stdlib"),
        ({"path": "x", "weight": 0}, "weight is 0"),
        ({"path": "x", "weight": "2"}, "weight must be int or float, not '2'"),
        ({"path": "x", "max_documents": 0}, "max_documents is 0"),
        ({"path": [1]}, "path must hold only str, not [1]"),
        ({"path": "x", "columns": [1]}, "columns must hold only str"),
        ({"path": "x", "suffixes": [None]}, "suffixes must hold only str"),
        ({"path": "x", "where": {1: 2}}, "where must hold keys that are str"),
        ("[z-a].py", "[z-a].py: not a glob: bad character range z-a"),
        ({"path": "x", "columns": "a", "template": "{a}"}, "not both"),
        ({"path": "x", "template": "no column"}, "must hold columns by name"),
        ({"path": "x", "template": "{a"}, "template '{a'"),
        ({"path": "x", "template": "{a.b}"}, "must hold columns by name"),
        (5, "a word or a mapping, not int"),
    ],
)
def test_malformed_specs_say_what_is_wrong(spec, says):
    assert says in refusal(spec)
