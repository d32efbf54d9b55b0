"""What a layer's state consists of, as a table in numbers."""

from __future__ import annotations

import pytest
from cases import small_preset

from bmojo.config import ModelConfig
from bmojo.memory.spec import CACHE_BLOCK, Entry, fading_entries, innovation_dim, layer_spec, ssm_channels

WIDE = {"vocab_size": 13, "hidden_size": 24, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 10,
        "chunk_size": 4, "window": 12, "conv_size": 3, "ssm_expand": 2, "ssm_head_dim": 6, "ssm_state_size": 5,
        "ssm_groups": 2, "ssm_conv": 7, "fading_span": 8, "eidetic_slots": 9}  # fmt: skip


def table(config: ModelConfig, context: int = 0) -> dict[str, tuple]:
    return {name: (*entry.shape, entry.kind) for name, entry in layer_spec(config, config.kinds[0], context).items()}


COUNTERS = {"position": ("integer",), "document": ("integer",)}
SSM = {"ssm": (8, 5, 6, "exact"), "ssm_conv": (6, 48 + 2 * 2 * 5, "verbatim")}
WINDOW = {"conv": (2, 24, "verbatim"), "k": (12, 2, 10, "verbatim"), "v": (12, 2, 10, "verbatim")}
FADING = {"fading_k": (20, 2, 10, "verbatim"), "fading_v": (20, 2, 10, "verbatim")}
SLOTS = {"slot_k": (9, 2, 10, "verbatim"), "slot_v": (9, 2, 10, "verbatim"), "slot_score": (9, "exact"),
         "slot_position": (9, "integer"), "pending": (4, "exact")}  # fmt: skip


@pytest.mark.parametrize(
    ("innovation", "own"),
    [
        ("rls", {"rls_A": (24, 24, "exact"), "rls_M": (24, 24, "exact")}),
        ("ema", {"ema": (24, "exact")}),
        ("head", {"last_y": (24, "verbatim")}),
        ("state", {}),
        ("random", {}),
    ],
)
def test_a_layer_with_every_memory(innovation, own):
    config = ModelConfig(**WIDE, innovation=innovation)
    assert table(config) == COUNTERS | SSM | WINDOW | FADING | SLOTS | own
    assert list(table(config))[:2] == ["position", "document"]


def test_what_a_layer_has_not_it_does_not_store():
    config = ModelConfig(**WIDE, innovation="rls", innovation_dim=7)
    assert table(config)["rls_A"] == table(config)["rls_M"] == (7, 7, "exact")
    assert table(config.replace(fading="summary"))["fading_k"] == (5, 2, 10, "verbatim")
    assert table(config.replace(fading_span=0, eidetic_slots=0, conv_size=0)) == COUNTERS | {
        name: WINDOW[name] for name in "kv"
    }
    assert table(config.replace(pattern=["ssm"], fading_span=0, eidetic_slots=0)) == COUNTERS | SSM
    attention = config.replace(pattern=["attention"], fading_span=0, eidetic_slots=0)
    assert table(attention) == COUNTERS | WINDOW
    for context, rows in ((0, 0), (1, CACHE_BLOCK), (CACHE_BLOCK, CACHE_BLOCK), (CACHE_BLOCK + 1, 2 * CACHE_BLOCK)):
        assert table(attention.replace(window=None), context)["k"] == (rows, 2, 10, "verbatim")
    full = config.replace(pattern=["full"], fading_span=0, eidetic_slots=0)  # whatever the window of other layers
    assert table(full, 3) == COUNTERS | WINDOW | {name: (256, 2, 10, "verbatim") for name in "kv"}
    assert CACHE_BLOCK == 256


def test_derived_sizes():
    config = ModelConfig(**WIDE)
    assert (ssm_channels(config), fading_entries(config), innovation_dim(config)) == (68, 20, 24)
    assert fading_entries(config.replace(fading="summary")) == 5
    assert innovation_dim(small_preset("bmojo", innovation_dim=5)) == 5


def test_bytes_of_an_entry():
    widths = {"verbatim": (4, 2, 8), "exact": (4, 4, 8), "integer": (8, 8, 8)}
    for kind, (usual, half, double) in widths.items():
        entry = Entry((2, 3), kind)
        assert (entry.nbytes(), entry.nbytes(2), entry.nbytes(8)) == (6 * usual, 6 * half, 6 * double)
        assert Entry((), kind).nbytes() == usual
