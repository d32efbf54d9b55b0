"""How well a model compresses held-out documents, in bits per UTF-8 byte."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bmojo.data.documents import Document
from bmojo.data.tokenizers import Tokenizer
from bmojo.errors import DataError
from bmojo.nn.model import BMojoLM

RESAMPLES = 1000
LOGITS_AT_ONCE = 2**24  # numbers; bounds the memory that the head takes
FEW_DOCUMENTS = 5  # fewer say too little of the spread between documents
MIN_DOCUMENTS = 8  # that take part where bytes are limited


class Documents(Protocol):
    """Tokenized documents, as a side of `bmojo.data.TextData` is: item i holds the lengths[i] tokens of document i."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...
    @property
    def bytes(self) -> NDArray[np.int64]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, document: int, /) -> NDArray[np.unsignedinteger]: ...


class TokenLists:
    """Documents in memory, tokenized as they are: nothing is held out."""

    def __init__(self, documents: Iterable[Document], tokenizer: Tokenizer) -> None:
        coded = [(tokenizer.encode(document.text), len(document.text.encode())) for document in documents]
        self._tokens = [tokens for tokens, _ in coded if len(tokens)]
        self.bytes = np.array([size for tokens, size in coded if len(tokens)], dtype=np.int64)
        self.lengths = np.array([len(tokens) for tokens in self._tokens], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, document: int, /) -> NDArray[np.unsignedinteger]:
        return self._tokens[document]


@dataclass(frozen=True)
class TextScore:
    bits_per_byte: float
    ci95: tuple[float, float]  # over documents
    documents: int
    bytes: int


def score_documents(
    model: BMojoLM,
    store: Documents,
    *,
    max_bytes: int | None = None,
    context: int | None = None,
    segment: int = 512,
    batch_size: int = 8,
    seed: int = 0,
) -> TextScore:
    """Code length of documents, each read from an empty state, over their UTF-8 bytes.

    With `context`, the state is emptied after every so many tokens of a document, as it is between the rows of
    training: the score is then that of the training length, not of how well a model goes on beyond it.

    The first token of a document costs log2(vocab_size) bits, every other -log2 p(token | the document before it).
    With `max_bytes`, documents are taken in an order drawn by `seed` until it is reached, each cut to at most an
    eighth of it, so that at least 8 take part if the store has as many. A cut document has the share of its bytes
    that it keeps of its tokens (exact for byte tokens). ci95: percentile bootstrap of the ratio of sums over documents,
    RESAMPLES resamples; over pieces of `context` tokens where there are fewer than 5 documents. The result depends on
    `segment` and `batch_size` by rounding alone.
    Raises DataError if the store is empty.
    """
    kept = _within(store, max_bytes, seed)
    pieces = [
        (i, start, store[document][start : min(length, start + (context or length) + 1)])
        for i, (document, length) in enumerate(kept)
        for start in range(0, max(1, length - 1), context or length)
    ]
    bits: NDArray[np.float64] = np.zeros(len(pieces))
    tokens = np.zeros(len(pieces))
    for j, costs in token_bits(model, [piece for *_, piece in pieces], segment=segment, batch_size=batch_size):
        own = costs[min(pieces[j][1], 1) :]  # the first token of a later piece was scored in the one before
        bits[j], tokens[j] = own.sum(), len(own)
    of = np.array([i for i, *_ in pieces])
    sizes: NDArray[np.float64] = (
        tokens * np.array([store.bytes[document] / store.lengths[document] for document, _ in kept])[of]
    )
    if len(kept) >= FEW_DOCUMENTS:
        bits, sizes = (np.bincount(of, weights=values).astype(np.float64) for values in (bits, sizes))
    return TextScore(
        float(bits.sum() / sizes.sum()), bootstrap_ratio(bits, sizes, seed), len(kept), round(float(sizes.sum()))
    )


def by_position(
    model: BMojoLM,
    store: Documents,
    *,
    positions: list[int],
    documents: int,
    bytes_per_token: float,
    segment: int = 512,
    batch_size: int = 8,
    seed: int = 0,
) -> list[list[float]]:
    """[position, bits per byte] of the tokens number (previous position, position] of long documents.

    The documents are those of `position_bits`. Bits are means over tokens, divided by `bytes_per_token`.
    """
    edges, bits, counts = position_bits(
        model, store, positions=positions, documents=documents, segment=segment, batch_size=batch_size, seed=seed
    )
    means = bits.sum(0) / counts.sum(0) / bytes_per_token
    return [[edge, float(mean)] for edge, mean in zip(edges, means, strict=True)]


