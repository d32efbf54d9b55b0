"""Arithmetic coding in integers: what a model finds probable becomes short, bit for bit, and comes back.

A code is a number in [0, 1), written in bytes. Of the interval that is left, the next symbol s of frequencies f takes

    width // TOTAL * [f_0 + ... + f_(s-1),  f_0 + ... + f_s)         from its low end

so the last interval is as wide as the product of all f_s / TOTAL, less a share of at most 2^-30 a symbol by rounding
down. The number taken in it is the one that ends first, so a code has at most one bit more than -log2 of that width,
and less than 2 bits more than the symbols' sum of -log2 (f_s / TOTAL) up to 700 million of them. Who decodes must know
how many symbols there are.
Source: Rissanen 1976; with a low end and a width, and carries into what was written, Martin 1979.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bmojo.errors import DataError
from bmojo.universal.compiled import compiled

BITS = 24
TOTAL = 1 << BITS  # what frequencies sum to
_LOW, _WIDTH, _AT = 0, 1, 2  # of a coder: the low end (decoding: the code above the low end), the width, bytes so far
_WINDOW = 62  # binary places after the bytes so far: sums and products of the two stay below 2^63
_SPARE = 8  # bytes behind a code that may be touched


def quantise(p: ArrayLike) -> NDArray[np.int64]:
    """Frequencies [..., symbols] that sum to TOTAL, each at least 1, of probabilities [..., symbols].

    f_s = 1 + floor(p_s (TOTAL - symbols)), and what is left goes to the most probable symbol, the first of several. So
    a symbol costs at most -log2(1 - symbols / TOTAL) bits more than -log2 p_s (2.2e-5 for 256 symbols), and never more
    than BITS. Raises DataError for what are no probabilities.
    """
    p = np.asarray(p, dtype=np.float64)
    symbols = p.shape[-1]
    if not 1 <= symbols <= TOTAL // 2:
        raise DataError(f"the coder takes 1 to {TOTAL // 2:,} symbols, got {symbols:,}")
    if not (np.isfinite(p).all() and (p >= 0).all() and (np.abs(p.sum(-1) - 1) < 1e-6).all()):
        raise DataError("the coder takes probabilities, finite, at least 0 and of sum 1; the model predicts others")
    frequencies = 1 + (p / np.maximum(p.sum(-1, keepdims=True), 1) * (TOTAL - symbols)).astype(np.int64)
    most = p.argmax(-1, keepdims=True)
    left = TOTAL - frequencies.sum(-1, keepdims=True)
    np.put_along_axis(frequencies, most, np.take_along_axis(frequencies, most, -1) + left, -1)
    return frequencies


class Encoder:
    """`put` any number of times, then `finish`."""

    def __init__(self) -> None:
        self.coder = np.array([0, 1 << _WINDOW, 0], np.int64)
        self._code = np.zeros(1 << 12, np.uint8)
        self.bits = 0

    def put(self, frequencies: NDArray[np.int64], symbols: NDArray[np.integer]) -> None:
        """Code symbols [n], each by its row of frequencies [n, symbols], as `quantise` gives them."""
        _put_all(self.coder, self.code(len(symbols)), frequencies, symbols)

    def code(self, symbols: int) -> NDArray[np.uint8]:
        """Where the code is written, with room for so many more symbols."""
        needed = int(self.coder[_AT]) + symbols * (BITS // 8 + 1) + _SPARE
        if len(self._code) < needed:
            self._code = np.concatenate([self._code, np.zeros(needed, np.uint8)])
        return self._code

    def finish(self) -> bytes:
        """The code: `bits` bits, then zeros to a whole byte; of zeros at the end, any number may be left out."""
        low, width, at = map(int, self.coder)
        zeros = next(n for n in range(_WINDOW, -1, -1) if _ceil(low, n) < low + width)
        self.bits = 8 * at + _WINDOW - zeros
        number = (int.from_bytes(self._code[:at].tobytes(), "big") << _WINDOW) + _ceil(low, zeros)
        size = -(-self.bits // 8)
        return (number << 8 >> (8 * at + _WINDOW + 8 - 8 * size)).to_bytes(size, "big").rstrip(b"\0")


class Decoder:
    """What `put` was given, by the same frequencies. A code that is damaged gives other symbols: nothing tells."""

    def __init__(self, code: bytes) -> None:
        self.code = np.frombuffer(bytearray(code + bytes(2 * _SPARE)), np.uint8)
        first = int.from_bytes(self.code[:8].tobytes(), "big") >> (64 - _WINDOW)
        self.coder = np.array([first, 1 << _WINDOW, 0], np.int64)

    def take(self, frequencies: NDArray[np.int64]) -> NDArray[np.int64]:
        """The next symbols [n] by frequencies [n, symbols]."""
        symbols = np.empty(len(frequencies), np.int64)
        _take_all(self.coder, self.code, frequencies, symbols)
        return symbols


def _ceil(number: int, zeros: int) -> int:
    """`number` rounded up to so many binary zeros at its end."""
    return -(-number >> zeros) << zeros


@compiled
def put_symbol(coder, code, start, size):
    """Narrow the interval of an `Encoder` to the symbol of frequencies [start, start + size) of TOTAL."""
    unit = coder[_WIDTH] >> BITS
    coder[_LOW] += unit * start
    coder[_WIDTH] = unit * size
    if coder[_LOW] >> _WINDOW:
        coder[_LOW] -= 1 << _WINDOW
        carry = coder[_AT] - 1
        while code[carry] == 255:
            code[carry] = 0
            carry -= 1
        code[carry] += 1
    while coder[_WIDTH] >> (_WINDOW - 8) == 0:
        code[coder[_AT]] = coder[_LOW] >> (_WINDOW - 8)
        coder[_LOW] = (coder[_LOW] & ((1 << (_WINDOW - 8)) - 1)) << 8
        coder[_WIDTH] <<= 8
        coder[_AT] += 1


@compiled
def next_slot(coder):
    """Of a `Decoder`: a number in [0, TOTAL) that lies in the frequencies of the next symbol."""
    return min(coder[_LOW] // (coder[_WIDTH] >> BITS), TOTAL - 1)


@compiled
def take_symbol(coder, code, start, size):
    """The inverse of `put_symbol`, on a `Decoder`."""
    unit = coder[_WIDTH] >> BITS
    coder[_WIDTH] = unit * size
    coder[_LOW] = min(coder[_LOW] - unit * start, coder[_WIDTH] - 1)  # a damaged code may lie above
    while coder[_WIDTH] >> (_WINDOW - 8) == 0:
        # the next 8 places begin in the last bits of one byte: 62 is no multiple of 8
        at = min(coder[_AT] + 7, len(code) - 2)
        coder[_LOW] = coder[_LOW] << 8 | (int(code[at]) << 6 | int(code[at + 1]) >> 2) & 255
        coder[_WIDTH] <<= 8
        coder[_AT] += 1


@compiled
def _put_all(coder, code, frequencies, symbols):
    for i in range(len(symbols)):
        symbol = symbols[i]
        put_symbol(coder, code, frequencies[i, :symbol].sum(), frequencies[i, symbol])


@compiled
def _take_all(coder, code, frequencies, symbols):
    for i in range(len(symbols)):
        bounds = np.cumsum(frequencies[i])
        symbol = np.searchsorted(bounds, next_slot(coder), side="right")
        size = frequencies[i, symbol]
        take_symbol(coder, code, bounds[symbol] - size, size)
        symbols[i] = symbol
