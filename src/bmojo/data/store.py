"""Tokens of a corpus in memory-mapped files, with whole documents held out for evaluation.

folder/meta.json         settings that made the store, and counts
folder/{train,eval}.bin         tokens of all documents, one after another
folder/{train,eval}.starts.npy  int64 [documents + 1], where each document begins, and the end
folder/{train,eval}.bytes.npy   int64 [documents], UTF-8 bytes of each document
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
import warnings
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmojo.data.documents import Document, fingerprint, read_documents
from bmojo.data.tokenizers import Tokenizer, token_dtype
from bmojo.errors import CheckpointError, DataError

_VERSION = 1
_SIDES = ("train", "eval")
_META = "meta.json"
_FILES = {_META, *(f"{side}.{end}" for side in _SIDES for end in ("bin", "starts.npy", "bytes.npy"))}


class TokenStore:
    """Documents of one side, memory-mapped: `store[i]` is a view [tokens] of document i, at least one token long."""

    def __init__(self, folder: str | Path, side: str, dtype: str) -> None:
        folder = Path(folder)
        self._starts: NDArray[np.int64] = np.load(folder / f"{side}.starts.npy")
        self._tokens = np.memmap(folder / f"{side}.bin", dtype=dtype, mode="r")
        self.bytes: NDArray[np.int64] = np.load(folder / f"{side}.bytes.npy")
        self.lengths: NDArray[np.int64] = np.diff(self._starts)
        if self._starts[-1] != len(self._tokens) or len(self.bytes) != len(self):
            raise ValueError(f"{side}: the files disagree on the number of tokens or documents")

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, document: int) -> NDArray[np.unsignedinteger]:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} of {len(self)}")
        return self._tokens[self._starts[document] : self._starts[document + 1]]

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)


class TextData:
    """A finished store: `train` and `eval` (TokenStore), and `meta` as written by `prepare`.

    Raises DataError if the folder is missing, foreign or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.meta: dict[str, Any] = json.loads((self.folder / _META).read_text(encoding="utf-8"))
            settings = self.meta["settings"]
            if settings["version"] != _VERSION:
                raise ValueError(f"version {settings['version']}, expected {_VERSION}")
            self.train, self.eval = (TokenStore(folder, side, settings["dtype"]) for side in _SIDES)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} is not a whole token store ({error}); delete it and prepare it again") from error

    def corpus_record(self) -> dict[str, Any]:
        """What a report says of the corpus; paths of this machine are left out."""
        keys = ("name", "bytes_train", "bytes_eval", "documents_train", "documents_eval", "sha256")
        return {key: self.meta[key] for key in keys}


class _Writer:
    """Appends documents to one side; the last one can be taken back, and is kept as `last`."""

    def __init__(self, folder: Path, side: str, tokenizer: Tokenizer) -> None:
        self._stem = folder / side
        self._file = open(f"{self._stem}.bin", "wb")  # noqa: SIM115
        self._encode = tokenizer.encode
        self._dtype = token_dtype(tokenizer.vocab_size)
        self.starts = array("q", [0])
        self.bytes = array("q")
        self.last = ""

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def append(self, text: str) -> None:
        tokens = self._encode(text)
        if len(tokens):
            self._file.write(np.ascontiguousarray(tokens, dtype=self._dtype).data)
            self.starts.append(self.starts[-1] + len(tokens))
            self.bytes.append(len(text.encode()))
            self.last = text

    def pop(self) -> None:
        self.starts.pop()
        self.bytes.pop()
        self._file.seek(self.starts[-1] * self._dtype.itemsize)
        self._file.truncate()

    def save(self) -> None:
        self._file.flush()
        np.save(f"{self._stem}.starts.npy", np.array(self.starts, dtype=np.int64))
        np.save(f"{self._stem}.bytes.npy", np.array(self.bytes, dtype=np.int64))


