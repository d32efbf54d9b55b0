"""Questions about a text far longer than any window, asked of one reading of it.

    scores = look_up(Streamed(model), make_task("lookup", length=1_000_000, facts=128))

A haystack (`Lookup.haystack`) is read once; then every question is asked of a copy of what is remembered, so none
learns from another. What remembers is a method: a model's state (`Streamed`), its state and a store (`Stored`), or an
index of passages of the text, of which the best are put in front of the question (`Retrieved`).
"""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from abc import ABC, abstractmethod
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bmojo.data.synthetic.lookup import Lookup
from bmojo.data.synthetic.task import Batch
from bmojo.errors import ConfigError
from bmojo.eval.tasks import interval, require_vocabulary, wilson
from bmojo.eval.text import predictions
from bmojo.files import optional_module
from bmojo.memory.layout import Layout
from bmojo.memory.read import Slots
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
        storage = Storage(self.model.config, store=self.store, find=False)
        for part in text[None].split(SEGMENT, 1):
            _, self.state = self.model.features(part, self.state, storage=storage)
        storage.settle()
        time.sleep(self.store.publish)
        self.mark = storage.mark()

    def with_settings(self, **changes: Any) -> Self:
        """What was read, with another `storage_stride` or `storage_blocks` once the stride in progress has ended."""
        other = copy.copy(self)
        other.model = self.model.with_settings(**changes)
        other.state = dataclasses.replace(self.state, config=other.model.config)
        return other

    def features(self, tokens: Tensor, state: MemoryState | None) -> Tensor:
        storage = Storage(self.model.config, len(tokens), store=self.store, write=False)
        storage.back(Mark.cat([self.mark] * len(tokens)))
        return self.model.features(tokens, state, storage=storage)[0]

    def nbytes(self) -> dict[str, int]:
        return {**super().nbytes(), "store": self.store.stats()["bytes"]}


class Neighbours(Stored):
    """kNN-LM over the blocks that a `Stored` has read: what is said is the most likely token under

        share * p_knn + (1 - share) * p_LM,    p_knn(y) = mean over heads of sum_j softmax_j(q . k_j) [token_j = y]

    with p_LM of the model without storage, q the query of its last layer with storage at the token that asks, and j all
    tokens of the blocks found for it. As keys come from a convolution that starts at the token before, token j itself
    is what followed. Source: Khandelwal et al. 2020, arXiv 1911.00172.
    """

    share = 0.5

    def answer(self, tokens: Tensor, labels: Tensor) -> NDArray[np.bool_]:
        asked = labels != NO_LABEL
        features, _ = self.model.features(tokens, self.state.repeat(len(tokens)))
        mixed = (1 - self.share) * self.model.logits(features[asked]).softmax(-1)
        noting = _Noting(self.model.config, len(tokens), store=self.store, write=False)
        noting.back(Mark.cat([self.mark] * len(tokens)))
        self.model.features(tokens, self.state.repeat(len(tokens)), storage=noting)
        layer, queries, begin = noting.noted
        g = noting.geometry[layer]
        queries, begin = queries[:, : tokens.shape[1]][asked], begin[:, : tokens.shape[1]][asked]
        found = self.store.search(layer, g.asking(queries[:, None], begin).numpy(), g.blocks, self.store.pin())
        for row, (query, place, blocks) in enumerate(zip(queries, begin, found, strict=True)):
            read = [block for _, number in blocks if (block := self.store.get(number)) is not None]
            keys = torch.from_numpy(np.stack([block.k for block in read])).to(query.dtype)
            keys = g.turn(keys, g.stands(place[None], torch.full_like(place[None], -1))).flatten(0, 1)
            logits = torch.einsum("kgp,jkp->kgj", query.unflatten(0, (g.kv_heads, -1)), keys) * g.head_dim**-0.5
            said = torch.from_numpy(np.concatenate([block.tokens for block in read])).long()
            mixed[row].index_add_(0, said, self.share * logits.softmax(-1).mean((0, 1)))
        return (mixed.argmax(-1) == labels[asked]).view(len(tokens), -1).numpy()


class _Noting(Storage):
    """Notes the queries of the last layer with storage [B, L, H, P], turned by their positions [B, L]."""

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor, score: Tensor | None, held: Tensor | None,
             layout: Layout) -> tuple[Slots, Tensor | None] | None:  # fmt: skip
        self.noted = layer, layout.restore(q), layout.restore(layout.position)
        return super().read(layer, q, k, v, score, held, layout)


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
    """Read haystack `number` of the task, then ask `questions` of its questions (all if None): `ask`, and

    read_us    microseconds a token of reading the text

    Raises ConfigError for a vocabulary too small.
    """
    require_vocabulary(method.model, task)
    asked = task.haystack(number)
    clock = time.perf_counter()
    method.read(torch.from_numpy(asked["haystack"]).to(method.model.embed.weight.device))
    seconds = time.perf_counter() - clock
    return {**ask(method, asked, questions=questions, batch_size=batch_size), "read_us": seconds / task.length * 1e6}


@torch.inference_mode()
def ask(method: Method, asked: Batch, *, questions: int | None = None, batch_size: int = 16) -> dict[str, Any]:
    """Ask the first `questions` questions about a haystack that was read:

    digits, digits_ci95   share of the digits that are right, given those before; chance is 0.1
    exact, exact_ci95     share of the numbers that are right to the last digit: those that greedy decoding would give
    answer_us             microseconds a token of the questions, `batch_size` of them at a time
    bytes                 of what is kept of the text

    95 % intervals: `interval` over the digits, Wilson's over the numbers.
    """
    device = method.model.embed.weight.device
    tokens, labels = (torch.from_numpy(asked[name][:questions]).to(device) for name in ("tokens", "labels"))
    clock = time.perf_counter()
    parts = zip(tokens.split(batch_size), labels.split(batch_size), strict=True)
    right = np.concatenate([method.answer(*part) for part in parts])
    seconds = time.perf_counter() - clock
    exact: NDArray[np.bool_] = np.all(right, axis=1)
    return {
        "digits": float(right.mean()),
        "digits_ci95": interval(right.ravel(), np.repeat(np.arange(len(right)), right.shape[1])),
        "exact": float(exact.mean()),
        "exact_ci95": wilson(float(exact.mean()), len(exact)),
        "questions": len(right),
        "answer_us": seconds / tokens.numel() * 1e6,
        "bytes": method.nbytes(),
    }
