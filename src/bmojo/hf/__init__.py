"""Transformers: configuration, model, cache and byte tokenizer, registered with its Auto classes on `import bmojo`.

Nothing here is imported before it is used, so that `import bmojo` needs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bmojo.hf.cache import BMojoCache
    from bmojo.hf.configuration import BMojoConfig
    from bmojo.hf.modeling import BMojoForCausalLM
    from bmojo.hf.tokenization import BMojoByteTokenizer

__all__ = ["BMojoByteTokenizer", "BMojoCache", "BMojoConfig", "BMojoForCausalLM"]

HOME = {
    "BMojoByteTokenizer": "bmojo.hf.tokenization",
    "BMojoCache": "bmojo.hf.cache",
    "BMojoConfig": "bmojo.hf.configuration",
    "BMojoForCausalLM": "bmojo.hf.modeling",
}


def __getattr__(name: str) -> Any:
    if name in HOME:
        return getattr(importlib.import_module(HOME[name]), name)
    raise AttributeError(f"module 'bmojo.hf' has no attribute {name!r}")
