"""Which form of an op runs: one place decides, and `use_backend` overrides it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from bmojo.errors import ConfigError, nearest

BACKENDS = ("chunked", "naive")
_backend: ContextVar[str] = ContextVar("bmojo_backend", default="chunked")
_log = logging.getLogger("bmojo.ops")


@functools.cache
def _announce(backend: str) -> None:
    _log.info("sequence ops run in their %s form", backend)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block every op runs in the named form: "chunked" (default) or "naive" (the definition; slow)."""
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend {name!r}; {nearest(name, BACKENDS)}")
    token = _backend.set(name)
    try:
        yield
    finally:
        _backend.reset(token)


def dispatched(**forms: Callable[..., Any]) -> Callable[..., Any]:
    """One callable for an op's forms, which share a signature."""

    @functools.wraps(forms["chunked"])
    def op(*args: Any, **kwargs: Any) -> Any:
        backend = _backend.get()
        _announce(backend)
        return forms[backend](*args, **kwargs)

    return op
