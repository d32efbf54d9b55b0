"""Files in as few bytes as a model finds them probable, and back, bit for bit.

    packed = compress(data, LanguageModel(model, tokenizer))       # or ByteCTW()
    data = decompress(packed, LanguageModel(model, tokenizer))

    file:  b"bmz", version u8, length of the head u32, head (JSON in zlib), code, CRC32C of all that u32 (little-endian)
    head:  length and CRC32C of the data, length of the code, what the coder says of itself

Whatever is wrong is said: of a file that is damaged, cut off or of another model before it is decoded, and of data that
come out otherwise than they went in by their own checksum.
"""

from __future__ import annotations

import json
import platform
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from google_crc32c import value as crc32c
from numpy.typing import NDArray

from bmojo.errors import CompressionError
from bmojo.universal.arithmetic import Decoder, Encoder, quantise
from bmojo.universal.byte_ctw import ByteCTW

if TYPE_CHECKING:
    from bmojo.data.tokenizers import Tokenizer
    from bmojo.nn.model import BMojoLM

MAGIC, VERSION = b"bmz", 1
STREAMS, SHORTEST = 64, 2048  # streams of a file at most, and tokens of one at least
_FRAME = struct.Struct("<3sBI")
_CRC = struct.Struct("<I")
_LONGEST = 1 << 16  # a head, in bytes: what a damaged one may say must not fill the memory
_USUAL = (  # what zlib knows of heads
    b'{"length":,"crc32c":,"code":,"coder":{"name":"ctw","depth":6,"prior":0.5}}{"name":"bmojo","fingerprint":"",'
    b'"tokenizer":"bytes","streams":64,"context":null,"computed":{"torch":"2.13.0+cpu","processor":"x86_64 AVX512",'
    b'"device":"cpu","kernels":true,"precision":"highest","threads":1}}}'
)
_PARTS = struct.Struct("<4I")  # of a model's code: tokens, pieces, bytes that are no text, and of the code of both
_NO_TOKENS = np.zeros(0, np.int64)
# bytes that are no UTF-8, and the text between them where it is short
_NO_TEXT = re.compile("([\udc80-\udcff]+(?:[^\udc80-\udcff]{1,15}[\udc80-\udcff]+)*)")

OnBytes = Callable[[int], Any]


def _untold(done: int) -> None: ...


class Coder(Protocol):
    """Bytes to a code and back. record: what it is; all of it but "computed" must be equal where it decodes."""

    @property
    def record(self) -> dict[str, Any]: ...
    def encode(self, data: bytes, on_bytes: OnBytes = _untold) -> bytes: ...
    def decode(self, code: bytes, length: int, on_bytes: OnBytes = _untold) -> bytes: ...


def compress(data: bytes, coder: Coder, on_bytes: OnBytes = _untold) -> bytes:
    """The file of `data`; `on_bytes` is told now and then how many bytes are done."""
    code = coder.encode(data, on_bytes)
    head = {"length": len(data), "crc32c": crc32c(data), "code": len(code), "coder": coder.record}
    squeeze = zlib.compressobj(9, zdict=_USUAL)
    text = squeeze.compress(json.dumps(head, separators=(",", ":")).encode()) + squeeze.flush()
    whole = _FRAME.pack(MAGIC, VERSION, len(text)) + text + code
    return whole + _CRC.pack(crc32c(whole))


def read_head(packed: bytes) -> tuple[dict[str, Any], bytes]:
    """The head and the code of a file. Raises CompressionError unless it is whole."""
    if len(packed) < _FRAME.size or not packed.startswith(MAGIC):
        raise CompressionError("this is no file of `bmojo compress`, or its beginning is lost")
    _, version, size = _FRAME.unpack_from(packed)
    if version > VERSION:
        raise CompressionError(f"the file has format {version}, this bmojo reads up to {VERSION}; update bmojo")
    try:
        head = json.loads(
            zlib.decompressobj(zdict=_USUAL).decompress(packed[_FRAME.size : _FRAME.size + size], _LONGEST)
        )
        expected = _FRAME.size + size + head["code"] + _CRC.size
    except (zlib.error, ValueError, KeyError, TypeError):
        raise CompressionError("the file is damaged or cut off within its head; get it again") from None
    if len(packed) < expected:
        raise CompressionError(f"the file is cut off: expected {expected:,} bytes, got {len(packed):,}; get it again")
    if len(packed) > expected or crc32c(packed[: -_CRC.size]) != _CRC.unpack(packed[-_CRC.size :])[0]:
        raise CompressionError("the file is damaged: its checksum does not fit; get it again")
    return head, packed[_FRAME.size + size : -_CRC.size]


