"""A store as the streams of one process use it: an engine, what was read of it lately, a writer in the background."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bmojo.config import ModelConfig
from bmojo.errors import StoreError
from bmojo.memory.decay import Decay
from bmojo.memory.engines import Block, Engine, open_store
from bmojo.memory.engines.engine import NoBlocks
from bmojo.memory.faded import NOTES

WAITING = 1024  # blocks that may wait to be written before who hands over more has to wait
AT_ONCE = 64  # blocks of one commit
REMEMBERED = 256  # blocks kept as they were read
PAUSE = 0.001  # seconds between two looks at what the writer has done

# settings that change what is read, or how a model is trained, not what is stored
_READING = {"storage_stride", "storage_queries", "storage_blocks", "head_loss_weight", "admission_loss_weight"}


Waiting = tuple[Block, Callable[[Block, int], None], bool]  # to be told its id; whether it was put before


class Model(Protocol):
    """Whose blocks a store holds: a `BMojoLM`."""

    config: ModelConfig

    def fingerprint(self) -> str: ...


def meta_of(model: Model) -> dict[str, Any]:
    """What the blocks of a store must fit: the settings that they depend on, and the weights."""
    settings = {name: value for name, value in model.config.to_dict().items() if name not in _READING}
    return {**settings, "weights": model.fingerprint()}


def stored_settings(path: str | Path) -> dict[str, Any] | None:
    """The settings of storage of the store at `path`, which a model must have to use it; None if there is no store."""
    if "://" not in str(path) and not (Path(path) / "meta.json").exists():
        return None
    try:
        with open_store(path, mode="r") as engine:
            meta = engine.meta
    except StoreError:
        if "://" in str(path):
            return None  # not made yet, or what is wrong is said when it is opened
        raise
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in meta.items()
        if name.startswith("storage_")
    }


def half_lives(engine: Engine) -> dict[int, float]:
    """The metric `memory.half_life` by layer, in blocks, as last noted; none where nothing has been learned."""
    notes = engine.sources().get(NOTES, {})
    prefix = "layer-"
    return {
        int(name.removeprefix(prefix)): Decay.from_dict(known).half_life
        for name, known in notes.items()
        if name.startswith(prefix)
    }


class Store:
    """Blocks are put in the background, and found up to a generation. Safe from several threads.

    `put` returns at once, unless WAITING blocks wait already; `flush` waits until all are in the engine, where the
    death of the process loses none of them. What goes wrong in the background is raised by the next call of either, and
    by all after it: what was acknowledged until then is there, what waited is not.

    A block that its source was given here before, up to the position `end` tells, is not written again: a stream that
    went back reads some tokens twice.

    `last`: the newest id given to a block put here; `deleted`: by source, the newest id that was hidden here, in a
    dictionary that is replaced, not changed.
    """

    def __init__(self, engine: Engine, *, fingerprint: str = "", publish: float = 1.0) -> None:
        self.engine, self.fingerprint, self.publish = engine, fingerprint, publish
        self.last, self.deleted = -1, dict[str, int]()
        self._lock, self._putting, self._closed = threading.Lock(), threading.Lock(), False
        self._pinned, self._looked = engine.pin(), time.monotonic()
        self._read: OrderedDict[int, Block] = OrderedDict()
        self._ends: dict[str, dict[int, int]] = {}  # by source and layer
        # Between the threads there are neither conditions nor events: Ctrl-C in the middle of one, which is written in
        # Python, would leave it locked for ever.
        self._queue: queue.SimpleQueue[Waiting | list[bool]] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._decay: dict[int, Decay] = {}
        self._unsaved: set[int] = set()

    @classmethod
    def open(
        cls, path: str | Path, model: Model, *, mode: str = "a", engine: str | None = None, publish: float = 1.0,
        sync: str = "second",
    ) -> Store:  # fmt: skip
        """The store at `path` (see `open_store`), which must be one of this model; with mode "a" a new one if there is
        none. Raises StoreError, which names what differs, for that of another."""
        meta = meta_of(model)
        opened = open_store(path, meta=meta, engine=engine, mode=mode, publish=0, sync=sync)
        return cls(opened, fingerprint=meta["weights"], publish=publish)

    def put(self, block: Block, done: Callable[[Block, int], None]) -> None:
        """Write a block, then, in the writer's thread, call done(block, id); if it was written before, with an id that
        is not lower than the one it was given."""
        with self._putting:
            self._raise()
            if self._closed:
                raise StoreError("the store is closed: open it again, and restore the stream from its last snapshot")
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="bmojo-store-writer", daemon=True)
                self._writer.start()
            while self._queue.qsize() >= WAITING:
                time.sleep(PAUSE)
            ends = self._ends.setdefault(block.source, {})
            again = block.start < ends.get(block.layer, 0)
            self._queue.put((block, done, again))
            if not again:
                ends[block.layer] = block.start + len(block.tokens)

    def end(self, source: str) -> int:
        """The position up to which some layer has put blocks of a source here."""
        return max(self._ends.get(source, {}).values(), default=0)

    def finish(self, source: str) -> None:
        """Nothing more will be put of a source."""
        self._ends.pop(source, None)

    def flush(self) -> None:
        """Wait until what was put is in the engine."""
        if self._writer is not None and self._writer.is_alive():
            done = [False]
            self._queue.put(done)
            while not done[0]:
                time.sleep(PAUSE)
        self._raise()
        self._keep_learned()

    def pin(self) -> int:
        """The newest generation, looked up no more often than things are published."""
        with self._lock:
            if time.monotonic() - self._looked >= self.publish:
                self._pinned, self._looked = self.engine.pin(), time.monotonic()
            return self._pinned

    def search(
        self, layer: int, asking: np.ndarray, count: int, generation: int, after: int = -1
    ) -> list[list[tuple[float, int]]]:
        """For each of m strides with tokens asking [m, n, D]: (score, id) of the best `count` with ids in
        (after, generation], of equal ones the newest first."""
        if generation <= after:
            return [[] for _ in asking]
        strides, each, _ = asking.shape
        found = self.engine.search(layer, asking.reshape(strides * each, -1), count, generation=generation, after=after)
        score, number = (z.reshape(strides, -1) for z in found)
        results = []
        for s, n in zip(score, number, strict=True):
            order = np.lexsort((-n, -s))
            s, n = s[order], n[order]
            first = np.sort(np.unique(n, return_index=True)[1])
            first = first[n[first] >= 0][:count]
            results.append(list(zip(s[first].tolist(), n[first].tolist(), strict=True)))
        return results

    def get(self, number: int) -> Block | None:
        """The block of this id; None if it was deleted since it was found."""
        with self._lock:
            if number in self._read:
                self._read.move_to_end(number)
                return self._read[number]
        return self.fetch([number]).get(number)

    def fetch(self, numbers: Iterable[int]) -> dict[int, Block]:
        """Read blocks at once, for `get` to have them; those that were not deleted since they were found."""
        with self._lock:
            missing = [number for number in dict.fromkeys(numbers) if number not in self._read]
        try:
            blocks = self.engine.get(missing) if missing else []
        except NoBlocks:
            if len(missing) == 1:
                return {}
            return {n: b for number in missing for n, b in self.fetch([number]).items()}
        with self._lock:
            blocks = [block for block in blocks if block.id > self.deleted.get(block.source, -1)]
            self._read.update((block.id, block) for block in blocks)
            while len(self._read) > REMEMBERED:
                self._read.popitem(last=False)
        return {block.id: block for block in blocks}

    def decay(self, layer: int) -> Decay | None:
        """What a layer's sessions have learned of how fast what is stored fades; None: nothing yet."""
        if layer not in self._decay:
            known = self.engine.sources().get(NOTES, {}).get(f"layer-{layer}")
            return None if known is None else Decay.from_dict(known)
        return self._decay[layer]

    def learned(self, layer: int, decay: Decay) -> None:
        """The weights that a session has come to; the next `flush` keeps them, as a note of the source NOTES."""
        with self._lock:
            self._decay[layer] = decay
            self._unsaved.add(layer)

    def count(self, source: str) -> int:
        """Blocks of a source."""
        return self.engine.sources().get(source, {"blocks": 0})["blocks"]

    def delete(self, source: str) -> int:
        """Hide all blocks of a source, those too that wait to be written; how many. No call that begins after this one
        reads them."""
        with self._putting:
            self.flush()
            count = self.engine.delete(source)
            self.finish(source)
            newest = max(self.last, self.engine.pin())
            with self._lock:
                self.deleted = {**self.deleted, source: newest}
                self._read = OrderedDict((n, b) for n, b in self._read.items() if b.source != source)
        return count

    def stats(self) -> dict[str, Any]:
        """Those of the engine, how many blocks wait to be written, and by layer the metric `memory.half_life`."""
        return {**self.engine.stats(), "waiting": self._queue.qsize(), "half_life": half_lives(self.engine)}

    def close(self) -> None:
        """Write what waits, and close the engine."""
        with self._putting:
            self._closed = True
            if self._writer is not None:
                self._queue.put([])
                self._writer.join()
                self._writer = None
        if self._failed is None:
            self._keep_learned()
        self.engine.close()
        self._raise()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep_learned(self) -> None:
        with self._lock:
            notes = {f"layer-{layer}": self._decay[layer].to_dict() for layer in self._unsaved}
            self._unsaved.clear()
        if notes:
            self.engine.note(NOTES, **notes)

    def _raise(self) -> None:
        if self._failed is not None:
            raise StoreError(
                f"blocks could not be written to the store: {self._failed}; mend that, open the store again, and "
                "restore the streams from their last snapshots"
            ) from self._failed

    def _write(self) -> None:
        """What waits, in order: blocks, lists to be told when all before them is written, an empty list at the end."""
        while True:
            items = [self._queue.get()]
            while len(items) < AT_ONCE and isinstance(items[-1], tuple):
                try:
                    items.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            work = [item for item in items if isinstance(item, tuple)]
            try:
                if work and self._failed is None:
                    ids = iter(self.engine.put([block for block, _, again in work if not again]))
                    for block, done, again in work:
                        self.last = self.last if again else next(ids)
                        done(block, self.last)
            except BaseException as error:
                self._failed = error
            if isinstance(items[-1], list):
                if not items[-1]:
                    return
                items[-1][0] = True
