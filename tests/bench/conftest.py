"""Small models, and the results of a run that never was."""

import pytest
from bench_made import made_cell, made_entry, made_results

SMALL = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "ssm_head_dim": 8, "window": 16, "chunk_size": 8,
         "eidetic_slots": 8, "vocab_size": 32}  # fmt: skip


@pytest.fixture
def small():
    return dict(SMALL)


@pytest.fixture
def results():
    cells = []
    for time, theirs in ((512, 0.3), (2048, 0.8)):
        ours = time / 2048
        pair = [made_entry("bmojo", ours, ours), made_entry("transformers", theirs, ours, rival=True, parameters=1234)]
        cells.append(made_cell("train", "mamba2", time, pair))
        family = [made_entry("bmojo", ours, ours), made_entry("mamba2", 0.5 * ours, ours),
                  made_entry("transformer", 2 * ours, ours)]  # fmt: skip
        cells.append(made_cell("train", "family", time, family))
        both = [made_entry("bmojo", ours, ours), made_entry("bmojo, checkpointed", ours, ours)]
        cells.append(made_cell("memory", "training", time, both))
    cells.append(
        made_cell("ops", "s6", 1024, [made_entry("bmojo", 1, 1)], absent={"mambapy": "not installed: mambapy"})
    )
    for context in (1024, 8192):
        family = [made_entry("bmojo", 1, 1), made_entry("transformer", context / 1024, 1)]
        cells.append(made_cell("decode", "family", context, family, axis="context", **{"pass": "decode"}))
    stream = {"growth_bytes": 4_000_000, "tokens_per_second": 1e4, "state_bytes": 1000,
              "samples": [[512, 2**28], [1024, 2**28]]}  # fmt: skip
    cells.append(made_cell("stream", "bmojo", 1_000_000, stream, axis="tokens", **{"pass": "forward"}))
    return made_results(cells)