def decompress(packed: bytes, coder: Coder, on_bytes: OnBytes = _untold) -> bytes:
    """The data of a file, by the coder that made it; never others.

    Raises CompressionError if the file is damaged or was made by another coder, or if the data do not come out as they
    were, because another torch or processor rounds otherwise; that this may be is warned of first.
    """
    head, code = read_head(packed)
    made, here = dict(head["coder"]), dict(coder.record)
    computed, computes = made.pop("computed", {}), here.pop("computed", {})
    for name in sorted(made.keys() | here.keys()):
        if made.get(name) != here.get(name):
            raise CompressionError(
                f"the file was made by another coder: its {name} is {made.get(name)}, that of this one "
                f"{here.get(name)}; give the one that it was made by"
            )
    other = ", ".join(f"{k} {v} (here {computes.get(k)})" for k, v in computed.items() if computes.get(k) != v)
    if other:
        warnings.warn(f"the file was made with {other}: it may not come out, which would be said", stacklevel=2)
    data = coder.decode(code, head["length"], on_bytes)
    if crc32c(data) != head["crc32c"]:
        how = f"the file was made with {other}" if other else "the file is whole, but this machine rounds otherwise"
        raise CompressionError(f"the data did not come out as they were: {how}; decompress it where it was made")
    return data


