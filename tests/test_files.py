import errno

import pytest

from bmojo.errors import BMojoError, MissingPackageError
from bmojo.files import full_disk_told, locked, optional_module, write_whole


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(BMojoError, match=r"can't write .*file: No space left on device; nothing was overwritten"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_package_is_named_with_the_extra_that_brings_it():
    with pytest.raises(
        MissingPackageError, match=r"dancing needs the package no_such_package: pip install 'bmojo\[train\]'"
    ):
        optional_module("no_such_package.part", "dancing")


def test_only_a_full_disk_is_told_as_one(tmp_path):
    with pytest.raises(BMojoError, match="no space left on the disk of"), full_disk_told(tmp_path):
        raise OSError(errno.EDQUOT, "quota")
    with pytest.raises(OSError, match="denied"), full_disk_told(tmp_path):
        raise OSError(errno.EACCES, "denied")


def test_a_lock_has_one_holder(tmp_path):
    path = tmp_path / "new/lock"
    for _ in range(2):
        with locked(path, "in use"), pytest.raises(BMojoError, match="in use"), locked(path, "in use"):
            pass
