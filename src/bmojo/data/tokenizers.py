"""Text to token ids and back: UTF-8 bytes, or a `tokenizers` JSON file."""

from __future__ import annotations

import codecs
import hashlib
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bmojo.data.documents import Document
from bmojo.errors import CheckpointError, DataError, nearest
from bmojo.files import write_whole

TOKENIZER = "tokenizer.json"
LEVELS = 3  # runs/compare/NAME/tokenizer.json is that of runs/compare/NAME/text/PRESET/model
_REPLACEMENT = "\ufffd"


Held = tuple[tuple[int, ...], int]  # the last tokens, and how many of them were shown


class StreamDecoder(Protocol):
    """Tokens one by one to text; what `push` and the final `flush` return, joined, is `decode` of all the ids."""

    def push(self, id: int) -> str:
        """Text that this token completes: "" while a character is still incomplete."""
        ...

    def flush(self) -> str:
        """What is held back, with U+FFFD for an incomplete character."""
        ...

    @property
    def held(self) -> Held:
        """What the text of the next token depends on."""
        ...


class Tokenizer(Protocol):
    """name: for records; sha256: of the definition; ids lie in [0, vocab_size)."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        """Ids [tokens] in `token_dtype(vocab_size)`; no special tokens are added."""
        ...

    def decode(self, ids: ArrayLike) -> str: ...

    def stream_decoder(self, held: Held = ((), 0)) -> StreamDecoder:
        """One that goes on where another, of which `held` was taken, stood."""
        ...


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest unsigned integer that holds every id below `vocab_size`."""
    return np.min_scalar_type(vocab_size - 1)


class ByteTokenizer:
    """The 256 bytes of UTF-8: nothing to train or fetch, and no text it can't hold."""

    name = "bytes"
    sha256 = hashlib.sha256(b"bytes").hexdigest()
    vocab_size = 256

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        return np.frombuffer(_utf8(text), dtype=np.uint8)

    def decode(self, ids: ArrayLike) -> str:
        values = np.asarray(ids, dtype=np.int64)
        if values.size and not 0 <= values.min() <= values.max() < self.vocab_size:
            raise DataError(f"byte ids must lie in 0..255, got {values.min()}..{values.max()}")
        return values.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def stream_decoder(self, held: Held = ((), 0)) -> StreamDecoder:
        return _ByteStream(held)


class _ByteStream:
    def __init__(self, held: Held) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.setstate((bytes(held[0]), 0))

    def push(self, id: int) -> str:
        return self._decoder.decode(bytes([id]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    @property
    def held(self) -> Held:
        return tuple(self._decoder.getstate()[0]), 0


class FileTokenizer:
    """A tokenizer in the JSON format of the `tokenizers` library; truncation and padding set there are off."""

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer as Backend

        self.path = Path(path)
        try:
            definition = self.path.read_bytes()
            self._backend = Backend.from_buffer(definition)
        except OSError as error:
            raise DataError(f"can't read the tokenizer {path}: {error.strerror}; expected 'bytes' or a file") from error
        except Exception as error:  # the Rust side raises bare Exception
            raise DataError(f"{path} is not a tokenizer of the 'tokenizers' library: {error}") from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self.name = self.path.stem
        self.sha256 = hashlib.sha256(definition).hexdigest()
        self.vocab_size = 1 + max(self._backend.get_vocab().values(), default=-1)
        if not self.vocab_size:
            raise DataError(f"{path} has an empty vocabulary; train one with `train_bpe`")

    def encode(self, text: str) -> NDArray[np.unsignedinteger]:
        _utf8(text)
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=token_dtype(self.vocab_size))

    def decode(self, ids: ArrayLike) -> str:
        return self._backend.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=False)

    def stream_decoder(self, held: Held = ((), 0)) -> StreamDecoder:
        return _PrefixStream(self, held)


class _PrefixStream:
    """Decodes the tokens last shown together with the new ones, as some decoders look at what stands before."""

    def __init__(self, tokenizer: FileTokenizer, held: Held) -> None:
        self._tokenizer = tokenizer
        self._ids, self._shown = list(held[0]), held[1]

    def push(self, id: int) -> str:
        self._ids.append(id)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return text

    def flush(self) -> str:
        text = self._pending()
        self._ids, self._shown = [], 0
        return text

    @property
    def held(self) -> Held:
        return tuple(self._ids), self._shown

    def _pending(self) -> str:
        """The text of the tokens after the first `_shown`."""
        return self._tokenizer.decode(self._ids)[len(self._tokenizer.decode(self._ids[: self._shown])) :]


def load_tokenizer(spec: str) -> Tokenizer:
    """`bytes`, or the path of a tokenizer's .json file."""
    if spec == ByteTokenizer.name:
        return ByteTokenizer()
    if Path(spec).suffix == ".json" or Path(spec).is_file():
        return FileTokenizer(spec)
    raise DataError(f"unknown tokenizer {spec!r}: {nearest(spec, [ByteTokenizer.name])}, or the path of a .json file")


def find_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of the model in `folder`: the nearest tokenizer.json of its size there or up to LEVELS above, or
    bytes if the size is 256. One in the folder itself may have fewer ids, as vocabularies are padded.

    Raises CheckpointError if there is none.
    """
    folder = folder.absolute()
    found = []
    for place in (folder, *folder.parents[:LEVELS]):
        if (place / TOKENIZER).is_file():
            tokenizer = FileTokenizer(place / TOKENIZER)
            if tokenizer.vocab_size == vocab_size or (place == folder and tokenizer.vocab_size < vocab_size):
                return tokenizer
            found.append(f"; {tokenizer.path} has {tokenizer.vocab_size} tokens")
    if vocab_size == ByteTokenizer.vocab_size:
        return ByteTokenizer()
    raise CheckpointError(
        f"no {TOKENIZER} of {vocab_size} tokens in {folder} or the {LEVELS} folders above it{''.join(found)}; "
        "name the tokenizer that the model was trained with"
    )


def save_for_transformers(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes what `AutoTokenizer` and `pipeline` look for in the folder of a model; it pads on the left."""
    folder, options = Path(folder), {"padding_side": "left", "clean_up_tokenization_spaces": False}
    if isinstance(tokenizer, FileTokenizer):
        write_whole(folder / TOKENIZER, tokenizer.path.read_bytes())
        options["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        options["tokenizer_class"] = "BMojoByteTokenizer"
    write_whole(folder / "tokenizer_config.json", (json.dumps(options, indent=2) + "\n").encode())


def train_bpe(documents: Iterable[Document], vocab_size: int, path: str | Path) -> FileTokenizer:
    """Trains a lossless byte-level BPE and writes it to `path` (.json) in one step; the same text gives the same file.

    vocab_size: at least 256, the bytes; warns if the text has too few pairs to reach it.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 256:
        raise DataError(f"vocab_size must be at least 256 (every byte is a token), got {vocab_size}")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator((document.text for document in documents), trainer)
    path = Path(path)
    write_whole(path, backend.to_str().encode())
    tokenizer = FileTokenizer(path)
    if tokenizer.vocab_size < vocab_size:
        warnings.warn(f"the text gives only {tokenizer.vocab_size} tokens of the {vocab_size} asked for", stacklevel=2)
    return tokenizer


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            "expected text decoded from UTF-8"
        ) from error
