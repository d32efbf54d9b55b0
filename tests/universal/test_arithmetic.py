import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmojo.errors import DataError
from bmojo.universal.arithmetic import BITS, TOTAL, Decoder, Encoder, quantise


def adaptive(symbols, seed, extreme):
    """Frequencies that depend on what came before, as a model's do: a random function of the last two symbols."""

    def predict(past):
        random = np.random.default_rng([seed, *past[-2:]])
        return quantise(random.dirichlet(np.full(symbols, 10.0**extreme)))

    return predict


def encode(data, predict):
    encoder, ideal = Encoder(), 0.0
    for t, symbol in enumerate(data):
        frequencies = predict(data[:t])
        ideal += BITS - np.log2(frequencies[symbol])
        encoder.put(frequencies[None], np.array([symbol]))
    return encoder.finish(), encoder.bits, ideal


def decode(code, length, predict):
    decoder, data = Decoder(code), []
    for _ in range(length):
        data.append(int(decoder.take(predict(data)[None])[0]))
    return data


@given(
    st.integers(1, 300).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1), max_size=40), st.integers(-2, 2))
    ),
    st.integers(0, 2**32 - 1),
)
def test_round_trip_and_length(case, seed):
    symbols, data, extreme = case
    predict = adaptive(symbols, seed, extreme)
    code, bits, ideal = encode(data, predict)
    assert decode(code, len(data), predict) == data
    assert bits <= ideal + 2
    assert len(code) <= -(-bits // 8)


@given(st.lists(st.booleans(), max_size=300), st.integers(1, TOTAL - 1), st.integers(0, 3))
def test_extreme_probabilities(data, first, spread):
    """Binary symbols of which one may have a single unit of TOTAL: carries run through long rows of 255."""
    first = [1, first, TOTAL - 1, TOTAL // 2][spread]
    frequencies = np.tile([[first, TOTAL - first]], (len(data), 1))
    encoder = Encoder()
    encoder.put(frequencies, np.array(data, dtype=np.int64))
    code = encoder.finish()
    np.testing.assert_array_equal(Decoder(code).take(frequencies), data)
    ideal = BITS * len(data) - np.log2(frequencies[range(len(data)), np.array(data, int)]).sum()
    assert encoder.bits <= ideal + 2


def test_a_carry_runs_to_the_first_byte():
    """The interval closes in on 1/2: what is written is 0.0111...1 until the last symbol makes it 0.1000...0."""
    frequencies = np.tile([[TOTAL // 2 - 1, 2, TOTAL // 2 - 1]], (200, 1))
    for last in (0, 1, 2):
        symbols = np.array([1] * 199 + [last])
        encoder = Encoder()
        encoder.put(frequencies, symbols)
        np.testing.assert_array_equal(Decoder(encoder.finish()).take(frequencies), symbols)


def test_nothing_is_no_bytes():
    assert Encoder().finish() == b""
    assert Decoder(b"").take(np.zeros((0, 4), np.int64)).shape == (0,)


def test_certain_symbols_cost_nothing():
    frequencies = np.full((1000, 1), TOTAL)
    encoder = Encoder()
    encoder.put(frequencies, np.zeros(1000, int))
    assert encoder.finish() == b""
    assert encoder.bits == 0


@given(st.integers(1, 400), st.integers(0, 2**32 - 1), st.integers(-3, 2))
def test_quantisation(symbols, seed, extreme):
    p = np.random.default_rng(seed).dirichlet(np.full(symbols, 10.0**extreme), size=3)
    frequencies = quantise(p)
    assert frequencies.dtype == np.int64
    assert (frequencies.sum(-1) == TOTAL).all()
    assert frequencies.min() >= 1
    loss = np.log2(p[p > 0]) - np.log2(frequencies[p > 0] / TOTAL)
    assert loss.max() <= -np.log2(1 - symbols / TOTAL) + 1e-9


@pytest.mark.parametrize("p", [[0.5, 0.6], [0.5, np.nan], [-0.1, 1.1], [0.2, 0.2], [np.inf, 0], []])
def test_what_are_no_probabilities_is_refused(p):
    with pytest.raises(DataError, match="the coder takes"):
        quantise(p)


@given(st.binary(max_size=60), st.integers(0, 100))
def test_any_bytes_decode_to_something(code, seed):
    """Damage is for a checksum to find; the decoder neither fails nor reads beyond its code."""
    frequencies = quantise(np.random.default_rng(seed).dirichlet(np.full(256, 0.1), size=200))
    symbols = Decoder(code).take(frequencies)
    assert 0 <= symbols.min() <= symbols.max() < 256


@pytest.mark.slow
def test_ten_megabytes():
    """With the order-0 counts so far, in blocks: within 2 bits of the sum of -log2 q, and back."""
    random = np.random.default_rng(0)
    drift = np.linspace(0, 60, 10_000_000)
    data = np.clip(random.normal(60 + drift, 25), 0, 255).astype(np.int64)
    blocks = np.array_split(data, 2_000)

    def predict(counts, rows):
        return np.broadcast_to(quantise(counts / counts.sum()), (rows, 256))

    encoder, ideal, counts = Encoder(), 0.0, np.full(256, 0.5)
    for block in blocks:
        frequencies, seen = predict(counts, len(block)), np.bincount(block, minlength=256)
        encoder.put(frequencies, block)
        ideal += float(seen @ (BITS - np.log2(frequencies[0])))
        counts += seen
    code = encoder.finish()
    assert ideal - 8 <= encoder.bits <= ideal + 2
    assert len(code) <= -(-encoder.bits // 8)
    decoder, counts = Decoder(code), np.full(256, 0.5)
    for block in blocks:
        np.testing.assert_array_equal(decoder.take(predict(counts, len(block))), block)
        counts += np.bincount(block, minlength=256)
