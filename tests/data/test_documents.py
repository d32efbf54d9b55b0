import gzip
import json
import os
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bmojo.data.documents import Document, fingerprint, read_documents
from bmojo.errors import DataError, MissingPackageError


def read(source, **options):
    return list(read_documents(str(source), **options))


def hub(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".py"])
def test_a_text_file_is_one_document_and_keeps_every_byte(tmp_path, suffix):
    path = tmp_path / f"one{suffix}"
    path.write_bytes("\ufeffzwölf\r\nlines\n".encode())
    assert read(path) == [Document(path.name, "\ufeffzwölf\r\nlines\n")]


def test_folder_is_read_recursively_in_order_of_names(tmp_path):
    for name in ("b.txt", "a/z.md", "a/b/c.txt", "image.png", ".git/x.txt", "__pycache__/x.py", "blank.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" \n" if name == "blank.txt" else name)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert [document.name for document in read(tmp_path)] == ["a/b/c.txt", "a/z.md", "b.txt"]


def test_glob_names_are_relative_to_its_fixed_part(tmp_path):
    for name in ("x/a.txt", "y/b.txt", "y/c.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert read(tmp_path / "*" / "*.txt") == [Document("x/a.txt", "x/a.txt"), Document("y/b.txt", "y/b.txt")]


def test_a_file_whose_name_looks_like_a_glob(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    assert read(tmp_path / "a[1].txt") == [Document("a[1].txt", "text")]


def test_gzip(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("é".encode()))
    assert read(path) == [Document("a.txt.gz", "é")]
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match=r"can't read .*a\.txt\.gz"):
        read(path)


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "zw\\u00f6i", "id": 3}\n')
    assert read(path) == [Document("a.jsonl:1", "one"), Document("a.jsonl:4", "zwöi")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ('{"txt": "a"}', "field 'text'"),
        ('["text"]', "field 'text'"),
        ('{"text": 3}', "expected a string in 'text', got int"),
        ('{"text": "\\ud800"}', "not valid UTF-8"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{message}"):
        read(path)


def test_parquet_is_streamed_by_row(tmp_path):
    path = tmp_path / "a.parquet"
    for kind in (pa.string(), pa.large_string()):
        table = pa.table({"text": pa.array(["ä", "", "b"], kind), "id": [1, 2, 3]})
        pq.write_table(table, path, row_group_size=2)
        assert read(path) == [Document("a.parquet:1", "ä"), Document("a.parquet:3", "b")]


def test_parquet_errors(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a"]}), path)
    with pytest.raises(DataError, match=r"column 'text' of strings, got the columns body \(string\)"):
        read(path)
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet:2: .*null"):
        read(path)
    invalid = pa.Array.from_buffers(pa.string(), 1, pa.array([b"a\xff"]).buffers())
    pq.write_table(pa.table({"text": invalid}), path)
    with pytest.raises(DataError, match=r"a\.parquet:1: byte 1 \(0xff\)"):
        read(path)
    assert read(path, errors="replace")[0].text == "a\ufffd"
    path.write_bytes(b"PAR1 but not parquet")
    with pytest.raises(DataError, match="as parquet"):
        read(path)


@pytest.mark.parametrize(("module", "source"), [("pyarrow", "a.parquet"), ("datasets", "hf:name")])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, module, source):
    (tmp_path / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=r"pip install 'bmojo\[train\]'"):
        read(source)


def test_invalid_utf8_names_file_and_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("früh".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: byte 2 \(0xfc\).*--errors replace"):
        read(path)
    assert read(path, errors="replace")[0].text == "fr\ufffdh"
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'{"text": "a"}\n{"text": "\xfc"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: byte 24 "):
        read(lines)


def test_refused_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("image.png").write_bytes(b"x")
    Path("folder").mkdir()
    for source, message in {
        "nowhere": "no text at 'nowhere'; expected 'stdlib', a file",
        "empty.txt": "'empty.txt' is empty",
        "image.png": r"image\.png: expected a name that ends in \.txt, \.md, .*\.parquet",
        "folder": r"folder 'folder' holds no readable text; expected files that end in \.txt",
        "*.md": "matches no file",
        "*.png": "expected a name that ends",
    }.items():
        with pytest.raises(DataError, match=message):
            read(source)
    with pytest.raises(DataError, match="'strict' or 'replace'"):
        read("stdlib", errors="ignore")


def test_hub_streams_the_text_column(monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return iter([{"text": "a"}, {"text": ""}, {"text": "b"}])

    hub(monkeypatch, load_dataset)
    assert read("hf:owner/name:config") == [Document("1", "a"), Document("3", "b")]
    assert calls == [(("owner/name", "config"), {"split": "train", "streaming": True})]
    read("hf:name")
    assert calls[1][0] == ("name", None)


def test_hub_errors(monkeypatch):
    hub(monkeypatch, lambda *_, **__: iter([{"content": "a"}]))
    with pytest.raises(DataError, match="hf:x: expected the column 'text', got content"):
        read("hf:x")

    def offline(*_, **__):
        raise ConnectionError("no network")

    hub(monkeypatch, offline)
    with pytest.raises(DataError, match="can't read hf:x: ConnectionError: no network"):
        read("hf:x")


def test_standard_library_leaves_out_packages_and_broken_encodings(tmp_path, monkeypatch):
    for name, content in {
        "ast.py": b"a",
        "test/test_ast.py": b"t",
        "test/bad.py": b"\xff",
        "notes.txt": b"n",
        "site-packages/other.py": b"o",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert read("stdlib") == [Document("ast.py", "a"), Document("test/test_ast.py", "t")]


def test_standard_library_of_this_python():
    first = next(read_documents("stdlib"))
    assert first.name.endswith(".py")
    assert not os.path.isabs(first.name)


def test_fingerprint_follows_names_sizes_and_times(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a"}))
    before = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == before
    os.utime(path, ns=(0, 0))
    touched = fingerprint(str(tmp_path))
    (tmp_path / "b.txt").write_text("b")
    assert len({before, touched, fingerprint(str(tmp_path))}) == 3
    assert fingerprint("hf:a") != fingerprint("hf:b")
