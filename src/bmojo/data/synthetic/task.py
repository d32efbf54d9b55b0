"""What every synthetic task is: settings that are checked once, and batches that depend on them and a number alone."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from bmojo.data.documents import read_documents
from bmojo.errors import DataError

NO_ANSWER = -100
EVALUATION = 2**32  # batches from this number on are never trained on
NO_RECORD = {"record": False}  # metadata of a field that is no setting of the task

Batch = dict[str, np.ndarray]
Encode = Callable[[str], list[int]]

_KINDS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
    "None": (type(None),),
}
_TEXT_SIZE = 2**23


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Sequences of `length` tokens with questions in them; the same settings and number give the same batch."""

    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.metadata.get("record", True):
                value, names = getattr(self, field.name), str(field.type).split(" | ")
                kinds = tuple(kind for name in names for kind in _KINDS[name])
                if not isinstance(value, kinds) or (isinstance(value, bool) and "bool" not in names):
                    raise DataError(f"{field.name} must be {' or '.join(names)}, got {value!r}")
        self.require(self.length >= 1, f"length must be at least 1, got {self.length}")
        self.require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        self.check()

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """How many ids the tokens and labels are drawn from."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """The accuracy of a guess among all answers that can be."""

    @abstractmethod
    def check(self) -> None:
        """Raises DataError for settings that are out of range or at odds with each other."""

    @abstractmethod
    def batch(self, number: int, rows: int) -> Batch:
        """Batch `number`, int64: `tokens` [rows, length]; `labels` [rows, length], the answer where one is asked and
        NO_ANSWER elsewhere; `distance` [rows, length], tokens from the fact to the question, 0 where none is asked."""

    @staticmethod
    def require(holds: bool, message: str) -> None:
        if not holds:
            raise DataError(message)

    def generator(self, number: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.length, number))


def unasked(tokens: np.ndarray) -> Batch:
    """A batch of these tokens in which nothing is asked yet."""
    return {"tokens": tokens, "labels": np.full_like(tokens, NO_ANSWER), "distance": np.zeros_like(tokens)}


def next_symbols(symbols: np.ndarray, start: int) -> Batch:
    """A batch that asks for every one of `symbols` [rows, length] behind those before it, the first behind the token
    `start`; `distance` is that to the start, the number of tokens seen."""
    labels = symbols.astype(np.int64)
    tokens = np.concatenate([np.full_like(labels[:, :1], start), labels[:, :-1]], axis=1)
    seen = np.arange(1, labels.shape[1] + 1)
    return {"tokens": tokens, "labels": labels, "distance": np.broadcast_to(seen, labels.shape).copy()}


def ask(batch: Batch, at: np.ndarray, answers: np.ndarray, facts: np.ndarray) -> None:
    """Ask in place: at the positions `at` [rows, n], for `answers` [rows, n] that stand at `facts` [rows, n]."""
    np.put_along_axis(batch["labels"], at, answers, 1)
    np.put_along_axis(batch["distance"], at, at - facts, 1)


def distinct(draw: np.random.Generator, rows: int, count: int, size: int) -> np.ndarray:
    """[rows, count] int64: in each row different numbers below `size`, every ordered choice as likely as any other.

    Repeats are drawn again until there are none. That treats all numbers alike, so it favours no choice; where `count`
    is so near `size` that it would take long, rows of all the numbers are shuffled instead.
    """
    if 2 * count > size:
        return draw.permuted(np.tile(np.arange(size), (rows, 1)), axis=1)[:, :count]
    chosen = draw.integers(size, size=(rows, count))
    unclear = np.arange(rows)
    while len(unclear):
        repeated = previous(chosen[unclear]) >= 0
        unclear, repeated = unclear[repeated.any(1)], repeated[repeated.any(1)]
        fresh = draw.integers(size, size=int(repeated.sum()))
        part = chosen[unclear]
        part[repeated] = fresh
        chosen[unclear] = part
    return chosen


def previous(ids: np.ndarray) -> np.ndarray:
    """[rows, n]: where the same id stood last before this place in its row, -1 if nowhere. ids: [rows, n], >= 0."""
    count = ids.shape[1]
    ranked = np.sort(ids * count + np.arange(count), axis=1)  # by id, then by place
    kind, place = np.divmod(ranked, count)
    before = np.full_like(ids, -1)
    np.put_along_axis(before, place[:, 1:], np.where(kind[:, 1:] == kind[:, :-1], place[:, :-1], -1), 1)
    return before


def excerpts(draw: np.random.Generator, rows: int, length: int, encode: Encode | None = None) -> np.ndarray:
    """[rows, length] int64 ids of consecutive real text from random places; bytes if `encode` is None."""
    text = _text(encode)
    if len(text) < length:
        raise DataError(f"length must be at most that of the text there is, {len(text)} tokens, got {length}")
    start = draw.integers(len(text) - length + 1, size=rows)
    return np.lib.stride_tricks.sliding_window_view(text, length)[start].astype(np.int64)


def text_bytes() -> np.ndarray:
    """All that `excerpts` draws from, as bytes."""
    return _text(None)


@lru_cache(maxsize=2)
def _text(encode: Encode | None) -> np.ndarray:
    """The first 8 million characters of Python's standard library: real text that every machine has."""
    parts, total = [], 0
    for document in read_documents("stdlib"):
        parts.append(document.text)
        total += len(document.text)
        if total >= _TEXT_SIZE:
            break
    text = "".join(parts)
    return np.frombuffer(text.encode(), np.uint8) if encode is None else np.array(encode(text))
