"""Questions about a text far longer than any window, asked of one reading of it.

    scores = look_up(Streamed(model), make_task("lookup", length=1_000_000, facts=128))

A haystack (`Lookup.haystack`) is read once; then every question is asked of a copy of what is remembered, so none
learns from another. What remembers is a method: a model's state (`Streamed`), its state and a store (`Stored`), or an
index of passages of the text, of which the best are put in front of the question (`Retrieved`).
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bmojo.data.synthetic.lookup import Lookup
from bmojo.errors import ConfigError
from bmojo.eval.tasks import interval, require_vocabulary, wilson
from bmojo.eval.text import predictions
from bmojo.files import optional_module
from bmojo.memory.state import MemoryState
from bmojo.memory.storage import Mark, Storage
from bmojo.memory.store import Store
from bmojo.nn.loss import NO_LABEL
from bmojo.nn.model import BMojoLM

SEGMENT = 2048  # tokens read at once; bounds the memory that a long text takes


class Method(ABC):
    """What reads a text, and answers questions about it."""

    model: BMojoLM

    @abstractmethod
    def read(self, text: Tensor) -> None:
        """Read text, int64 [n], all of it."""

    @abstractmethod
    def prepare(self, tokens: Tensor, asked: Tensor) -> tuple[Tensor, MemoryState | None]:
        """Of questions int64 [rows, m], from whose places `asked` [rows] on answers are told, the tokens [rows, n] to
        be read for them, of which the last m are theirs, and the state before."""

    @abstractmethod
    def nbytes(self) -> dict[str, int]:
        """Bytes of what is kept of the text, by what it is."""

    def answer(self, tokens: Tensor, labels: Tensor) -> NDArray[np.bool_]:
        """[rows, digits]: whether the most likely token is the label, where one is asked."""
        asked = labels != NO_LABEL
        prompt, state = self.prepare(tokens, asked.long().argmax(1))
        features = self.features(prompt, state)
        _, told = predictions(self.model, features[:, -tokens.shape[1] :][asked], labels[asked])
        return (torch.from_numpy(told) == labels[asked].cpu()).view(len(tokens), -1).numpy()

    def features(self, tokens: Tensor, state: MemoryState | None) -> Tensor:
        """Of the last tokens, at least those of the question."""
        return self.model.features(tokens, state)[0]


class Streamed(Method):
    """The state after the text: with a window, of one size at any length; without, a cache of all of it."""

    def __init__(self, model: BMojoLM) -> None:
        self.model, self.state = model, model.empty_state()

    def read(self, text: Tensor) -> None:
        for part in text[None].split(SEGMENT, 1):
            _, self.state = self.model.features(part, self.state)

    def prepare(self, tokens: Tensor, asked: Tensor) -> tuple[Tensor, MemoryState | None]:
        return tokens, self.state.repeat(len(tokens))

    def nbytes(self) -> dict[str, int]:
        return {"state": self.state.nbytes}


class Stored(Streamed):
    """The state after the text, and a store of all its blocks, which every layer with storage finds again.

    The text is read without looking anything up; where the last layer alone has storage, that changes neither what is
    stored nor the state.
    """

    def __init__(self, model: BMojoLM, store: Store) -> None:
        super().__init__(model)
        self.store = store

    def read(self, text: Tensor) -> None:
        storage = Storage(self.model.config, store=_WriteOnly(self.store))  # type: ignore[arg-type]
        for part in text[None].split(SEGMENT, 1):
            _, self.state = self.model.features(part, self.state, storage=storage)
        storage.settle()
        time.sleep(self.store.publish)
        self.mark = storage.mark()

    def features(self, tokens: Tensor, state: MemoryState | None) -> Tensor:
        storage = Storage(self.model.config, len(tokens), store=self.store, write=False)
        storage.back(Mark.cat([self.mark] * len(tokens)))
        return self.model.features(tokens, state, storage=storage)[0]

    def nbytes(self) -> dict[str, int]:
        return {**super().nbytes(), "store": self.store.stats()["bytes"]}


class _WriteOnly:
    """A store that finds nothing."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def search(self, layer: int, asking: np.ndarray, count: int, generation: int) -> list[list[tuple[float, int]]]:
        return [[] for _ in asking]


