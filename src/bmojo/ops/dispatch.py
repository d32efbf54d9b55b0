"""Which form of an op runs: one place decides, and `use_backend` overrides it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from bmojo.errors import ConfigError, nearest

BACKENDS = ("chunked", "naive")
_log = logging.getLogger("bmojo.ops")
_backend = "chunked"  # a plain global: compilers can guard on it


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block every op runs in the named form: "chunked" (default) or "naive" (the definition; slow).

    It holds for the whole process, not for one thread.
    """
    global _backend
    if name not in BACKENDS:
        raise ConfigError(f"unknown backend {name!r}; {nearest(name, BACKENDS)}")
    before, _backend = _backend, name
    _log.info("sequence ops run in their %s form", name)
    try:
        yield
    finally:
        _backend = before


def dispatched(**forms: Callable[..., Any]) -> Callable[..., Any]:
    """One callable for an op's forms, which share a signature."""

    @functools.wraps(forms["chunked"])
    def op(*args: Any, **kwargs: Any) -> Any:
        return forms[_backend](*args, **kwargs)

    return op
