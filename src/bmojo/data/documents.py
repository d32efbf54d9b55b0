"""Documents from the standard library of Python, files, folders, globs or the Hugging Face hub.

A document is the unit that training never reads across and that is held out whole. Only one document is in memory
at a time, so a corpus may be larger than memory.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmojo.errors import DataError
from bmojo.files import optional_module

_HUB = "hf:"
_FORMS = "'stdlib', a file, a folder, a glob or hf:NAME[:CONFIG]"


@dataclass(frozen=True)
class Document:
    """A text that stands alone: `name` is unique in its source, and never an absolute path."""

    name: str
    text: str


def read_documents(source: str, *, errors: str = "strict") -> Iterator[Document]:
    """The documents of a source, in a fixed order; those without a visible character are dropped.

    source: `stdlib` (every .py of Python's own library), a file, a folder (recursive), a glob, or `hf:NAME[:CONFIG]`
    (streamed; split train, column text). Text files (.txt, .md, .rst, .py) are one document each, .jsonl one a line
    (field text), .parquet one a row (column text); text files and .jsonl may be gzipped.
    errors: `strict` refuses bytes that are not UTF-8, `replace` puts U+FFFD in their place. Files of the standard
    library that are not UTF-8 (a few of its own tests) are left out either way.
    Raises DataError for a source that is missing, unreadable or empty, naming the file and the line or byte.
    """
    if errors not in ("strict", "replace"):
        raise DataError(f"errors must be 'strict' or 'replace', got {errors!r}")
    if source.startswith(_HUB):
        documents = _read_hub(source, errors)
    elif source == "stdlib":
        documents = _read_stdlib(source_files(source))
    else:
        documents = _read_files(source_files(source), errors)
    return _with_text(documents, source)


def source_files(source: str) -> list[tuple[str, Path]]:
    """The files of a local source as (name relative to the source, path), sorted by name; [] for `hf:`."""
    if source.startswith(_HUB):
        return []
    if source == "stdlib":
        return _walk(Path(sysconfig.get_path("stdlib")), {".py"})
    path = Path(source)
    if path.is_dir():
        files = _walk(path, _READERS)
        if not files:
            raise DataError(f"folder {source!r} holds no readable text; expected files that end in {_SUFFIXES}")
    elif path.is_file():
        files = [(path.name, path)]
    elif glob.has_magic(source):
        fixed = Path(*_until(path.parts, glob.has_magic))
        matches = (Path(match) for match in glob.glob(source, recursive=True))
        files = sorted((match.relative_to(fixed).as_posix(), match) for match in matches if match.is_file())
        if not files:
            raise DataError(
                f"glob {source!r} matches no file; check it, and quote it so that the shell leaves it alone"
            )
    else:
        raise DataError(f"no text at {source!r}; expected {_FORMS}")
    for _, file in files:
        _reader(file)
    return files


def fingerprint(source: str) -> str:
    """A digest of what tells that a source changed without reading it: the files' names, sizes and mtimes."""
    stats = [(name, (status := path.stat()).st_size, status.st_mtime_ns) for name, path in source_files(source)]
    return hashlib.sha256(json.dumps([source, stats]).encode()).hexdigest()


def _until(parts: Iterable[str], stop: Callable[[str], bool]) -> Iterator[str]:
    for part in parts:
        if stop(part):
            return
        yield part


def _walk(root: Path, suffixes: Iterable[str]) -> list[tuple[str, Path]]:
    """Files below `root` with one of the suffixes; installed packages, caches and hidden folders are left out."""
    ends = tuple(suffixes)
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in ("site-packages", "dist-packages", "__pycache__") and not name.startswith(".")
        ]
        found += [Path(folder, name) for name in names if name.lower().endswith(ends)]
    return sorted((path.relative_to(root).as_posix(), path) for path in found if path.is_file())


def _with_text(documents: Iterable[Document], source: str) -> Iterator[Document]:
    empty = True
    for document in documents:
        if document.text and not document.text.isspace():
            empty = False
            yield document
    if empty:
        raise DataError(f"{source!r} is empty; expected at least one document with text")


