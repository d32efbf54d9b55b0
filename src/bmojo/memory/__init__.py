"""The memories of a layer as values: the layout of a call in chunks, rings, the unbounded cache, the eidetic set."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmojo.memory.composition import compose
    from bmojo.memory.state import MemoryState
    from bmojo.memory.states import StateStore

__all__ = ["MemoryState", "StateStore", "compose"]
_HOME = {
    "MemoryState": "bmojo.memory.state",
    "StateStore": "bmojo.memory.states",
    "compose": "bmojo.memory.composition",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'bmojo.memory' has no attribute {name!r}")
