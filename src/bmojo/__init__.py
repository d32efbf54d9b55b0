"""B'MOJO: sequence models whose layers read four memories.

    from bmojo import BMojoLM, presets
    model = BMojoLM(presets.bmojo("tiny", vocab_size=256))
    logits, state = model(tokens)

What needs torch is imported at first use. Where Transformers is installed, its Auto classes know bmojo from here on.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmojo import presets
    from bmojo.config import ModelConfig
    from bmojo.generate import Stream
    from bmojo.hf import BMojoByteTokenizer, BMojoCache, BMojoConfig, BMojoForCausalLM
    from bmojo.memory.composition import compose
    from bmojo.memory.state import MemoryState
    from bmojo.memory.states import StateStore
    from bmojo.memory.storage import Storage
    from bmojo.memory.store import Store
    from bmojo.nn.mixer import Mixer, Trace
    from bmojo.nn.model import BMojoLM

__version__ = "0.1.0"
__all__ = [
    "BMojoByteTokenizer",
    "BMojoCache",
    "BMojoConfig",
    "BMojoForCausalLM",
    "BMojoLM",
    "MemoryState",
    "Mixer",
    "ModelConfig",
    "StateStore",
    "Storage",
    "Store",
    "Stream",
    "Trace",
    "__version__",
    "compose",
    "presets",
]

_HOME = {
    "BMojoByteTokenizer": "bmojo.hf",
    "BMojoCache": "bmojo.hf",
    "BMojoConfig": "bmojo.hf",
    "BMojoForCausalLM": "bmojo.hf",
    "BMojoLM": "bmojo.nn.model",
    "MemoryState": "bmojo.memory.state",
    "Mixer": "bmojo.nn.mixer",
    "ModelConfig": "bmojo.config",
    "StateStore": "bmojo.memory.states",
    "Storage": "bmojo.memory.storage",
    "Store": "bmojo.memory.store",
    "Stream": "bmojo.generate",
    "Trace": "bmojo.nn.mixer",
    "compose": "bmojo.memory.composition",
}


if importlib.util.find_spec("transformers") is not None:
    from bmojo.hf.registration import register

    register()


def __getattr__(name: str) -> Any:
    if name == "presets":
        return importlib.import_module("bmojo.presets")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'bmojo' has no attribute {name!r}")