class Retrieved(Method):
    """Plain retrieval: the `count` passages of `size` bytes (each begins `step` behind the one before) that BM25 finds
    for the line that asks, put in front of it, the best last. The model keeps nothing else of the text.

    Source: Robertson and Zaragoza 2009, in the implementation of Lu 2024, arXiv 2407.03618 (bm25s).
    """

    def __init__(self, model: BMojoLM, *, count: int = 4, size: int = 256, step: int = 192) -> None:
        self.model, self.count, self.size, self.step = model, count, size, step

    def read(self, text: Tensor) -> None:
        bm25s = optional_module("bm25s", "plain retrieval to compare with", "dev")
        if len(text) < self.size + self.step * (self.count - 1):
            raise ConfigError(f"the text must hold {self.count} passages of {self.size} bytes, got {len(text)} bytes")
        starts = range(0, len(text) - self.size + 1, self.step)
        last = [] if starts[-1] + self.size == len(text) else [len(text) - self.size]
        self.passages = torch.stack([text[start : start + self.size] for start in [*starts, *last]])
        self.index = bm25s.BM25()
        self.index.index([_words(bytes(row.tolist())) for row in self.passages], show_progress=False)

    def prepare(self, tokens: Tensor, asked: Tensor) -> tuple[Tensor, MemoryState | None]:
        lines = [bytes(row[: at + 1].tolist()).rpartition(b"\n")[2] for row, at in zip(tokens, asked, strict=True)]
        found, _ = self.index.retrieve([_words(line) for line in lines], k=self.count, show_progress=False)
        best_last = torch.from_numpy(np.ascontiguousarray(found[:, ::-1]).astype(np.int64))
        return torch.cat((self.passages[best_last].flatten(1), tokens), 1), None

    def nbytes(self) -> dict[str, int]:
        arrays = sum(array.nbytes for array in self.index.scores.values() if isinstance(array, np.ndarray))
        words = sum(len(word) for word in self.index.vocab_dict)
        return {"text": self.passages.numel(), "index": arrays + words}


def _words(text: bytes) -> list[str]:
    return re.findall(r"\w+", text.decode(errors="replace").lower())


@torch.inference_mode()
def look_up(
    method: Method, task: Lookup, *, number: int = 0, questions: int | None = None, batch_size: int = 16
) -> dict[str, Any]:
    """Read haystack `number` of the task, then ask `questions` of its questions (all if None):

    digits, digits_ci95   share of the digits that are right, given those before; chance is 0.1
    exact, exact_ci95     share of the numbers that are right to the last digit: those that greedy decoding would give
    read_us, answer_us    microseconds a token of reading the text, and of the questions, `batch_size` at a time
    bytes                 of what is kept of the text

    95 % intervals: `interval` over the digits, Wilson's over the numbers. ConfigError for a vocabulary too small.
    """
    require_vocabulary(method.model, task)
    asked = task.haystack(number)
    device = method.model.embed.weight.device
    tokens, labels = (torch.from_numpy(asked[name][:questions]).to(device) for name in ("tokens", "labels"))
    clock = time.perf_counter()
    method.read(torch.from_numpy(asked["haystack"]).to(device))
    reading = time.perf_counter() - clock
    parts = zip(tokens.split(batch_size), labels.split(batch_size), strict=True)
    right = np.concatenate([method.answer(*part) for part in parts])
    answering = time.perf_counter() - clock - reading
    exact: NDArray[np.bool_] = np.all(right, axis=1)
    return {
        "digits": float(right.mean()),
        "digits_ci95": interval(right.ravel(), np.repeat(np.arange(len(right)), right.shape[1])),
        "exact": float(exact.mean()),
        "exact_ci95": wilson(float(exact.mean()), len(exact)),
        "questions": len(right),
        "read_us": reading / task.length * 1e6,
        "answer_us": answering / tokens.numel() * 1e6,
        "bytes": method.nbytes(),
    }
