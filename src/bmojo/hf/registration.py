"""Registers bmojo with the Auto classes of Transformers, without importing Transformers.

AutoConfig and AutoTokenizer learn of bmojo right after the module that defines them is imported, by whomever;
AutoModelForCausalLM when the first BMojoConfig is made, which comes before any model (`bmojo.hf.configuration`).
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register() -> None:
    """Register now what Transformers has loaded, and the rest as soon as it does. Harmless when called again."""
    finder = _WhenImported()
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            action(sys.modules[name])
        elif not any(isinstance(other, _WhenImported) for other in sys.meta_path):
            finder.waiting[name] = action
    if finder.waiting:
        sys.meta_path.insert(0, finder)


def _register_config(module: ModuleType) -> None:
    from bmojo.hf.configuration import BMojoConfig

    module.AutoConfig.register(BMojoConfig.model_type, BMojoConfig, exist_ok=True)


def _register_tokenizer(module: ModuleType) -> None:
    from bmojo.hf.configuration import BMojoConfig
    from bmojo.hf.tokenization import BMojoByteTokenizer

    module.AutoTokenizer.register(BMojoConfig, slow_tokenizer_class=BMojoByteTokenizer, exist_ok=True)


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.tokenization_auto": _register_tokenizer,
}


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls the action of a module in `waiting` once, right after it was imported."""

    def __init__(self) -> None:
        self.waiting: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        action = self.waiting.pop(fullname, None)  # gone from the list, the others find it
        if action is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, action)
        return spec


class _Then(importlib.abc.Loader):
    def __init__(self, loader: Any, action: Callable[[ModuleType], None]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action(module)

    def __getattr__(self, name: str) -> Any:  # a module's source, for inspect
        return getattr(self.loader, name)
