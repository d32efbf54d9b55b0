"""Context tree weighting on bytes, as a coder of files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmojo.errors import DataError
from bmojo.universal.arithmetic import TOTAL, Decoder, Encoder, next_slot, put_symbol, take_symbol
from bmojo.universal.compiled import compiled, uses_numba

MAX_DEPTH = 6  # bytes: what a node is known by must fit in 63 bits
_SIZES = (65_537, 1_048_573, 4_194_301, 16_777_213)  # nodes of a table: primes, as they are found by a remainder
_NODES_A_BYTE = 12  # about three times what text needs
_BUCKET = 4
_NODE = np.dtype([("key", np.int64), ("ratio", np.float32), ("counts", np.uint16, 2)])
_FAR = 2.0**30
_PIECE = 1 << 16


class ByteCTW:
    """Context tree weighting on bytes, each coded as 8 binary decisions, its high bit first.

    Every decision, known by the bits of its byte before it, has a context tree of its own, whose contexts are the last
    0, 1, ... `depth` whole bytes, zeros before the first:

        p(s) = (r kt(s) + p(child)) / (r + 1),    r = P_kt(s) / P_w(children of s), so far;  at the depth, p = kt

    with kt = (n_1 + prior) / (n_0 + n_1 + 2 prior), KT at the default. Depth 0 is KT for every decision: order 0.
    Exact but for this: r is kept in float32 and within [2^-30, 2^30], and counts are halved at 65,535. Nodes lie in a
    table, 16 bytes each, at most 270 MB, in which four can be found at one place; where more meet, which is rare below
    a megabyte, the one least seen begins anew. Only sums, products and quotients are taken, so every machine makes the
    same code, with numba or without it (100 times slower).
    Source: Willems, Shtarkov and Tjalkens 1995; Tjalkens, Volf and Willems 1997 for bytes.
    """

    def __init__(self, depth: int = MAX_DEPTH, prior: float = 0.5) -> None:
        if not 0 <= depth <= MAX_DEPTH:
            raise DataError(f"the depth of CTW on bytes must be 0 to {MAX_DEPTH}, got {depth}")
        if not 0 < prior <= 1:
            raise DataError(f"the prior count must be in (0, 1], got {prior}")
        self.depth, self.prior = depth, prior

    @property
    def record(self) -> dict[str, Any]:
        """What a file is to say of its coder."""
        return {"name": "ctw", "depth": self.depth, "prior": self.prior}

    def encode(self, data: bytes, on_bytes: Callable[[int], Any] = lambda done: None) -> bytes:
        """The code of `data`; `on_bytes` is told now and then how many are done."""
        coder = Encoder()
        self._run(np.frombuffer(bytearray(data), np.uint8), coder, True, on_bytes)
        return coder.finish()

    def decode(self, code: bytes, length: int, on_bytes: Callable[[int], Any] = lambda done: None) -> bytes:
        """The `length` bytes of a code; if it is damaged, other bytes."""
        values = np.zeros(length, np.uint8)
        self._run(values, Decoder(code), False, on_bytes)
        return values.tobytes()

    def _run(
        self, values: NDArray[np.uint8], coder: Encoder | Decoder, encoding: bool, on_bytes: Callable[[int], Any]
    ) -> None:
        if len(values) > _PIECE:
            uses_numba("CTW")
        size = next((size for size in _SIZES if size >= _NODES_A_BYTE * len(values)), _SIZES[-1])
        table = np.zeros(size + _BUCKET - 1, _NODE)
        nodes, past = (table["key"], table["ratio"], table["counts"]), np.zeros(1, np.int64)
        for start in range(0, len(values), _PIECE):
            piece = values[start : start + _PIECE]
            code = coder.code(8 * len(piece)) if isinstance(coder, Encoder) else coder.code
            _code_bytes(*nodes, self.depth, self.prior, past, piece, coder.coder, code, encoding)
            on_bytes(start + len(piece))


@compiled
def _node(key, keys, ratios, counts):
    """Where the node of that key lies: in its bucket, or else, new, in place of the one least seen there."""
    first = key % (len(keys) - _BUCKET + 1)
    least, place = 1 << 17, first
    for at in range(first, first + _BUCKET):
        if keys[at] == key:
            return at
        seen = int(counts[at, 0]) + int(counts[at, 1])
        if seen < least:
            least, place = seen, at
    keys[place], ratios[place] = key, 1.0
    counts[place, 0] = counts[place, 1] = 0
    return place


@compiled
def _code_bytes(keys, ratios, counts, depth, prior, past, values, coder, code, encoding):
    """Encode `values`, or decode into them; past: the last bytes as a number, the last one lowest."""
    path = np.empty(depth + 1, np.int64)
    own = np.empty(depth + 1)  # of a one, by each node of the path alone
    below = np.empty(depth + 1)  # and by its child
    for i in range(len(values)):
        bits = 1  # those of this byte so far, after a one
        for place in range(7, -1, -1):
            p = 0.0
            for level in range(depth, -1, -1):
                context = past[0] & ((1 << 8 * level) - 1)
                at = _node((context << 3 | level) << 8 | bits, keys, ratios, counts)
                zeros, ones = int(counts[at, 0]), int(counts[at, 1])
                path[level], own[level], below[level] = at, (ones + prior) / (zeros + ones + 2 * prior), p
                r = float(ratios[at])
                p = own[level] if level == depth else (r * own[level] + p) / (r + 1)
            size = 1 + int(p * (TOTAL - 2))
            if encoding:
                bit = int(values[i]) >> place & 1
                put_symbol(coder, code, 0 if bit else size, size if bit else TOTAL - size)
            else:
                bit = 1 if next_slot(coder) < size else 0
                take_symbol(coder, code, 0 if bit else size, size if bit else TOTAL - size)
            for level in range(depth + 1):
                at = path[level]
                if level < depth:
                    gain = own[level] / below[level] if bit else (1 - own[level]) / (1 - below[level])
                    ratios[at] = min(max(float(ratios[at]) * gain, 1 / _FAR), _FAR)
                counts[at, bit] += 1
                if counts[at, bit] == 65535:
                    counts[at, 0] >>= 1
                    counts[at, 1] >>= 1
            bits = bits << 1 | bit
        values[i] = bits & 255
        past[0] = (past[0] << 8 | (bits & 255)) & ((1 << 8 * MAX_DEPTH) - 1)
