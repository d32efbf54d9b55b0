"""Documents into a store: each is read once, from an empty memory, and what it leaves there is its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from bmojo.data.documents import Document
from bmojo.data.tokenizers import Tokenizer
from bmojo.memory.storage import Storage
from bmojo.memory.store import Store
from bmojo.nn.model import BMojoLM

SEGMENT = 2048  # tokens read at once


class Remembered(NamedTuple):
    """What became of a document: `tokens` read now, 0 if it was there already."""

    name: str
    tokens: int


@torch.no_grad()
def remember(
    model: BMojoLM,
    store: Store,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Remembered]:
    """Read the documents that `store` does not hold yet, each under its name, and say what became of each.

    A document is known by its name and the SHA-256 of its text and tokenizer: one that has changed takes the place of
    what was there, and one that was broken off is read again. `progress` is told the tokens of each segment.
    """
    known = store.engine.sources()
    for document in documents:
        digest = hashlib.sha256(f"{tokenizer.sha256}\n{document.text}".encode()).hexdigest()
        before = known.get(document.name)
        if before is not None and before.get("sha256") == digest:
            yield Remembered(document.name, 0)
            continue
        if before is not None:
            store.delete(document.name)
        ids = torch.from_numpy(tokenizer.encode(document.text).astype(np.int64)).to(model.embed.weight.device)
        state, storage = None, Storage(model.config, store=store, sources=[document.name], find=False)
        for part in ids.split(SEGMENT):
            _, state = model.features(part[None], state, storage=storage)
            progress(len(part))
        if state is not None:
            storage.finish(state.layers)
        store.flush()
        store.engine.note(document.name, sha256=digest)
        known[document.name] = {"sha256": digest}
        yield Remembered(document.name, len(ids))
