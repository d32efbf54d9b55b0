"""Which form of an op runs: one place decides, and `use_backend` overrides it."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bmojo.errors import ConfigError, nearest

BACKENDS = ("fused", "chunked", "naive")
_log = logging.getLogger("bmojo.ops")
_backend = "fused"  # a plain global: compilers can guard on it
_target: str | None = None  # the type of device that a program is being traced for, if not the one it runs on
_kernels: dict[str, Callable[..., Any] | None] = {}  # by "module:name", once asked for; None: it can't be had here


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block every op runs in the named form.

    "fused" (default): the kernel that is made for the device of the op's first argument, where there is one; else, and
    for ops without one, "chunked": matmuls in plain PyTorch. "naive": the definition; slow.

    Gradients of gradients and the transforms of `torch.func` need "chunked" on a CPU: kernels have gradients alone.
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


@contextmanager
def lowering_for(device: str) -> Iterator[None]:
    """Inside the block ops take the forms that are made for a type of device, such as "xla", wherever their tensors
    are: a program is traced on the CPU to be compiled for another machine. For the whole process, as `use_backend`."""
    global _target
    before, _target = _target, device
    try:
        yield
    finally:
        _target = before


def device_type(x: torch.Tensor) -> str:
    """The type of device that an op on `x` is made for: that of `lowering_for`, or where `x` is. Neuron's own and
    torchax's are "xla": what they run is compiled from the same operators."""
    kind = _target or x.device.type
    return "xla" if kind in ("neuron", "jax") else kind


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What tells of an op's arguments where they are."""
    return next(z for z in (*args, *kwargs.values()) if isinstance(z, Tensor))


def dispatched(
    *, chunked: Callable[..., Any], naive: Callable[..., Any], fused: Mapping[str, str] | None = None
) -> Callable[..., Any]:
    """One callable for an op's forms, which share a signature.

    `fused` names kernels as "module:function" by `device_type`. The module is imported at the first call, or when a
    compiler traces that call; if that fails (a package, a compiler or a driver is missing) that is warned of once, and
    the chunked form runs. A kernel hands arguments that it is not made for, such as mixed dtypes, to that form itself.
    """
    kernels = dict(fused or {})

    @functools.wraps(chunked)
    def op(*args: Any, **kwargs: Any) -> Any:
        if _backend == "naive":
            return naive(*args, **kwargs)
        if not kernels or _backend != "fused":
            return chunked(*args, **kwargs)
        path = kernels.get(device_type(first_tensor(args, kwargs)))
        kernel = _kernels[path] if path is not None and _is_here(path) else None
        return (kernel or chunked)(*args, **kwargs)

    return op


@torch.compiler.assume_constant_result  # a compiler runs it while it traces
def _is_here(path: str) -> bool:
    if path not in _kernels:
        _kernels[path] = _load(path)
    return _kernels[path] is not None


def _load(path: str) -> Callable[..., Any] | None:
    module, name = path.split(":")
    try:
        kernel = getattr(importlib.import_module(module), name)
    except Exception as error:  # a driver or a toolchain that does not fit says so in many ways
        _kernels[path] = None  # also where warnings are errors
        why = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        warnings.warn(f"no fused {name}, the chunked form runs, which is slower: {why}", stacklevel=4)
        return None
    _log.info("%s runs in %s", name, module)
    return kernel