def _read_stdlib(files: list[tuple[str, Path]]) -> Iterator[Document]:
    for name, path in files:
        with contextlib.suppress(UnicodeDecodeError):
            yield Document(name, path.read_bytes().decode())


def _read_files(files: list[tuple[str, Path]], errors: str) -> Iterator[Document]:
    for name, path in files:
        try:
            yield from _reader(path)(name, path, errors)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"can't read {path}: {error}") from error


def _reader(path: Path) -> Callable[[str, Path, str], Iterator[Document]]:
    for suffix, reader in _READERS.items():
        if path.name.lower().endswith(suffix):
            return reader
    raise DataError(f"can't read {path}: expected a name that ends in {_SUFFIXES}; rename it or convert it")


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _read_text(name: str, path: Path, errors: str) -> Iterator[Document]:
    with _open(path) as file:
        yield Document(name, _decode(file.read(), path, errors))


def _read_jsonl(name: str, path: Path, errors: str) -> Iterator[Document]:
    offset = 0
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            text = _decode(line, where, errors, offset)
            offset += len(line)
            if text.isspace():
                continue
            try:
                record = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON ({error}); expected one object a line") from error
            if not isinstance(record, dict) or "text" not in record:
                raise DataError(f"{where}: expected an object with the field 'text', got {text.strip()[:60]!r}")
            yield Document(f"{name}:{number}", _string(record["text"], where, errors))


def _read_parquet(name: str, path: Path, errors: str) -> Iterator[Document]:
    arrow = optional_module("pyarrow", "reading .parquet")
    parquet = optional_module("pyarrow.parquet", "reading .parquet")
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = {field.name: field.type for field in file.schema_arrow}
            if columns.get("text") not in (arrow.string(), arrow.large_string()):
                got = ", ".join(f"{column} ({kind})" for column, kind in columns.items())
                raise DataError(f"{path}: expected a column 'text' of strings, got the columns {got}")
            for batch in file.iter_batches(batch_size=64, columns=["text"]):
                for value in batch.column(0).cast(arrow.large_binary()):
                    row += 1
                    where = f"{path}:{row}"
                    if not value.is_valid:
                        raise DataError(f"{where}: expected a string in the column 'text', got null; drop such rows")
                    yield Document(f"{name}:{row}", _decode(value.as_py(), where, errors))
    except arrow.ArrowException as error:
        raise DataError(f"can't read {path} as parquet: {error}") from error


def _read_hub(source: str, errors: str) -> Iterator[Document]:
    datasets = optional_module("datasets", f"reading {source}")
    name, _, config = source.removeprefix(_HUB).partition(":")
    try:
        for row, record in enumerate(datasets.load_dataset(name, config or None, split="train", streaming=True), 1):
            if "text" not in record:
                raise DataError(f"{source}: expected the column 'text', got {', '.join(map(str, record))}")
            yield Document(str(row), _string(record["text"], f"{source}:{row}", errors))
    except DataError:
        raise
    except Exception as error:  # the hub, the network and a data set's own reader each raise their own kinds
        raise DataError(f"can't read {source}: {type(error).__name__}: {error}") from error


def _decode(data: bytes, where: Path | str, errors: str, offset: int = 0) -> str:
    """UTF-8 to text; `offset` is where `data` begins in its file."""
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: byte {offset + error.start} (0x{data[error.start]:02x}) is not valid UTF-8; "
            "convert the file, or go on with --errors replace"
        ) from error


def _string(value: Any, where: str, errors: str) -> str:
    """A string out of JSON, which may hold lone surrogates that no UTF-8 has."""
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a string in 'text', got {type(value).__name__}")
    return _decode(value.encode("utf-8", "surrogatepass"), where, errors)


_PLAIN = {".txt": _read_text, ".md": _read_text, ".rst": _read_text, ".py": _read_text, ".jsonl": _read_jsonl}
_READERS = {
    **_PLAIN,
    **{f"{suffix}.gz": reader for suffix, reader in _PLAIN.items()},
    ".parquet": _read_parquet,
}
_SUFFIXES = ", ".join(_READERS)