class LanguageModel:
    """A trained model as a coder of files: what it says of the next token is what the token is coded by.

    tokenizer: of text; left out, bytes are tokens. What is not its text (bytes that are no UTF-8, and lines that it
    does not give back as they were) is coded by `ByteCTW`, with the lengths of the pieces.
    The tokens are cut into up to `streams` streams of equal length that the model reads as one batch, a token of each
    at a time, each from an empty memory: many are fast, few cost fewer bytes. context: the memory is emptied after
    every so many tokens of a stream, too. threads: of torch, while it codes; left out, as many as it has.

    Both sides take the same steps, in the same batch, on as many threads, and so come to the same frequencies, bit by
    bit. Another torch, processor or device may round otherwise: `record["computed"]` tells what it was.
    Raises CompressionError for settings out of range and a tokenizer that is not the model's.
    """

    def __init__(
        self,
        model: BMojoLM,
        tokenizer: Tokenizer | None = None,
        *,
        streams: int = STREAMS,
        context: int | None = None,
        threads: int | None = None,
    ) -> None:
        if streams < 1 or (context is not None and context < 1):
            raise CompressionError(f"streams and context must be at least 1, got {streams} and {context}")
        expected, has = model.config.vocab_size, 256 if tokenizer is None else tokenizer.vocab_size
        if has > expected or (tokenizer is None and has < expected):
            name = "bytes" if tokenizer is None else f"the tokenizer {tokenizer.name}"
            raise CompressionError(f"the model has {expected} tokens, {name} {has}; give the tokenizer of its training")
        self.model, self.tokenizer, self.streams, self.context = model, tokenizer, streams, context
        self.threads = torch.get_num_threads() if threads is None else threads

    @property
    def record(self) -> dict[str, Any]:
        """What a file is to say of its coder."""
        return {
            "name": "bmojo",
            "fingerprint": self.model.fingerprint(),
            "tokenizer": "bytes" if self.tokenizer is None else self.tokenizer.sha256[:16],
            "streams": self.streams,
            "context": self.context,
            "computed": {
                "torch": torch.__version__,
                "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
                "device": self.model.embed.weight.device.type,
                "kernels": _has_kernels(),
                "precision": torch.get_float32_matmul_precision(),
                "threads": self.threads,
            },
        }

    def encode(self, data: bytes, on_bytes: OnBytes = _untold) -> bytes:
        if len(data) >= 2**32:
            raise CompressionError(f"a model takes files below 4 GiB, got {len(data):,} bytes; cut it")
        pieces = list(split(data, self.tokenizer))
        texts = [piece for piece in pieces if not isinstance(piece, bytes)]
        lengths = np.array([-len(p) if isinstance(p, bytes) else len(p) for p in pieces], "<i8")
        raw = b"".join(piece for piece in pieces if isinstance(piece, bytes))
        ids, beside, coder = np.concatenate([_NO_TOKENS, *texts]), ByteCTW().encode(lengths.tobytes() + raw), Encoder()
        self._run(ids, coder, lambda done: on_bytes(done * len(data) // len(ids)))
        return _PARTS.pack(len(ids), len(lengths), len(raw), len(beside)) + beside + coder.finish()

    def decode(self, code: bytes, length: int, on_bytes: OnBytes = _untold) -> bytes:
        tokens, pieces, raw, size = _PARTS.unpack_from(code)
        start = _PARTS.size + size
        beside, ids = ByteCTW().decode(code[_PARTS.size : start], 8 * pieces + raw), np.zeros(tokens, np.int64)
        self._run(ids, Decoder(code[start:]), lambda done: on_bytes(done * length // tokens))
        data, token, other = [], 0, 8 * pieces
        for n in np.frombuffer(beside[: 8 * pieces], "<i8").tolist():
            data.append(to_bytes(ids[token : token + n], self.tokenizer) if n > 0 else beside[other : other - n])
            token, other = token + max(n, 0), other - min(n, 0)
        return b"".join(data)

    @torch.inference_mode()
    def _run(self, ids: NDArray[np.int64], coder: Encoder | Decoder, on_tokens: OnBytes) -> None:
        """Encode the tokens, or decode into them."""
        streams = min(self.streams, max(1, len(ids) // SHORTEST))
        steps, size = -(-len(ids) // streams), self.model.config.vocab_size
        frequencies = quantise(np.full((streams, size), 1 / size))
        state = self.model.empty_state(streams)
        with _threads(self.threads):
            for t in range(steps):
                at = np.arange(t, len(ids), steps)  # of the last streams some may have ended
                if isinstance(coder, Encoder):
                    coder.put(frequencies[: len(at)], ids[at])
                else:
                    ids[at] = coder.take(frequencies[: len(at)])
                if self.context is not None and t % self.context == 0:
                    state = self.model.empty_state(streams)
                tokens = torch.from_numpy(np.pad(ids[at], (0, streams - len(at)))).to(state.position.device)
                logits, state = self.model(tokens[:, None], state, donate=True)
                frequencies = quantise(logits[:, 0].double().softmax(-1).cpu().numpy())
                on_tokens(min(len(ids), (t + 1) * streams))


def split(data: bytes, tokenizer: Tokenizer | None) -> Iterator[NDArray[np.int64] | bytes]:
    """The data in pieces, in order: tokens where they are text that the tokenizer gives back, else bytes.

    Without a tokenizer bytes are tokens.
    """
    if tokenizer is None:
        yield np.frombuffer(data, np.uint8).astype(np.int64)
        return
    for i, part in enumerate(_NO_TEXT.split(data.decode("utf-8", "surrogateescape"))):
        if i % 2:
            yield part.encode("utf-8", "surrogateescape")
        elif part:
            yield from _tokens(part, tokenizer)


def _tokens(text: str, tokenizer: Tokenizer) -> Iterator[NDArray[np.int64] | bytes]:
    ids = tokenizer.encode(text)
    if tokenizer.decode(ids) == text:
        yield ids.astype(np.int64)
        return
    middle = len(text) // 2
    cut = text.find("\n", middle, -1) + 1 or text.rfind("\n", 0, middle) + 1
    if not cut:
        yield text.encode()
        return
    yield from _tokens(text[:cut], tokenizer)
    yield from _tokens(text[cut:], tokenizer)


def to_bytes(ids: NDArray[np.int64], tokenizer: Tokenizer | None) -> bytes:
    """Of one piece of `split`."""
    return ids.astype(np.uint8).tobytes() if tokenizer is None else tokenizer.decode(ids).encode()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _has_kernels() -> bool:
    """Whether one token is computed in C++ here: it rounds otherwise."""
    try:
        import bmojo.ops.step_cpu  # noqa: F401
    except ImportError:
        return False
    return True
