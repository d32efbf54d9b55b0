import numpy as np
import pytest
from test_engine_conformance import DIM, ask, blocks

from bmojo.errors import StoreError
from bmojo.memory.engines.engine import Found, MemoryEngine, check_meta, recall


class Forgetful(MemoryEngine):
    """Finds every other block only."""

    def search(self, *args, **named):
        found = super().search(*args, **named)
        odd = found.id % 2 == 1
        return Found(np.where(odd, -np.inf, found.score), np.where(odd, -1, found.id))


def test_recall_is_the_share_of_the_best_blocks_that_is_found():
    rng = np.random.default_rng(0)
    stored, queries = blocks(rng, 60), ask(rng, 8)
    for kind in (MemoryEngine, Forgetful):
        engine = kind()
        engine.put(stored)
        exact = MemoryEngine.search(engine, 3, queries, 6, generation=40).id
        share = recall(engine, 3, queries, 6, generation=40)
        assert share == (1 if kind is MemoryEngine else (exact[exact >= 0] % 2 == 0).mean())
    assert recall(MemoryEngine(), 3, np.ones((1, DIM), np.float32), 6, generation=-1) == 1


def test_the_setting_that_differs_is_named_inside_of_others():
    stored = {"config": {"window": 64, "layers": [1, 2]}, "weights": "f00d"}
    check_meta(stored, {"weights": "f00d", "config": {"layers": (1, 2), "window": 64}}, "mem")
    with pytest.raises(StoreError, match=r"configuration: config\.window: the store has 64, asked for 32; use"):
        check_meta(stored, {"weights": "f00d", "config": {"layers": [1, 2], "window": 32}}, "mem")
    with pytest.raises(
        StoreError, match=r"config\.extra: the store has None, asked for 1; weights: the store has 'f00d'"
    ):
        check_meta(stored, {"weights": "beef", "config": {"layers": [1, 2], "window": 64, "extra": 1}}, "mem")
