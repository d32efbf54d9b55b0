"""Streams far longer than what their session keeps, with a store on disk."""

import pytest
import torch
from cases import close
from test_storage import small

from bmojo.memory.storage import Storage
from bmojo.memory.store import Store


@pytest.mark.slow
@torch.no_grad()
def test_20000_tokens_as_if_the_session_had_kept_all(tmp_path):
    """What was released to the store is found there as the session itself would have found it."""
    model = small("bmojo", storage_blocks=2)
    tokens = torch.randint(32, (1, 20_000), generator=torch.Generator().manual_seed(0))
    storages = [Storage(model.config, store=Store.open(tmp_path / "store", model, publish=0), dtype=torch.float16)]
    storages.append(Storage(model.config, dtype=torch.float16))
    states, most = [None, None], 0
    for number, part in enumerate(tokens.split(400, 1)):
        logits = [None, None]
        for i, storage in enumerate(storages):
            logits[i], states[i] = model(part, states[i], storage=storage)
        close(logits[0], logits[1], 1e-3, f"part {number}")
        for _ in range(3 if number % 10 == 0 else 0):
            for i, storage in enumerate(storages):
                logits[i], states[i] = model(part[:, :1], states[i], storage=storage)
            close(logits[0], logits[1], 1e-3, f"a token behind part {number}")
        storages[0].settle()
        most = max(most, *(len(kept.own[0].blocks) for kept in storages[0].layers.values()))
    session = storages[0]
    assert most <= 400 // 8 + 9
    assert max(len(session._ids), len(session._trails[0][1]) / 8) <= 2 * most
    assert len(storages[1].layers[0].own[0].blocks) > 2500
    session.store.close()
