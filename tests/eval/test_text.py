import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bmojo import BMojoLM, presets
from bmojo.data import ByteTokenizer, Document, prepare
from bmojo.errors import DataError
from bmojo.eval import TokenLists, by_position, score_documents
from bmojo.eval.text import bootstrap_ratio, token_bits

TEXTS = [
    "a",
    "Äpfel und Birnen. " * 3,
    "xyz" * 40,
    "ab",
    "",
    "the quick brown fox " * 9,
    "b" * 77,
    "cde" * 31,
    "f" * 50,
]


@pytest.fixture(scope="module")
def store():
    return TokenLists([Document(str(i), text) for i, text in enumerate(TEXTS)], ByteTokenizer())


@pytest.fixture(scope="module", params=["bmojo", "transformer"])
def model(request):
    torch.manual_seed(0)
    fields = {"vocab_size": 300, "hidden_size": 32, "num_heads": 2, "chunk_size": 8, "ssm_head_dim": 16}
    extra = {"window": 16, "eidetic_slots": 4} if request.param == "bmojo" else {}
    return BMojoLM(presets.get(request.param, "tiny", **fields, **extra)).double()


@torch.no_grad()
def bits_of(model, tokens):
    """Bits of each token, from one long forward pass."""
    x = torch.from_numpy(tokens.astype(np.int64))[None]
    logits, _ = model(x)
    rest = F.cross_entropy(logits[0, :-1], x[0, 1:], reduction="none") / math.log(2)
    return np.concatenate([[math.log2(300)], rest.numpy()])


def test_equals_one_long_forward_pass(model, store):
    total = sum(bits_of(model, store[i]).sum() for i in range(len(store)))
    score = score_documents(model, store, segment=19, batch_size=3)
    assert score.documents == len(store) == 8
    assert score.bytes == len("".join(TEXTS).encode())
    assert score.bits_per_byte == pytest.approx(total / score.bytes, rel=1e-12)
    low, high = score.ci95
    assert low < score.bits_per_byte < high


def test_with_a_context_the_state_is_emptied_after_so_many_tokens(model, store):
    total = 0.0
    for i in range(len(store)):
        tokens = np.asarray(store[i])
        total += math.log2(300)
        for start in range(0, len(tokens) - 1, 16):
            total += bits_of(model, tokens[start : start + 17])[1:].sum()
    score = score_documents(model, store, context=16, batch_size=3)
    assert score.bits_per_byte == pytest.approx(total / score.bytes, rel=1e-12)
    assert score.documents == len(store)


@pytest.mark.parametrize(("segment", "batch_size"), [(1, 8), (8, 1), (64, 2), (512, 8)])
def test_segments_and_batches_do_not_matter(model, store, segment, batch_size):
    expected = score_documents(model, store, segment=100, batch_size=4)
    got = score_documents(model, store, segment=segment, batch_size=batch_size)
    assert got.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-12)


def test_token_bits_are_those_of_each_document(model, store):
    tokens = [store[i] for i in range(len(store))]
    got = dict(token_bits(model, tokens, segment=10, batch_size=3))
    assert sorted(got) == list(range(len(store)))
    for i, document in enumerate(tokens):
        np.testing.assert_allclose(got[i], bits_of(model, document), rtol=1e-9)


def test_limited_bytes_cut_long_documents_and_take_eight(model, store):
    score = score_documents(model, store, max_bytes=160)
    assert score.documents == 8
    assert score.bytes == sum(min(20, size) for size in store.bytes)
    assert score == score_documents(model, store, max_bytes=160)
    small = score_documents(model, store, max_bytes=8)
    assert (small.documents, small.bytes) == (8, 8)
    assert small.bits_per_byte == pytest.approx(math.log2(300))
    with pytest.raises(DataError, match="max_bytes must be at least 8, got 7"):
        score_documents(model, store, max_bytes=7)


def test_limited_bytes_stop_at_the_limit(model):
    store = TokenLists([Document(str(i), "x" * 30) for i in range(50)], ByteTokenizer())
    score = score_documents(model, store, max_bytes=200)
    assert (score.documents, score.bytes) == (8, 200)


def test_a_cut_document_has_its_share_of_bytes(model):
    store = TokenLists([Document(str(i), "é" * 20) for i in range(9)], ByteTokenizer())
    store.lengths //= 2  # as if one token were two bytes
    score = score_documents(model, store, max_bytes=64)
    assert score.bytes == 64
    assert score.bits_per_byte > math.log2(300) / 8


def test_no_documents_are_refused(model):
    with pytest.raises(DataError, match="no document"):
        score_documents(model, TokenLists([], ByteTokenizer()))


def test_bootstrap_covers_the_mean_at_its_level():
    draw, sizes = np.random.default_rng(0), np.full(30, 100.0)
    inside = 0
    for trial in range(60):
        low, high = bootstrap_ratio(100 * draw.normal(2, 0.5, 30), sizes, seed=trial)
        inside += low <= 2 <= high
    assert 50 <= inside <= 60
    assert bootstrap_ratio(np.array([3.0]), np.array([2.0]), 0) == (1.5, 1.5)


def test_by_position_sums_to_the_whole(model, store):
    longest = int(store.lengths.max())
    curve = by_position(model, store, positions=[longest, 16, 64], documents=20, bytes_per_token=1.0, segment=11)
    assert [position for position, _ in curve] == [16, 64, longest]
    edges = [0, 16, 64, longest]
    counts = [sum(max(0, min(n, b) - a) for n in store.lengths) for a, b in itertools.pairwise(edges)]
    total = sum(bits_of(model, store[i]).sum() for i in range(len(store)))
    assert sum(count * bits for count, (_, bits) in zip(counts, curve, strict=True)) == pytest.approx(total)


def test_by_position_takes_long_documents_and_drops_what_none_reaches(model, store):
    longest = int(store.lengths.max())
    curve = by_position(model, store, positions=[32, longest, 10_000], documents=1, bytes_per_token=2.0)
    own = bits_of(model, store[int(store.lengths.argmax())])
    expected = [[32, own[:32].mean() / 2], [longest, own[32:].mean() / 2]]
    np.testing.assert_allclose(curve, expected, rtol=1e-9)
    assert by_position(model, store, positions=[10_000], documents=3, bytes_per_token=1.0) == []


def test_reads_a_side_of_a_token_store(tmp_path, model):
    folder = tmp_path / "text"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i}.txt").write_text(text)
    side = prepare(str(folder), ByteTokenizer(), tmp_path / "store", held_out=0.5).eval
    score = score_documents(model, side)
    assert (score.documents, score.bytes) == (len(side), side.num_tokens)
