"""A store as the streams of one process use it: an engine, what was read of it lately, a writer in the background."""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bmojo.config import ModelConfig
from bmojo.errors import StoreError
from bmojo.memory.decay import Decay
from bmojo.memory.engines import Block, Engine, open_store
from bmojo.memory.faded import NOTES

WAITING = 1024  # blocks that may wait to be written before who hands over more has to wait
AT_ONCE = 64  # blocks of one commit
REMEMBERED = 256  # blocks kept as they were read


# settings that change what is read, or how a model is trained, not what is stored
_READING = {"storage_stride", "storage_queries", "storage_blocks", "head_loss_weight", "admission_loss_weight"}


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
    death of the process loses none of them. What goes wrong in the background is raised by the next call of either.
    """

    def __init__(self, engine: Engine, *, fingerprint: str = "", publish: float = 1.0) -> None:
        self.engine, self.fingerprint, self.publish = engine, fingerprint, publish
        self._lock = threading.Lock()
        self._pinned, self._looked = engine.pin(), time.monotonic()
        self._read: OrderedDict[int, Block] = OrderedDict()
        self._queue: queue.Queue[tuple[Block, Callable[[Block, int], None]] | None] = queue.Queue(WAITING)
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
        opened = open_store(path, meta=meta, engine=engine, mode=mode, publish=publish, sync=sync)
        return cls(opened, fingerprint=meta["weights"], publish=publish)

    def put(self, block: Block, done: Callable[[Block, int], None]) -> None:
        """Write a block; then, in the writer's thread, call done(block, id)."""
        self._raise()
        with self._lock:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="bmojo-store-writer", daemon=True)
                self._writer.start()
        self._queue.put((block, done))

    def flush(self) -> None:
        """Wait until what was put is in the engine."""
        self._queue.join()
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
        block = self.engine.get([number])[0]
        with self._lock:
            self._read[number] = block
            if len(self._read) > REMEMBERED:
                self._read.popitem(last=False)
        return block

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
        """Hide all blocks of a source."""
        with self._lock:
            self._read = OrderedDict((n, b) for n, b in self._read.items() if b.source != source)
        return self.engine.delete(source)

    def stats(self) -> dict[str, Any]:
        """Those of the engine, how many blocks wait to be written, and by layer the metric `memory.half_life`."""
        return {**self.engine.stats(), "waiting": self._queue.qsize(), "half_life": half_lives(self.engine)}

    def close(self) -> None:
        """Write what waits, and close the engine."""
        if self._writer is not None:
            self._queue.put(None)
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
            raise StoreError(f"blocks could not be written to the store: {self._failed}") from self._failed

    def _write(self) -> None:
        while True:
            items = [self._queue.get()]
            while len(items) < AT_ONCE and items[-1] is not None:
                try:
                    items.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            work = [item for item in items if item is not None]
            try:
                if work and self._failed is None:
                    ids = self.engine.put([block for block, _ in work])
                    for (block, done), number in zip(work, ids, strict=True):
                        done(block, number)
            except BaseException as error:
                self._failed = error
            finally:
                for _ in items:
                    self._queue.task_done()
            if items[-1] is None:
                return
