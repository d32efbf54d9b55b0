"""Many streams of one model, decoded as one batch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence

import torch

from bmojo.errors import ConfigError
from bmojo.generate.stream import COMMIT, Snapshot, Stream, plain, require_count
from bmojo.memory.state import MemoryState
from bmojo.memory.storage import Mark, Storage
from bmojo.nn.decoder import Decoder


def generate_batch(
    streams: Sequence[Stream], max_tokens: int | None = None, *, stop_ids: Collection[int] = ()
) -> Iterator[list[int | None]]:
    """`generate` of all `streams`, of any lengths, together: each step gives a list with the next token of each.

    Each stream is chosen by its own sampling, as if it were alone, and reads what it was fed alone. One that comes to
    a stop gives None from then on, and costs nothing once it is dropped. The iterator can be left at any token, and a
    stream can be fed, restored or used elsewhere between two tokens: the batch goes on from what it then is.

    Raises ConfigError unless the streams are different ones of one model.
    """
    require_count(max_tokens)
    streams = list(streams)
    if len({id(stream) for stream in streams}) < len(streams):
        raise ConfigError("a stream can be only once in a batch; take stream.fork() for another one")
    if len({id(stream.model) for stream in streams}) > 1:
        raise ConfigError("the streams of a batch must be of one model object, got several")
    kinds = {None if s.storage is None else (id(s.storage.store), s.storage.write, s.storage.decays) for s in streams}
    if len(kinds) > 1:
        raise ConfigError(
            "the streams of a batch must all have the same store, and all or none hand over to it and have decay"
        )
    return _generate(streams, max_tokens, frozenset(stop_ids))


def _generate(streams: list[Stream], max_tokens: int | None, stop_ids: frozenset[int]) -> Iterator[list[int | None]]:
    live, batch, step = set(range(len(streams))), None, 0
    try:
        while live and step != max_tokens:
            with _locked(streams):
                if batch is None or not batch.serves(live):
                    if batch is not None:
                        batch.commit()
                    batch = _Batch(streams, sorted(live))
                tokens = batch.step(live)
                stopped = {i for i in live if tokens[i] in stop_ids}
                live -= stopped
                step += 1
                if stopped or step % COMMIT == 0:
                    batch.commit()
            if live:
                yield [token if i in live else None for i, token in enumerate(tokens)]
    finally:
        if batch is not None:
            with _locked(streams):
                batch.commit()


@contextlib.contextmanager
def _locked(streams: list[Stream]) -> Iterator[None]:
    """All of them, always in the same order."""
    with contextlib.ExitStack() as stack:
        for stream in sorted(streams, key=id):
            stack.enter_context(stream._lock)
        yield


class _Batch:
    """The streams of `rows`, stacked. A stream's own snapshot tells of the tokens made, so that what breaks off the
    batch leaves all of them in order; the states that it has come to are kept now and then (`commit`)."""

    @plain
    def __init__(self, streams: list[Stream], rows: list[int]) -> None:
        self.streams, self.rows = streams, rows
        self.at: dict[int, Snapshot] = {}  # what each stream was when it was read or chosen here
        for row in rows:
            self.at[row] = streams[row]._read_all_but_one()
        marks = [mark for row in rows if (mark := self.at[row].stored) is not None]
        self.storage = None
        if marks:
            first = streams[rows[0]].storage
            assert first is not None
            self.storage = Storage(first.config, len(rows), store=first.store, write=first.write)
            self.storage.back(Mark.cat(marks))
        state = MemoryState.cat([self.at[row].state for row in rows])
        self.decoder = Decoder(streams[0].model, state, storage=self.storage)
        self.whole = True  # it has read what `at` tells but the last token of each; not so once a step is broken off

    def serves(self, live: set[int]) -> bool:
        """Whether it is up to date, and not too many of its rows have stopped: a graph is captured for one size."""
        few = len(live) < len(self.rows) and (not self.decoder.static or 2 * len(live) <= len(self.rows))
        return not few and all(self.streams[row]._now is self.at[row] for row in live)

    @plain
    def step(self, live: set[int]) -> list[int | None]:
        self.whole = False
        last = [self.at[row].unread[-1] for row in self.rows]
        logits = self.decoder(torch.tensor(last, device=self.at[self.rows[0]].state.position.device))
        tokens: list[int | None] = [None] * len(self.streams)
        for row, its_logits in zip(self.rows, logits, strict=True):
            if row in live:
                tokens[row], _ = self.streams[row]._choose(self.at[row], its_logits)
                self.at[row] = self.streams[row]._now
        self.whole = True
        return tokens

    @plain
    def commit(self) -> None:
        """Keep the states that it has come to."""
        if not self.whole:
            return
        marks: list[Mark | None] = [None] * len(self.rows)
        if self.storage is not None:
            self.storage.settle()
            marks = [*self.storage.mark().split()]
        for row, state, mark in zip(self.rows, self.decoder.state.split(), marks, strict=True):
            stream = self.streams[row]
            if stream._now is self.at[row] and len(stream._now.unread) > 1:
                stream._ahead = stream._stored = None
                now = stream._now
                stream._now = dataclasses.replace(now, state=state, stored=mark, unread=now.unread[-1:])
                self.at[row] = stream._now
