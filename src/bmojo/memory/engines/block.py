"""A block of tokens as it is stored: what a layer will need to attend to it again, and what it is found by.

    frame:  b"bmjB", version u8, session u24, length of the body u32, CRC32C of the body u32, body       (little-endian)
    body:   length of the head u32, head (JSON: all that is no array), then the arrays, each from a multiple of 16 bytes

A frame says by itself whether it is whole, so what is left of a damaged file can be told from what is not. Of two
frames with one id the one of the later session (a number that an engine may give) is valid: the other was never
acknowledged.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from google_crc32c import value as crc32c

from bmojo.errors import StoreError

MAGIC = b"bmjB"
VERSION = 1
_FRAME = struct.Struct("<4s4sII")
_ARRAYS = ("tokens", "k", "v", "keys", "score")


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive tokens of one source, as one layer keeps them.

    tokens  int32 [n], and `start`, the position of the first in `source`
    k, v    [n, kv_heads, head_dim], float16 or float32: keys before their rotation, and values
    keys    [r, dim], the dtype of k: what the block is found by, by inner product with a query; at least one
    score   float32 [n]: the innovation of each token
    fingerprint   of the weights that made it
    id      given by the engine: later blocks have higher ones; -1: not stored yet
    """

    layer: int
    source: str
    start: int
    tokens: np.ndarray
    k: np.ndarray
    v: np.ndarray
    keys: np.ndarray
    score: np.ndarray
    fingerprint: str = ""
    id: int = -1

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in _ARRAYS)


def encode(block: Block, *, session: int = 0) -> bytes:
    """The frame of a block."""
    head: dict[str, Any] = {name: getattr(block, name) for name in ("layer", "source", "start", "fingerprint", "id")}
    arrays = {name: np.ascontiguousarray(getattr(block, name)) for name in _ARRAYS}
    head["arrays"] = {name: [array.dtype.str, list(array.shape)] for name, array in arrays.items()}
    text = json.dumps(head, separators=(",", ":")).encode()
    body = bytearray(struct.pack("<I", len(text)) + text)
    for array in arrays.values():
        body += bytes(-len(body) % 16)
        body += array.tobytes()
    return seal(bytes(body), session=session)


def decode(data: bytes | memoryview, *, check: bool = True) -> Block:
    """The block in a frame; its arrays are views of `data`. Raises StoreError unless the frame is whole, which `check`
    makes sure of by its checksum."""
    body = unseal(data, check=check)
    (text,) = struct.unpack_from("<I", body)
    fields, at = json.loads(bytes(body[4 : 4 + text])), 4 + text
    for name, (dtype, shape) in fields.pop("arrays").items():
        at += -at % 16
        fields[name] = np.frombuffer(body, dtype, int(np.prod(shape)), at).reshape(shape)
        at += fields[name].nbytes
    return Block(**fields)


def with_id(block: Block, number: int) -> Block:
    return replace(block, id=number)


# frames of any content


def seal(body: bytes, *, magic: bytes = MAGIC, session: int = 0) -> bytes:
    """`body` in a frame."""
    return _FRAME.pack(magic, (VERSION | session % 2**24 << 8).to_bytes(4, "little"), len(body), crc32c(body)) + body


def unseal(data: bytes | memoryview, *, magic: bytes = MAGIC, check: bool = True) -> memoryview:
    """The body of the frame that `data` begins with. Raises StoreError unless it is whole."""
    length = frame_length(data, magic=magic)
    if length is None or length > len(data):
        raise StoreError(f"a stored block is damaged: {'no frame' if length is None else 'cut off'}")
    _, version, size, checksum = _FRAME.unpack_from(data)
    if version[0] > VERSION:
        raise StoreError(f"a stored block has format {version[0]}, this bmojo reads up to {VERSION}; update bmojo")
    body = memoryview(data)[_FRAME.size : _FRAME.size + size]
    if check and crc32c(bytes(body)) != checksum:
        raise StoreError("a stored block is damaged: its checksum does not fit")
    return body


def frame_length(data: bytes | memoryview, *, magic: bytes = MAGIC) -> int | None:
    """Bytes of the frame that `data` begins with, by its own account; None if no frame begins there."""
    if len(data) < _FRAME.size or bytes(data[: len(magic)]) != magic:
        return None
    return _FRAME.size + _FRAME.unpack_from(data)[2]


def frame_session(data: bytes | memoryview) -> int:
    return int.from_bytes(_FRAME.unpack_from(data)[1], "little") >> 8
