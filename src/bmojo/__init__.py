"""B'MOJO: sequence models whose layers read four memories.

    from bmojo import BMojoLM, presets
    model = BMojoLM(presets.bmojo("tiny", vocab_size=256))
    logits, state = model(tokens)

What needs torch is imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmojo import presets
    from bmojo.config import ModelConfig
    from bmojo.memory.state import MemoryState
    from bmojo.nn.mixer import Mixer, Trace
    from bmojo.nn.model import BMojoLM

__version__ = "0.1.0"
__all__ = ["BMojoLM", "MemoryState", "Mixer", "ModelConfig", "Trace", "__version__", "presets"]

_HOME = {
    "BMojoLM": "bmojo.nn.model",
    "MemoryState": "bmojo.memory.state",
    "Mixer": "bmojo.nn.mixer",
    "ModelConfig": "bmojo.config",
    "Trace": "bmojo.nn.mixer",
}


def __getattr__(name: str) -> Any:
    if name == "presets":
        return importlib.import_module("bmojo.presets")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'bmojo' has no attribute {name!r}")
