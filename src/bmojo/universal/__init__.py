"""Universal prediction: Solomonoff's mixture, what approaches it (KT, CTW), the gap of a model, and compression.

table = SolomonoffTable.build(n_bits=16, depth=13, steps=1024)
table.conditional("010101").one
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmojo.universal.ctw import CTW
    from bmojo.universal.dataset import UniversalDataset
    from bmojo.universal.gap import InContext, ctw_gap, kalman_gap, solomonoff_gap
    from bmojo.universal.kt import KT
    from bmojo.universal.search import levin_search, speed_prior
    from bmojo.universal.table import SolomonoffTable

_HOME = {
    "CTW": "ctw",
    "InContext": "gap",
    "KT": "kt",
    "SolomonoffTable": "table",
    "UniversalDataset": "dataset",
    "ctw_gap": "gap",
    "kalman_gap": "gap",
    "levin_search": "search",
    "solomonoff_gap": "gap",
    "speed_prior": "search",
}
__all__ = [
    "CTW",
    "KT",
    "InContext",
    "SolomonoffTable",
    "UniversalDataset",
    "ctw_gap",
    "kalman_gap",
    "levin_search",
    "solomonoff_gap",
    "speed_prior",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"bmojo.universal.{_HOME[name]}"), name)
    raise AttributeError(f"module 'bmojo.universal' has no attribute {name!r}")
