"""Streams: text without end in and out of a model, in constant memory.

A stream is what was given and made so far, one sequence of tokens. Of it a model has read all but the last few, the
`unread`; its state after those is a value, so a stream at one moment is a value too: a `Snapshot`. Every change of a
stream is one assignment of a new snapshot: whatever breaks off a call, Ctrl-C too, leaves the old one or the new.

    position   0 .............................. length
               read, in `state` ...... | unread        the next token is drawn by (seed, length)
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import os
import re
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bmojo.data.tokenizers import ByteTokenizer, Held, Tokenizer
from bmojo.errors import ConfigError, DataError, StateError
from bmojo.generate.sampling import Sampling
from bmojo.memory.state import MemoryState, require_fit
from bmojo.memory.states import FINGERPRINT
from bmojo.memory.storage import Mark, Storage
from bmojo.memory.store import Store
from bmojo.nn.decoder import Decoder
from bmojo.nn.model import BMojoLM

SEGMENT = 512  # tokens read at once; a stream reads up to multiples of it, which are starts of chunks
COMMIT = 64  # tokens decoded before their state is kept: what a broken-off token costs at most
BLOCK = 65536  # characters of a file at once
CONTEXT = 16  # tokens before a generated one that its text may depend on
VERSION = 1

Source = str | bytes | int | Tensor | NDArray[Any] | Iterable[Any]


P = ParamSpec("P")
R = TypeVar("R")


def plain(function: Callable[P, R]) -> Callable[P, R]:
    """In any mode of the caller: no gradients, and tensors that calls in another mode may write to."""
    return torch.inference_mode(False)(torch.no_grad()(function))


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A stream at one moment.

    state: after `length - len(unread)` tokens, batch size 1; stored: its storage then, if it has any. made: `unread`
    was generated, not given, and is read again one token at a time, so that a stream goes on bit for bit. held: what
    the text of the next token depends on.
    """

    sampling: Sampling
    state: MemoryState
    length: int
    unread: tuple[int, ...] = ()
    made: bool = False
    held: Held = ((), 0)
    stored: Mark | None = None


