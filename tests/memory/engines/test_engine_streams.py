"""A stream reads the same from every engine."""

from __future__ import annotations

import pytest
import torch
from cases import close, draw_tokens

from bmojo import BMojoLM, presets
from bmojo.memory.engines.engine import MemoryEngine
from bmojo.memory.storage import Storage
from bmojo.memory.store import Store

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 16,
         "window": 16, "chunk_size": 8, "eidetic_slots": 4, "ssm_head_dim": 8, "ssm_state_size": 4,
         "storage_layers": (0, 1), "storage_block": 8, "storage_keys": 2, "storage_stride": 4, "storage_queries": 2,
         "storage_blocks": 3}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = BMojoLM(presets.get("bmojo", "tiny", **SIZES)).eval()
    for parameter in model.parameters():  # attention that looks at something
        if parameter.ndim == 2:
            parameter.data *= 2
    return model


@torch.no_grad()
def read(model: BMojoLM, engine, forget: bool = False) -> torch.Tensor:
    """Logits of a stream that reads after another document, which may be forgotten in the middle."""
    store, found, state = Store(engine, publish=0), [], None
    model(draw_tokens(1, 60, seed=1), storage=Storage(model.config, 1, store=store, sources=["other"]))
    store.flush()
    storage = Storage(model.config, 1, store=store, sources=["mine"])
    for number, part in enumerate(draw_tokens(1, 100).split(20, 1)):
        if forget and number == 2:
            store.delete("other")
            engine.compact()
        logits, state = model(part, state, storage=storage)
        found.append(logits)
        store.flush()
    return torch.cat(found, 1)


@pytest.mark.parametrize("forget", [False, True])
def test_a_stream_reads_the_same_from_every_engine(model, store, forget):
    expected = read(model, MemoryEngine(), forget)
    close(read(model, store, forget), expected, 1e-5, type(store).__name__)
    if forget:
        assert (read(model, MemoryEngine()) - expected)[:, 40:].abs().max() > 1e-3