def position_bits(
    model: BMojoLM,
    store: Documents,
    *,
    positions: list[int],
    documents: int,
    segment: int = 512,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[list[int], NDArray[np.float64], NDArray[np.float64]]:
    """n ascending positions; bits, and number, of the tokens (previous position, position], [documents, n] each.

    Takes `documents` documents drawn by `seed` among those with at least max(positions) tokens and, where these are too
    few, the longest of the others; a position that none of them reaches is left out. The first token costs
    log2(vocab_size) bits, as in `score_documents`.
    """
    edges = sorted(set(positions))
    if not edges or edges[0] < 1 or len(store) == 0:
        raise DataError(f"positions must be at least 1, of at least one document; got {positions} of {len(store)}")
    reach = np.minimum(store.lengths, edges[-1])
    drawn = np.random.default_rng(seed).permutation(len(store))
    chosen = drawn[np.argsort(-reach[drawn], kind="stable")][:documents]
    edges = [edge for edge in edges if edge <= reach[chosen].max()]
    bits, counts = np.zeros((2, len(chosen), len(edges)))
    if not edges:
        return edges, bits, counts
    starts = [0, *edges[:-1]]
    tokens = [store[int(document)][: edges[-1]] for document in chosen]
    for i, costs in token_bits(model, tokens, segment=segment, batch_size=batch_size):
        padded = np.pad(costs, (0, edges[-1] - len(costs)))
        bits[i] = np.add.reduceat(padded, starts)
        counts[i] = np.clip(len(costs) - np.array(starts), 0, np.diff([*starts, edges[-1]]))
    return edges, bits, counts


def token_bits(
    model: BMojoLM, documents: list[NDArray[np.unsignedinteger]], *, segment: int, batch_size: int
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """(index, bits of each token) of every document, in order of length; the first token costs log2(vocab_size).

    Documents of similar length are read side by side, in segments with the state carried.
    """
    order = sorted(range(len(documents)), key=lambda i: (len(documents[i]), i))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        costs = _read_side_by_side(model, [documents[i] for i in rows], segment)
        yield from zip(rows, costs, strict=True)


@torch.inference_mode()
def _read_side_by_side(
    model: BMojoLM, documents: list[NDArray[np.unsignedinteger]], segment: int
) -> list[NDArray[np.float64]]:
    """Bits of each token of documents in ascending order of length."""
    device = model.embed.weight.device
    lengths = [len(document) for document in documents]
    bits = [np.full(length, math.log2(model.config.vocab_size)) for length in lengths]
    state, first = None, 0  # documents before `first` are done
    for start in range(0, lengths[-1] - 1, segment):
        done = sum(length - 1 <= start for length in lengths)
        if state is not None and done > first:
            state = state.select(list(range(done - first, state.batch_size)))
        first = done
        width = min(segment, lengths[-1] - 1 - start)
        tokens, labels = np.zeros((2, len(lengths) - first, width), dtype=np.int64)
        mask = np.zeros(tokens.shape, dtype=bool)
        for row, document in enumerate(documents[first:]):
            part = document[start : start + width + 1]
            tokens[row, : len(part) - 1], labels[row, : len(part) - 1] = part[:-1], part[1:]
            mask[row, : len(part) - 1] = True
        x, y, told = (torch.from_numpy(array).to(device) for array in (tokens, labels, mask))
        features, state = model.features(x, state, mask=told)
        bits_told, _ = predictions(model, features[told], y[told])
        for row, cost in enumerate(np.split(bits_told, mask.sum(1).cumsum()[:-1]), first):
            bits[row][start + 1 : start + 1 + len(cost)] = cost
    return bits


def predictions(model: BMojoLM, features: Tensor, labels: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """-log2 p of each label [n] given the features [n, hidden_size] before it, and the most likely of all tokens."""
    at_once = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    costs, best = [], []
    for part, label in zip(features.split(at_once), labels.split(at_once), strict=True):
        logits = model.logits(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        costs.append(F.cross_entropy(logits, label, reduction="none").double())
        best.append(logits.argmax(-1))
    return torch.cat(costs).cpu().numpy() / math.log(2), torch.cat(best).cpu().numpy()


def bootstrap_ratio(bits: NDArray[np.float64], sizes: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """95 % percentile interval of sum(bits) / sum(sizes) over documents drawn with replacement."""
    draw = np.random.default_rng(seed)
    ratios = []
    for _ in range(0, RESAMPLES, 50):  # so many at once that memory stays linear in the documents
        chosen = draw.integers(0, len(bits), (50, len(bits)))
        ratios.append(bits[chosen].sum(1) / sizes[chosen].sum(1))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    mean = bits.sum() / sizes.sum()  # a skewed handful of documents may put it outside
    return float(min(low, mean)), float(max(high, mean))


def _within(store: Documents, max_bytes: int | None, seed: int) -> list[tuple[int, int]]:
    """(document, tokens of it) to score."""
    if len(store) == 0:
        raise DataError("there is no document to score; give text")
    if max_bytes is None:
        return [(i, int(length)) for i, length in enumerate(store.lengths)]
    if max_bytes < MIN_DOCUMENTS:
        raise DataError(f"max_bytes must be at least {MIN_DOCUMENTS}, got {max_bytes}")
    kept: list[tuple[int, int]] = []
    left = float(max_bytes)
    for document in np.random.default_rng(seed).permutation(len(store)):
        size, length = int(store.bytes[document]), int(store.lengths[document])
        tokens = max(1, int(min(size, max_bytes / MIN_DOCUMENTS, left) * length / size))
        kept.append((int(document), tokens))
        left -= size * tokens / length
        if left < 1:
            break
    return kept
