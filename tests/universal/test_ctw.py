import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmojo.errors import DataError
from bmojo.universal import ctw
from bmojo.universal.compiled import compiled
from bmojo.universal.ctw import CTW
from bmojo.universal.kt import KT, log2_kt


def all_strings(length):
    return np.array(list(itertools.product((0, 1), repeat=length)), dtype=np.uint8)


def kt_probability(bits):
    """The KT estimator, bit by bit."""
    counts, probability = [0, 0], 1.0
    for bit in bits:
        probability *= (counts[bit] + 0.5) / (sum(counts) + 1)
        counts[bit] += 1
    return probability


def trees(depth):
    """All context trees up to the depth, as lists of leaves, with their weights."""
    if depth == 0:
        return [([()], 1.0)]
    grown = [
        ([(0, *leaf) for leaf in left] + [(1, *leaf) for leaf in right], weight * other / 2)
        for (left, weight), (right, other) in itertools.product(trees(depth - 1), repeat=2)
    ]
    return [([()], 0.5), *grown]


def mixture(bits, depth):
    """Sum over all trees of the weight times the product over the leaves of KT of the bits that stand after them.

    A leaf is (last bit, the one before, ...); the past before the first bit is zeros.
    """
    past = (0,) * depth + tuple(bits)
    total = 0.0
    for leaves, weight in trees(depth):
        for leaf in leaves:
            after = [b for t, b in enumerate(bits) if past[t : t + depth][::-1][: len(leaf)] == leaf]
            weight *= kt_probability(after)
        total += weight
    return total


def sequential(model, x):
    p = model.probabilities(x)
    return np.log2(np.where(x == 1, p, 1 - p)).sum(axis=1)


def test_the_weights_of_trees_sum_to_one():
    assert len(trees(3)) == 26
    assert sum(weight for _, weight in trees(3)) == 1.0
    for leaves, weight in trees(3):
        assert weight == 2.0 ** -(len(leaves) - 1 + sum(len(leaf) < 3 for leaf in leaves))


