import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bmojo.data.packing import IGNORED_LABEL, PackedRows, single_document_windows
from bmojo.errors import DataError


class Store:
    """Documents of the given lengths; token = 1000 * document + place, so every token says where it is from."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths, dtype=np.int64)
        self.num_tokens = int(self.lengths.sum())

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, document):
        return (1000 * document + np.arange(self.lengths[document])).astype(np.uint32)


def epoch_of(rows, epoch):
    """The rows of an epoch in the order of its stream."""
    return [rows[epoch * rows.rows_per_epoch + int(i)] for i in np.argsort(rows._epoch(epoch)[2])]


packings = {
    "lengths": st.lists(st.integers(1, 40), min_size=1, max_size=12),
    "seq_len": st.integers(1, 50),
    "seed": st.integers(0, 3),
    "epoch": st.integers(0, 3),
}


@settings(deadline=None)
@given(**packings)
@example(lengths=[5, 5], seq_len=5, seed=0, epoch=0)
@example(lengths=[1, 1, 1, 1], seq_len=2, seed=0, epoch=1)
@example(lengths=[40], seq_len=7, seed=0, epoch=0)
def test_rows_partition_the_stream(lengths, seq_len, seed, epoch):
    store = Store(lengths)
    if store.num_tokens < seq_len:
        with pytest.raises(DataError, match=f"shorter than a window: {store.num_tokens} tokens, expected .* {seq_len}"):
            PackedRows(store, seq_len, seed)
        return
    rows = epoch_of(PackedRows(store, seq_len, seed), epoch)
    assert len(rows) == store.num_tokens // seq_len
    assert all(value.shape == (seq_len,) and value.dtype == np.int64 for row in rows for value in row.values())

    tokens, labels = (np.concatenate([row[key] for row in rows]) for key in ("tokens", "labels"))
    assert len(np.unique(tokens)) == len(tokens)
    documents, places = np.divmod(tokens, 1000)
    begins = np.flatnonzero(np.diff(documents, prepend=-1))
    assert len(np.unique(documents[begins])) == len(begins), "each document is in one piece"
    np.testing.assert_array_equal(places[begins], 0)
    np.testing.assert_array_equal(places, np.arange(len(places)) - np.repeat(begins, np.diff([*begins, len(places)])))

    ends = places == store.lengths[documents] - 1
    np.testing.assert_array_equal(labels, np.where(ends, IGNORED_LABEL, tokens + 1))
    for row in rows:
        changes = np.diff(row["tokens"] // 1000) != 0
        np.testing.assert_array_equal(row["document_ids"], np.cumsum([0, *changes]))


@settings(deadline=None, max_examples=30)
@given(**packings, jumps=st.lists(st.integers(0, 200), max_size=5))
def test_a_row_depends_on_its_number_alone(lengths, seq_len, seed, epoch, jumps):
    store = Store(lengths)
    if store.num_tokens < seq_len:
        return
    used, fresh = PackedRows(store, seq_len, seed), PackedRows(store, seq_len, seed)
    for jump in jumps:
        used[jump]
    for i in range(4):
        for key, value in used[epoch + i].items():
            np.testing.assert_array_equal(value, fresh[epoch + i][key])


def test_epochs_and_seeds_shuffle_differently():
    store = Store([7] * 30)
    streams = [
        tuple(np.concatenate([row["tokens"] for row in epoch_of(PackedRows(store, 10, seed), epoch)]))
        for seed, epoch in [(0, 0), (0, 1), (1, 0)]
    ]
    assert len(set(streams)) == 3
    assert len({frozenset(stream) for stream in streams}) == 1


def test_neighbours_in_the_stream_are_not_neighbours_in_training():
    rows = PackedRows(Store([400]), 4, 0)
    first = [int(rows[i]["tokens"][0]) for i in range(100)]
    assert sorted(first) == list(range(0, 400, 4))
    assert np.mean(np.abs(np.diff(first)) == 4) < 0.1


def test_the_order_never_changes():
    np.testing.assert_array_equal(PackedRows(Store([1] * 8), 8, 0)[0]["tokens"] // 1000, [3, 2, 1, 6, 0, 7, 4, 5])


def test_only_two_epochs_are_kept():
    rows = PackedRows(Store([5, 6]), 5, 0)
    for index in range(20):
        rows[index]
    assert list(rows._epochs) == [8, 9]


def test_bad_arguments():
    store = Store([5])
    for seq_len, seed in [(0, 0), (5, -1)]:
        with pytest.raises(DataError, match="at least"):
            PackedRows(store, seq_len, seed)
    with pytest.raises(IndexError):
        PackedRows(store, 5, 0)[-1]


def test_single_document_windows():
    store = Store([3, 10, 9, 10, 50, 2])
    np.testing.assert_array_equal(single_document_windows(store, 10, 9, 0), [1, 3, 4])
    assert single_document_windows(store, 51, 9, 0).size == 0
    chosen = {tuple(single_document_windows(store, 9, 2, seed)) for seed in range(20)}
    assert len(chosen) > 2
    assert all(len(indices) == 2 and set(indices) <= {1, 2, 3, 4} for indices in chosen)
    np.testing.assert_array_equal(single_document_windows(store, 9, 2, 7), single_document_windows(store, 9, 2, 7))