def prepare(
    source: str,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    held_out: float = 0.05,
    seed: int = 0,
    errors: str = "strict",
) -> TextData:
    """Reads a source once and writes its tokens to `folder`; a store there made with the same settings is reused.

    A document goes to the evaluation side if a hash of (seed, its number, its name), as a fraction, is below
    `held_out`; if that leaves a side empty, the last document goes there. Of a single document the last `held_out`
    of its characters, cut at a line where one ends near, is the evaluation side (`meta["held_out_by"]` says which).
    The store appears whole or not at all, whenever the process is stopped. Memory: the longest document, and 24 bytes
    a document.
    source, errors: as in `read_documents`. Raises DataError for bad text, a full disk, or a foreign folder.
    """
    if not 0 < held_out < 1:
        raise DataError(f"held_out must be a fraction between 0 and 1, got {held_out}")
    folder = Path(folder)
    settings = {
        "version": _VERSION,
        "source": source,
        "fingerprint": fingerprint(source),
        "errors": errors,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "held_out": held_out,
        "seed": seed,
    }
    if (data := _current(folder, settings)) is not None:
        return data
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - _FILES):
        raise DataError(f"{folder} holds other things than a token store; choose a new folder")
    work = None
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        built = work / "new"
        built.mkdir()
        counts = _write(read_documents(source, errors=errors), tokenizer, built, held_out, seed)
        name = source if source.startswith("hf:") else Path(source).absolute().name
        meta = {"name": name, "settings": settings, **counts}
        (built / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        if _current(folder, settings) is None:  # another process may have finished the same store meanwhile
            if folder.exists():
                folder.rename(work / "old")
            built.rename(folder)
    except OSError as error:
        reason = "no space left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
        raise DataError(f"{reason}: can't write the token store {folder}; free some space or choose another") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return TextData(folder)


def reopen(source: str, folder: Path) -> TextData:
    """The store that a run began with; a warning if `source` is no longer what it was made of.

    Raises CheckpointError if the store is gone or damaged.
    """
    try:
        data = TextData(folder)
    except DataError as error:
        raise CheckpointError(
            f"{folder} is gone or damaged ({error.__cause__}), and a run can't go on without the text that it began "
            "with; use another folder (or --name)"
        ) from error
    try:
        same = data.meta["settings"]["fingerprint"] == fingerprint(source)
    except DataError:
        same = False
    if not same:
        warnings.warn(f"{source} has changed; this run goes on with the text that it began with", stacklevel=2)
    return data


def require_length(data: TextData, tokens: int) -> None:
    """Raises DataError unless the train side fills a window of `tokens`, and some held-out document has two tokens."""
    if data.train.num_tokens < tokens:
        raise DataError(
            f"text shorter than a window: {data.train.num_tokens} training tokens, expected at least {tokens}; "
            "give more text or a shorter window"
        )
    if data.eval.lengths.max() < 2:
        raise DataError("text shorter than a window: no held-out document has two tokens; give more text")


def _current(folder: Path, settings: dict[str, Any]) -> TextData | None:
    """The store in `folder` if it is whole and made with these settings."""
    try:
        data = TextData(folder)
    except DataError:
        return None
    return data if data.meta["settings"] == settings else None


def _write(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path, held_out: float, seed: int
) -> dict[str, Any]:
    """Writes both sides and returns the counts of meta.json."""
    content = hashlib.sha256()
    by = "document"
    with _Writer(folder, "train", tokenizer) as train, _Writer(folder, "eval", tokenizer) as evaluation:
        for number, document in enumerate(documents):
            name, text = document.name.encode("utf-8", "surrogateescape"), document.text.encode()
            for part in (name, text):
                content.update(len(part).to_bytes(8, "little") + part)
            draw = hashlib.blake2b(b"%d\0%d\0%b" % (seed, number, name), digest_size=8).digest()
            side = evaluation if int.from_bytes(draw, "little") < held_out * 2**64 else train
            side.append(document.text)

        full, empty = (train, evaluation) if train.bytes else (evaluation, train)
        if full.bytes and not empty.bytes:
            full.pop()
            if full.bytes:
                empty.append(full.last)
            else:
                by = "end of the only document"
                only = full.last
                cut = _cut(only, held_out)
                train.append(only[:cut])
                evaluation.append(only[cut:])
        if not (train.bytes and evaluation.bytes):
            raise DataError("text too short to hold some of it out; give more text")
        train.save()
        evaluation.save()
    return {
        "held_out_by": by,
        "bytes_train": sum(train.bytes),
        "bytes_eval": sum(evaluation.bytes),
        "documents_train": len(train.bytes),
        "documents_eval": len(evaluation.bytes),
        "tokens_train": train.starts[-1],
        "tokens_eval": evaluation.starts[-1],
        "sha256": content.hexdigest(),
    }


def _cut(text: str, held_out: float) -> int:
    """Where the held-out end begins: at the line that begins before its share of the characters, if one is near."""
    cut = min(max(round(len(text) * (1 - held_out)), 1), len(text) - 1)
    margin = min(cut, len(text) - cut) // 2
    line_end = text.rfind("\n", cut - margin, cut)
    return cut if line_end < 0 else line_end + 1