@pytest.mark.parametrize("length", range(1, 11))
def test_ctw_is_the_mixture_over_all_trees(length):
    x = all_strings(length)
    expected = np.log2([mixture(bits, 3) for bits in x.tolist()])
    np.testing.assert_allclose(CTW(3).log2_probability(x), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(sequential(CTW(3), x), expected, rtol=0, atol=1e-12)


strings = st.integers(1, 5).flatmap(
    lambda rows: st.integers(1, 60).flatmap(
        lambda steps: st.lists(
            st.lists(st.integers(0, 1), min_size=steps, max_size=steps), min_size=rows, max_size=rows
        )
    )
)


@given(strings, st.integers(0, 12))
def test_block_and_both_sequential_forms_agree(rows, depth):
    x = np.array(rows, dtype=np.uint8)
    fast = CTW(depth).probabilities(x)
    assert fast.shape == x.shape
    assert fast.dtype == np.float64
    np.testing.assert_allclose(ctw._step_by_step(x, depth), fast, rtol=1e-12)
    np.testing.assert_allclose(sequential(CTW(depth), x), CTW(depth).log2_probability(x), rtol=1e-11)


def test_without_numba_the_same(monkeypatch):
    x = np.random.default_rng(0).integers(0, 2, (300, 20), dtype=np.uint8)
    fast = CTW(12).probabilities(x)
    monkeypatch.setattr(ctw, "HAS_NUMBA", False)  # takes the rows in two batches
    np.testing.assert_allclose(CTW(12).probabilities(x), fast, rtol=1e-12)


@given(strings)
def test_depth_zero_is_kt(rows):
    x = np.array(rows, dtype=np.uint8)
    np.testing.assert_allclose(CTW(0).probabilities(x), KT().probabilities(x), rtol=1e-15)
    np.testing.assert_allclose(KT().log2_probability(x), sequential(KT(), x), rtol=1e-12)


@pytest.mark.parametrize(("zeros", "ones"), [(0, 0), (1, 0), (1, 1), (2, 0), (3, 2), (0, 7)])
def test_closed_form_of_kt(zeros, ones):
    expected = kt_probability([0] * zeros + [1] * ones)
    assert 2 ** log2_kt(zeros, ones) == pytest.approx(expected, rel=1e-13)
    assert expected == pytest.approx({(1, 1): 1 / 8, (2, 0): 3 / 8}.get((zeros, ones), expected))


@pytest.mark.parametrize("model", [KT(), CTW(0), CTW(2), CTW(5)])
def test_probabilities_of_all_strings_sum_to_one(model):
    x = all_strings(8)
    assert np.exp2(model.log2_probability(x)).sum() == pytest.approx(1, abs=1e-12)
    assert np.exp2(sequential(model, x)).sum() == pytest.approx(1, abs=1e-12)


@st.composite
def tree_sources(draw):
    """A context tree up to depth 5 with a coin at every leaf, and a seed."""

    def grow(prefix):
        if len(prefix) == 5 or not draw(st.booleans()):
            return {prefix: draw(st.floats(0, 1))}
        return grow((*prefix, 0)) | grow((*prefix, 1))

    return grow(()), draw(st.integers(0, 2**32 - 1))


@given(tree_sources(), st.integers(1, 400))
def test_redundancy_bound(source, length):
    """For EVERY string: -log2 P(x) <= the code length of the best coins for the tree, plus the bound.

    Its terms: the weight of the tree, and KT's at most (log2 n) / 2 + 1 bits a leaf that is seen.
    """
    leaves, seed = source
    random = np.random.default_rng(seed)
    past, ideal = [0] * 5, 0.0
    counts = {leaf: [0, 0] for leaf in leaves}
    for _ in range(length):
        leaf = next(leaf for leaf in leaves if tuple(past[::-1][: len(leaf)]) == leaf)
        bit = int(random.random() < leaves[leaf])
        ideal -= np.log2(leaves[leaf] if bit else 1 - leaves[leaf])
        counts[leaf][bit] += 1
        past.append(bit)
    x = np.array([past[5:]], dtype=np.uint8)
    weight = len(leaves) - 1 + sum(len(leaf) < 5 for leaf in leaves)
    seen = sum(np.log2(sum(n)) / 2 + 1 for n in counts.values() if sum(n))
    length_of_code = -CTW(5).log2_probability(x)[0]
    assert length_of_code <= ideal + weight + seen + 1e-9
    k = len(leaves)  # the bound as it is usually quoted, looser
    assert length_of_code <= ideal + 2 * k - 1 + k / 2 * max(0, np.log2(length / k)) + k + 1e-9


def test_long_strings_stay_finite():
    x = np.concatenate([np.zeros((1, 20_000)), np.tile([0, 1], 5_000)[None]], axis=1).astype(np.uint8)
    p = CTW(8).probabilities(x)
    assert np.isfinite(p).all()
    assert 0 < p.min() < p.max() < 1
    assert -sequential(CTW(8), x)[0] < 150


@pytest.mark.parametrize("model", [KT(), CTW(3)])
def test_no_bits(model):
    assert model.probabilities(np.zeros((2, 0), np.uint8)).shape == (2, 0)
    np.testing.assert_array_equal(model.log2_probability(np.zeros((2, 0), np.uint8)), [0, 0])
    assert model.probabilities(np.zeros((0, 3), np.uint8)).shape == (0, 3)


@pytest.mark.parametrize("model", [KT(), CTW(3)])
@pytest.mark.parametrize("x", [[0, 1, 1], [[0, 2]], [["a"]], [[-1]], [[0.5]]])
def test_other_input_is_refused(model, x):
    with pytest.raises(DataError, match="bits must"):
        model.probabilities(np.array(x))


@pytest.mark.parametrize("depth", [-1, 21])
def test_other_depths_are_refused(depth):
    with pytest.raises(DataError, match=rf"0 to 20.*{depth}"):
        CTW(depth)


def test_loops_are_compiled_where_nothing_can_be_kept(monkeypatch):
    """As for a user who may write neither the package's folder nor a cache of their own."""
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])

    def twice(x):
        return 2 * x

    assert compiled(twice)(21) == 42
