"""Training rows of equal length, by number, from the documents of a token store."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmojo.data.store import TokenStore
from bmojo.errors import DataError

IGNORED_LABEL = -100


class PackedRows:
    """Rows of `seq_len` tokens, cut from all documents laid end to end, in an order drawn anew for each epoch.

    Epoch e is a stream of store.num_tokens tokens; its piece r is the row

        tokens        stream[r * seq_len : (r + 1) * seq_len]
        labels        the stream one token later; -100 where that token is of another document, or the stream ends
        document_ids  0 for the row's first document, 1 for the next, and so on

    each int64 [seq_len]. The pieces come in an order drawn for the epoch, too: neighbours in a document would make a
    batch of much the same text. `rows[i]` is number i % rows_per_epoch in the order of epoch i // rows_per_epoch, for
    any i >= 0: the store, seq_len, seed and i decide it alone, so a run that resumes at row i goes on exactly. The
    tokens that don't fill a last row are left out of that epoch. Cost: O(log documents) and the copy; 16 bytes a
    document and 8 a row for each of the two epochs kept.
    Raises DataError if the store is shorter than a row, or the seed is negative.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: int) -> None:
        if seq_len < 1 or seed < 0:
            raise DataError(f"seq_len must be at least 1 and seed at least 0, got {seq_len} and {seed}")
        if store.num_tokens < seq_len:
            raise DataError(
                f"text shorter than a window: {store.num_tokens} tokens, expected at least {seq_len}; "
                "give more text or a shorter window"
            )
        self.store = store
        self.seq_len = seq_len
        self.seed = seed
        self.rows_per_epoch = store.num_tokens // seq_len
        self._epochs: dict[int, tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = {}

    def __getitem__(self, index: int) -> dict[str, NDArray[np.int64]]:
        if index < 0:
            raise IndexError(f"row {index}: rows are counted from 0")
        epoch, row = divmod(index, self.rows_per_epoch)
        order, ends, pieces_order = self._epoch(epoch)
        begin = int(pieces_order[row]) * self.seq_len
        end = min(begin + self.seq_len + 1, self.store.num_tokens)
        first, last = np.searchsorted(ends, [begin, end - 1], side="right")
        pieces = []
        for document, stop in zip(order[first : last + 1], ends[first : last + 1], strict=True):
            start = stop - self.store.lengths[document]
            pieces.append(self.store[document][max(begin - start, 0) : end - start])
        stream = np.concatenate(pieces).astype(np.int64)
        ids = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
        labels = np.full(self.seq_len, IGNORED_LABEL, dtype=np.int64)
        labels[: len(stream) - 1] = np.where(ids[1:] == ids[:-1], stream[1:], IGNORED_LABEL)
        return {"tokens": stream[: self.seq_len], "labels": labels, "document_ids": ids[: self.seq_len]}

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The order of the documents, where each one ends in the stream, and the order of the pieces."""
        if epoch not in self._epochs:
            order = _shuffled(len(self.store), self.seed, epoch)
            if len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            pieces = _shuffled(self.rows_per_epoch, self.seed, epoch, 1)
            self._epochs[epoch] = order, np.cumsum(self.store.lengths[order]), pieces
        return self._epochs[epoch]


def single_document_windows(store: TokenStore, length: int, limit: int, seed: int) -> NDArray[np.int64]:
    """Ascending indices [at most limit] of documents with at least `length` tokens, drawn by the seed; may be empty."""
    fitting = np.flatnonzero(store.lengths >= length)
    return np.sort(fitting[_shuffled(len(fitting), seed)[:limit]])


def _shuffled(count: int, *seed: int) -> NDArray[Any]:
    """0..count-1 in an order that no numpy release changes: only the raw bits of a generator are promised to stay."""
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(count)
    return np.argsort(bits, kind="stable")
