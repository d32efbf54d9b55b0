"""Models that read from storage equal their definition, written out query by query, however they are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import close, make_model, partitions, storage_configs
from hypothesis import given
from hypothesis import strategies as st
from literal import literal_model

from bmojo.memory.engines.engine import MemoryEngine
from bmojo.memory.storage import Storage
from bmojo.memory.store import Store


def embeddings(rows: int, time: int, size: int, seed: int) -> torch.Tensor:
    """No two alike, so that no two blocks have one score."""
    return torch.randn(rows, time, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(data=st.data())
@torch.no_grad()
def test_rows_of_any_age_equal_the_definition(data):
    """Rows with padding anywhere, in calls of any length, single tokens too, each keeping its own blocks."""
    config = data.draw(storage_configs())
    model = make_model(config, data.draw(st.integers(0, 99))).eval()
    time = data.draw(st.integers(1, 30))
    x = embeddings(2, time, config.hidden_size, time)
    mask = torch.rand(2, time, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) < 0.8
    storage, state, at, logits = Storage(config, 2, dtype=torch.float64), None, 0, []
    for length in data.draw(st.one_of(partitions(time), st.just([1] * time))):
        part = slice(at, at := at + length)
        padded = None if mask[:, part].all() else mask[:, part]
        out, state = model(x[:, part], state, mask=padded, storage=storage)
        logits.append(out)
    nothing = {layer: [] for layer in config.storage_layers}
    for row, mine in enumerate(mask):
        if mine.any():
            expected, blocks = literal_model(model, x[row, mine].numpy(), nothing)
            close(torch.cat(logits, 1)[row, mine], torch.from_numpy(expected), 1e-9, f"row {row}")
            for layer, whole in blocks.items():
                for got, want in zip(storage.layers[layer].own[row].blocks, whole, strict=False):
                    same_block(got, want, 1e-9)


def same_block(got, want, tolerance: float) -> None:
    assert got.start == want.start
    for name in ("k", "v"):
        close(*(torch.from_numpy(np.array(getattr(block, name))) for block in (got, want)), tolerance, name)
    close(
        torch.from_numpy(np.array(got.keys)), torch.from_numpy(want.keys.reshape(len(want.keys), -1)), tolerance, "keys"
    )


@pytest.mark.parametrize("publish", [1e9, 0], ids=["kept by the session", "released to the store"])
@given(data=st.data())
@torch.no_grad()
def test_a_store_with_other_sources_equals_the_definition(publish, data):
    config = data.draw(storage_configs())
    model = make_model(config, data.draw(st.integers(0, 99))).eval()
    engine, others = MemoryEngine(), {layer: [] for layer in config.storage_layers}
    for number in range(data.draw(st.integers(1, 2))):
        document = embeddings(1, data.draw(st.integers(1, 20)), config.hidden_size, 100 + number)
        name = f"document {number}"
        with Store(engine) as store:
            writing = Storage(config, store=store, sources=[name], dtype=torch.float32, find=False)
            writing.finish(model(document, storage=writing)[1].layers)
        for layer, blocks in literal_model(model, document[0].numpy())[1].items():
            stored = [b for b in engine.scan() if b.layer == layer and b.source == name]
            for got, want in zip(stored, blocks, strict=True):
                same_block(got, want, 1e-4)
            others[layer] += blocks
    time = data.draw(st.integers(1, 24))
    x = embeddings(1, time, config.hidden_size, time)
    storage = Storage(config, store=Store(engine, publish=publish), sources=["mine"], dtype=torch.float32)
    state, at, logits = None, 0, []
    for length in data.draw(partitions(time)):
        out, state = model(x[:, at : at + length], state, storage=storage)
        logits.append(out)
        storage.settle()
        at += length
    expected, _ = literal_model(model, x[0].numpy(), others)
    close(torch.cat(logits, 1)[0], torch.from_numpy(expected), 1e-4)