class Stream:
    """Text or tokens in (`feed`), tokens (`generate`) or text (`text`) out, in any order and for any length.

        stream = Stream(model, temperature=0.8, seed=1)
        stream.feed("The state ")
        for piece in stream.text(40):
            print(piece, end="")

    tokenizer: for text; bytes if left out and the model has 256 tokens. state: a memory of this model, batch size 1, to
    go on from. sampling: the settings of `Sampling`.
    store: a long-term memory of this model, that the stream reads and, with `write`, hands over what it has read to,
    under its `name` (None: one of its own; one that the store has: as another branch of that); see
    `bmojo.memory.storage`. Other streams with this store find it there.
    decay: what is stored counts less as it grows older, as fast as what it foretells no longer comes (docs/decay.md).

    Any way of cutting what is fed into pieces (of text: at the bounds of tokens) gives the same stream, bit for bit.
    What was generated is part of the stream, a stop that ended it too; `feed` and `generate` go on after it.
    All methods may be called from several threads; one waits for the other. Streams of one model share nothing else.
    Memory: two states of the model and a segment of SEGMENT tokens, at any length.

    Raises ConfigError for a setting out of range, StateError for a state of another model, batch size or dtype.
    """

    def __init__(
        self,
        model: BMojoLM,
        tokenizer: Tokenizer | None = None,
        *,
        state: MemoryState | None = None,
        store: Store | None = None,
        name: str | None = None,
        write: bool = True,
        decay: bool = False,
        **sampling: Any,
    ) -> None:
        if tokenizer is None and model.config.vocab_size == ByteTokenizer.vocab_size:
            tokenizer = ByteTokenizer()
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise ConfigError(
                f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, "
                f"the model {model.config.vocab_size}; give the one that the model was trained with"
            )
        self.model, self.tokenizer = model, tokenizer
        self._lock = threading.RLock()
        self._decoder: Decoder | None = None
        self._ahead: int | None = None  # unread tokens that the decoder has read; None: its state is not to be used
        state = model.empty_state() if state is None else state.detach()
        require_fit(state, model.config, 1, model.embed.weight.dtype)
        self.storage = self._stored = None  # its session with the store, and the mark that it is at
        if store is not None:
            if int(state.position):
                raise ConfigError("a stream with a store begins with it: a state that has read tokens can't be given")
            name = f"stream-{secrets.token_hex(4)}" if name is None else name
            self.storage = Storage(model.config, store=store, sources=[name], write=write, decay=decay)
            self.storage.restore(self.storage.mark())  # as a branch, if the store has that name
            self._stored = self.storage.mark()
        self._now = Snapshot(Sampling(**sampling), state, length=int(state.position), stored=self._stored)

    # what it is
    @property
    def length(self) -> int:
        """Tokens of the stream so far, given and made."""
        return self._now.length

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen; assign another one at any time."""
        return self._now.sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        with self._lock:
            self._now = dataclasses.replace(self._now, sampling=sampling)

    @property
    @plain
    def state(self) -> MemoryState:
        """What the model remembers after every token of the stream, the last one included; the stream does not change.

        `Stream(model, state=stream.state)` goes on from it once it is fed a token.
        """
        with self._lock:
            now = self.snapshot()
            return self._read(now, now.unread)[1].state if now.unread else now.state.clone()

    # in
    def feed(self, source: Source) -> Stream:
        """Append text, token ids, or an iterable or open file of them; returns the stream.

        Text is encoded in blocks of at most 2 * BLOCK characters that end at lines, of an iterable each string by
        itself; a file or iterable may be longer than memory. A block that is refused or broken off is not in the
        stream, those before it are. Iterators of `generate` that are open go on after what was fed.

        Raises DataError for ids outside the vocabulary, text without a tokenizer, or anything else.
        """
        with self._lock:
            for ids in self._pieces(source):
                self._append(ids)
        return self

    def _pieces(self, source: Source) -> Iterator[NDArray[np.int64]]:
        if isinstance(source, str):
            source = io.StringIO(source, newline="")
        elif isinstance(source, bytes):
            source = io.BytesIO(source)
        elif isinstance(source, Tensor):
            source = source.cpu().numpy()
        if isinstance(source, int | np.ndarray | np.generic):
            yield self._ids(source)
        elif callable(read := getattr(source, "read", None)):
            yield from map(self._encode, _blocks(read))
        elif isinstance(source, list | tuple) and all(map(_is_id, source)):
            yield self._ids(source)
        elif isinstance(source, Iterable):
            for ids, run in itertools.groupby(source, _is_id):
                while ids and (part := list(itertools.islice(run, SEGMENT))):
                    yield self._ids(part)
                for item in run:  # of ids there is none left
                    yield from self._pieces(item)
        else:
            raise DataError(
                f"a stream is fed text, token ids, or an iterable or open file of them, got {type(source).__name__}"
            )

    def _encode(self, text: str | bytes) -> NDArray[np.int64]:
        tokenizer = self._require_tokenizer()
        if isinstance(text, str):
            return tokenizer.encode(text).astype(np.int64)
        if not isinstance(tokenizer, ByteTokenizer):
            raise DataError(
                f"bytes are text only where bytes are tokens, got bytes for the tokenizer {tokenizer.name}; "
                "decode them first, or open the file as text"
            )
        return np.frombuffer(text, np.uint8).astype(np.int64)

    def _ids(self, ids: Any) -> NDArray[np.int64]:
        values, size = np.atleast_1d(np.asarray(ids)), self.model.config.vocab_size
        if values.size == 0:
            return values.astype(np.int64)
        if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
            raise DataError(f"token ids must be whole numbers in one row, got {values.dtype} {list(values.shape)}")
        if not 0 <= values.min() <= values.max() < size:
            raise DataError(
                f"token ids must lie in 0..{size - 1}, got {values.min()}..{values.max()}; "
                "use the tokenizer that the model was trained with"
            )
        return values.astype(np.int64)

    @plain
    def _append(self, ids: NDArray[np.int64]) -> None:
        if ids.size == 0:
            return
        self._commit()
        now = self._now
        read, held = now.length - len(now.unread), ((), 0) if ids.size >= CONTEXT else now.held
        unread = np.concatenate((np.array(now.unread, np.int64), ids))
        while (size := SEGMENT - read % SEGMENT) < len(unread):
            _, now = self._read(now, unread[:size])
            unread, read = unread[size:], read + size
        if self.tokenizer is not None:
            decoder = self.tokenizer.stream_decoder(held)
            for token in ids[-CONTEXT:].tolist():
                decoder.push(token)
            held = decoder.held
        self._ahead = None
        self._now = dataclasses.replace(
            now, length=self._now.length + ids.size, unread=tuple(unread.tolist()), made=False, held=held
        )

    # out
    def generate(self, max_tokens: int | None = None, *, stop_ids: Collection[int] = ()) -> Iterator[int]:
        """The next `max_tokens` token ids (None: without end); fewer if one of `stop_ids` comes, which is not given.

        The iterator can be left at any token, and what it gave is part of the stream; another one goes on after it.
        Each token comes after all that the stream holds when it is asked for, so several iterators, threads or a `feed`
        between two tokens are in order. Raises DataError at the first token if the stream is empty.
        """
        require_count(max_tokens)
        return itertools.islice(iter(functools.partial(self._next_id, frozenset(stop_ids)), None), max_tokens)

    def text(
        self, max_tokens: int | None = None, *, stop: str | Collection[str] = (), stop_ids: Collection[int] = ()
    ) -> Iterator[str]:
        """As `generate`, in pieces of text. It also ends where its text comes to one of the strings `stop`: these, and
        what follows in the same token, are not given, but part of the stream.

        Of a character that is not complete nothing is given; `held_back` tells, and the next call completes it.
        """
        require_count(max_tokens)
        self._require_tokenizer()
        stops = [stop] if isinstance(stop, str) else list(stop)
        if "" in stops:
            raise ConfigError("a stop must have a character, got ''; leave it out for none")
        return self._text(itertools.islice(self._tokens(frozenset(stop_ids)), max_tokens), stops)

    def _text(self, tokens: Iterator[tuple[int, str]], stops: list[str]) -> Iterator[str]:
        text = ""
        for _, piece in tokens:
            text += piece
            if found := [at for stop in stops if (at := text.find(stop)) >= 0]:
                text = text[: min(found)]
                break
            ready = len(text) - _start_of_stop(text, stops)
            if ready:
                yield text[:ready]
            text = text[ready:]
        if text:
            yield text

    @property
    def held_back(self) -> str:
        """What `text` holds back, with U+FFFD for a character that is not complete."""
        return self._require_tokenizer().stream_decoder(self._now.held).flush()

    def _tokens(self, stop_ids: frozenset[int]) -> Iterator[tuple[int, str]]:
        while (token := self._next())[0] not in stop_ids:
            yield token

    def _next_id(self, stop_ids: frozenset[int]) -> int | None:
        token, _ = self._next()
        return None if token in stop_ids else token

    @plain
    def _next(self) -> tuple[int, str]:
        """Choose the next token: it, and the text that it completes."""
        with self._lock:
            now = self._require_unread()
            if now.made:
                logits = self._decode()
            else:
                features, now = self._read(now, now.unread)
                logits = self.model.logits(features[0, -1])
                now, self._ahead = dataclasses.replace(now, unread=(), made=True), None
            token, piece = self._choose(now, logits)
            if len(self._now.unread) > COMMIT:
                self._commit()
            return token, piece

    def _choose(self, now: Snapshot, logits: Tensor) -> tuple[int, str]:
        """Append to `now`, all of which was read to give `logits` [vocab_size], the token chosen."""
        token, piece, held = now.sampling.choose(logits, now.length), "", now.held
        if self.tokenizer is not None:
            decoder = self.tokenizer.stream_decoder(held)
            piece, held = decoder.push(token), decoder.held
        self._now = dataclasses.replace(now, length=now.length + 1, unread=(*now.unread, token), held=held)
        return token, piece

    # the model
    def _read(self, at: Snapshot, tokens: Collection[int] | NDArray[np.int64]) -> tuple[Tensor, Snapshot]:
        """Features [1, time, hidden_size] of `tokens`, and `at` after them; what it was is left as it is."""
        ids = torch.as_tensor(np.asarray(tokens, np.int64), device=self.model.embed.weight.device)
        self._put_back(at)
        features, state = self.model.features(ids[None], at.state, storage=self.storage)
        self._stored = None if self.storage is None else self.storage.mark()
        return features, dataclasses.replace(at, state=state, stored=self._stored)

    def _put_back(self, at: Snapshot) -> None:
        """Storage is to be read from where `at` is; what the decoder has come to is then no more to be used."""
        if self.storage is not None:
            assert at.stored is not None
            if self._stored is not at.stored:
                self.storage.back(at.stored)
            self._stored = self._ahead = None

    def _decode(self, count: int | None = None) -> Tensor:
        """Logits [vocab_size] after the first `count` (None: all) of the tokens that were made."""
        now, ahead = self._now, self._ahead
        self._ahead = None  # while it works: if it is broken off, it starts again from the state
        if self._decoder is None:
            self._decoder = Decoder(self.model, now.state, storage=self.storage)
            ahead = None
        if ahead is None or ahead >= len(now.unread[:count]):
            self._put_back(now)
            self._decoder.state, ahead = now.state, 0
        self._stored = None
        for token in now.unread[ahead:count]:
            logits = self._decoder(torch.tensor([token], device=now.state.position.device))[0]
        self._ahead = len(now.unread[:count])
        return logits

    @plain
    def _commit(self) -> None:
        """Keep the state that the decoder has come to: after all that was made but the last token."""
        now = self._now
        if not now.made or len(now.unread) == 1:
            return
        if self._ahead != len(now.unread) - 1:
            self._decode(-1)
        assert self._decoder is not None
        state, self._ahead = self._decoder.state, None
        self._stored = None if self.storage is None else self.storage.mark()
        self._now = dataclasses.replace(now, state=state, stored=self._stored, unread=now.unread[-1:])
        self._ahead = 0

    @plain
    def _read_all_but_one(self) -> Snapshot:
        """The stream as a batch takes it: all but the last token read, the last one to be decoded."""
        self._commit()
        now = self._require_unread()
        if not now.made:
            now = self._read(now, now.unread[:-1])[1] if len(now.unread) > 1 else now
            self._ahead, self._now = None, dataclasses.replace(now, unread=now.unread[-1:], made=True)
        return self._now

    def _require_unread(self) -> Snapshot:
        if not self._now.unread:
            raise DataError("there is nothing to go on from: feed the stream at least one token")
        return self._now

    # values
    def snapshot(self) -> Snapshot:
        """The stream as it is now, to go back to."""
        with self._lock:
            self._commit()
            return self._now

    def restore(self, snapshot: Snapshot) -> None:
        """Go back, or on, to a snapshot of this stream or of another one of the same model."""
        with self._lock:
            require_fit(snapshot.state, self.model.config, 1, self.model.embed.weight.dtype)
            if (snapshot.stored is None) != (self.storage is None):
                has, lacks = ("snapshot", "stream") if self.storage is None else ("stream", "snapshot")
                raise StateError(f"the {has} has a store, the {lacks} has none; open the stream as it was when saved")
            self._ahead = self._stored = None
            if self.storage is not None:
                assert snapshot.stored is not None
                self.storage.restore(snapshot.stored)
                self._stored = self.storage.mark()
            self._now = dataclasses.replace(snapshot, stored=self._stored)

    def fork(self, *, write: bool = True, **sampling: Any) -> Stream:
        """A stream that goes on from here by itself; `sampling` changes settings, such as its seed. With a store it is
        a branch of its own there, or, with write=False, hands nothing over."""
        now = self.snapshot()
        twin = Stream(self.model, self.tokenizer)
        if self.storage is not None:
            twin.storage = self.storage.fork(write=write)
            now = dataclasses.replace(now, stored=twin.storage.mark())
        twin.restore(dataclasses.replace(now, sampling=dataclasses.replace(now.sampling, **sampling)))
        return twin

    # files
    _SAVED: ClassVar = ("length", "unread", "made", "held")

    def save(self, path: str | os.PathLike) -> None:
        """Write the stream, whole or not at all: a file of `MemoryState.save` whose note tells the rest."""
        with self._lock:
            now = self.snapshot()
            if self.storage is not None:
                self._put_back(now)
                self.storage.settle()
                now = dataclasses.replace(now, stored=self.storage.mark())
        note = {name: getattr(now, name) for name in self._SAVED} | {"sampling": dataclasses.asdict(now.sampling)}
        note |= {"version": VERSION, "tokenizer": None if self.tokenizer is None else self.tokenizer.sha256}
        extra = {} if now.stored is None else now.stored.to_tensors()
        dataclasses.replace(now.state, note={"stream": note, FINGERPRINT: self._fingerprint}, extra=extra).save(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: BMojoLM,
        tokenizer: Tokenizer | None = None,
        *,
        store: Store | None = None,
        write: bool = True,
        **sampling: Any,
    ) -> Stream:
        """What `save` wrote: it goes on bit for bit, in any process. `sampling` changes settings. A stream with a store
        goes on with that, given here, and with decay if it had it; where the store has a later part of it than was
        saved, as a branch.

        A memory that MemoryState.save wrote is a stream all of which was read. Raises StateError for a file that is
        none, damaged, newer, or of another model, weights or tokenizer.
        """
        state = MemoryState.load(path, model.config, device=str(model.embed.weight.device))
        note, theirs = state.note.get("stream"), state.note.get(FINGERPRINT)
        stored = Mark.from_tensors(state.extra, store) if state.extra else None
        state = dataclasses.replace(state, note={}, extra={})
        if note is None:
            stream = cls(model, tokenizer, state=state, store=store, write=write, **sampling)
        else:
            stream = cls(model, tokenizer, store=store, write=write)
        if theirs not in (None, stream._fingerprint):
            raise StateError(
                f"{path} was made with other weights: their fingerprint is {theirs}, that of this model "
                f"{stream._fingerprint}; load the model that made it"
            )
        if note is None:
            return stream
        try:
            if note["version"] > VERSION:
                raise StateError(
                    f"{path} has stream format {note['version']}, this bmojo reads up to {VERSION}; update bmojo"
                )
            (held, shown), length = note["held"], int(note["length"])
            held, unread = (tuple(stream._ids(ids).tolist()) for ids in (held, note["unread"]))
            if length != int(state.position) + len(unread):
                raise DataError(f"{length} tokens, of which {int(state.position)} are read and {len(unread)} unread")
            saved = Snapshot(
                Sampling(**note["sampling"]), state, length, unread, bool(note["made"]), (held, int(shown)), stored
            )
        except StateError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"{path} is damaged: its note of the stream can't be read ({error}); save it again"
            ) from None
        ours = None if stream.tokenizer is None else stream.tokenizer.sha256
        if None not in (ours, note.get("tokenizer")) and ours != note["tokenizer"]:
            raise StateError(
                f"{path} was made with another tokenizer than {stream._require_tokenizer().name}; "
                "give the one that it was made with"
            )
        stream.restore(dataclasses.replace(saved, sampling=dataclasses.replace(saved.sampling, **sampling)))
        return stream

    @functools.cached_property
    def _fingerprint(self) -> str:
        return self.model.fingerprint()

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise DataError(
                f"text needs a tokenizer, and a model of {self.model.config.vocab_size} tokens does not tell which: "
                "Stream(model, tokenizer)"
            )
        return self.tokenizer


def _is_id(item: Any) -> bool:
    return isinstance(item, int | np.integer)


def require_count(max_tokens: int | None) -> None:
    if max_tokens is not None and max_tokens < 0:
        raise ConfigError(f"max_tokens must be at least 0, got {max_tokens}; None is without end")


def _start_of_stop(text: str, stops: list[str]) -> int:
    """The length of the longest end of `text` that one of `stops` starts with."""
    sizes = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return max(sizes, default=0)


def _blocks(read: Callable[[int], Any]) -> Iterator[Any]:
    """What `read` gives, text or bytes, in blocks; of text, each but the last ends at a line that no space follows."""
    block = read(BLOCK)
    while block:
        after = read(BLOCK)
        ends = [match.end() for match in re.finditer(r"\n(?=\S)", block)] if after and isinstance(block, str) else []
        cut = ends[-1] if ends else len(block)
        yield block[:cut]
        block = block[cut:] + after
