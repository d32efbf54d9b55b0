"""The state of a model as a value: take it out, select rows, move it, save it, go on from it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bmojo.config import ModelConfig
from bmojo.errors import ConfigError, StateError
from bmojo.files import write_whole
from bmojo.memory.digest import digest
from bmojo.memory.spec import CACHE_BLOCK, Entry, layer_spec

FORMAT = "bmojo.memory-state"
VERSION = 1
EXTRA = "extra."
DTYPES = {
    "verbatim": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
    "exact": (torch.float32, torch.float64),
    "integer": (torch.int64,),
}


@dataclass(frozen=True)
class MemoryState:
    """Everything that a model remembers of the tokens so far: one dict of tensors a layer, batch first.

    The names of the tensors are documented in `bmojo.memory.spec`. Each method returns a new state.
    `note` is whatever in JSON, and `extra` whatever in tensors, the saver wants to find again; no model reads it.
    """

    config: ModelConfig
    layers: tuple[dict[str, Tensor], ...]
    note: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)

    @property
    def position(self) -> Tensor:
        """[batch]: tokens read of the current document."""
        return self.layers[0]["position"]

    @property
    def document(self) -> Tensor:
        """[batch]: the id of the current document, -1 if none was ever given."""
        return self.layers[0]["document"]

    @property
    def batch_size(self) -> int:
        return self.position.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held, all layers, all rows."""
        return sum(self.layer_nbytes())

    def layer_nbytes(self) -> list[int]:
        return [sum(tensor.nbytes for tensor in layer.values()) for layer in self.layers]

    def map(self, change: Callable[[Tensor], Tensor]) -> MemoryState:
        layers = tuple({name: change(tensor) for name, tensor in layer.items()} for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    def select(self, rows: Tensor | list[int]) -> MemoryState:
        """The given batch rows, in the given order; a row may be taken more than once (beams)."""
        index = torch.as_tensor(rows, device=self.position.device)
        if index.dtype == torch.bool or index.is_floating_point():
            raise StateError(f"rows must be indices, got {index.dtype}; take mask.nonzero()[:, 0] of a mask")
        index = index.long()
        if index.ndim != 1 or (index.numel() and not bool(((index >= 0) & (index < self.batch_size)).all())):
            raise StateError(f"rows must be a list of indices below the batch size {self.batch_size}, got {rows}")
        return self.map(lambda tensor: tensor.index_select(0, index))

    def repeat(self, times: int) -> MemoryState:
        """Each row `times` times, at least once, one after the other."""
        if times < 1:
            raise StateError(f"times must be at least 1, got {times}")
        return self.map(lambda tensor: tensor.repeat_interleave(times, 0))

    @classmethod
    def cat(cls, states: Sequence[MemoryState]) -> MemoryState:
        """The rows of all `states`, at least one, of one model and dtype: streams of any lengths in one batch."""
        first, *others = states
        for state in others:
            require_same(state.config, first.config)
            if any(a.keys() != b.keys() for a, b in zip(state.layers, first.layers, strict=True)):
                raise StateError("of the states some are tracked and some are not; they can't be one batch")

        def joined(rows: list[Tensor]) -> Tensor:
            if len({(row.dtype, row.device) for row in rows}) > 1:
                raise StateError("states of different dtypes or devices can't be one batch; use state.to")
            if rows[0].ndim > 1:  # caches that grow are as long as the longest
                longest = max(row.shape[1] for row in rows)
                rows = [F.pad(row, (0, 0) * (row.ndim - 2) + (0, longest - row.shape[1])) for row in rows]
            return torch.cat(rows)

        layers = zip(*(state.layers for state in states), strict=True)
        return cls(
            first.config, tuple({name: joined([part[name] for part in layer]) for name in layer[0]} for layer in layers)
        )

    def split(self) -> list[MemoryState]:
        """Its rows, each a copy of its own; what `cat` made longer is cut again."""
        rows = [self.select([row]) for row in range(self.batch_size)]
        return [_cut_caches(row) for row in rows]

    def detach(self) -> MemoryState:
        return self.map(lambda tensor: tensor.detach())

    def clone(self) -> MemoryState:
        return self.map(lambda tensor: tensor.clone())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MemoryState:
        """Move; `dtype` changes verbatim rows (keys, values, convolution tails), never scores or recurrent states."""

        layers = []
        for kind, layer in zip(self.config.kinds, self.layers, strict=True):
            spec = layer_spec(self.config, kind, tracked=True)
            kept = {name: dtype if spec[name].kind == "verbatim" else None for name in layer}
            layers.append({name: tensor.to(device=device, dtype=kept[name]) for name, tensor in layer.items()})
        return dataclasses.replace(self, layers=tuple(layers))

    def tracked(self) -> MemoryState:
        """The empty state, with the transition of each SSM kept beside its state from here on, for `memory.compose`:

            h after a document = A h before it + (h after it from the empty state)

        `transition` is log A where that is diagonal (ssd, s6), and the matrix A for gdn. The same number of tokens, in
        any calls, with any padding, makes it; a document id may not change on the way.
        Raises StateError for a state that has read something.
        """
        if bool(self.position.any()):
            raise StateError(
                f"a state is tracked from its first token on, got one that has read {int(self.position.max())}; "
                "start from model.empty_state().tracked()"
            )
        layers = []
        for kind, layer in zip(self.config.kinds, self.layers, strict=True):
            spec, new = layer_spec(self.config, kind, tracked=True), dict(layer)
            if "transition" in spec:
                start = layer["ssm"].new_zeros(self.batch_size, *spec["transition"].shape)
                if self.config.ssm == "gdn":
                    start = start + torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
                new["transition"] = start
            layers.append(new)
        return dataclasses.replace(self, layers=tuple(layers))

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {
            f"layers.{i}.{name}": tensor.contiguous().clone()
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.items()
        }
        tensors |= {f"{EXTRA}{name}": tensor.contiguous().clone() for name, tensor in self.extra.items()}
        metadata = {"format": FORMAT, "version": str(VERSION), "config": json.dumps(self.config.to_dict())}
        metadata |= {"note": json.dumps(self.note), "digest": digest(tensors)}
        write_whole(Path(path), save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike, config: ModelConfig | None = None, device: str = "cpu") -> MemoryState:
        """Read what `save` wrote. Raises StateError if it is no such file, is newer, or belongs to another `config`."""
        path = Path(path)
        try:
            with safe_open(path, framework="pt", device=device) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise StateError(f"no memory state at {path}") from None
        except (SafetensorError, OSError) as error:
            raise StateError(f"{path} can't be read as a memory state: {error}") from None
        if metadata.get("format") != FORMAT:
            raise StateError(f"{path} is not a memory state: expected one that MemoryState.save wrote")
        try:
            if int(metadata["version"]) > VERSION:
                raise StateError(
                    f"{path} has state format {metadata['version']}, this bmojo reads up to {VERSION}; update bmojo"
                )
            saved = ModelConfig.from_dict(json.loads(metadata["config"]))
            note = json.loads(metadata.get("note", "{}"))
        except (KeyError, TypeError, json.JSONDecodeError, ConfigError) as error:
            raise StateError(f"{path} is damaged: its header can't be read ({error}); save the state again") from None
        except ValueError as error:
            if isinstance(error, StateError):
                raise
            raise StateError(
                f"{path} is damaged: its version is {metadata['version']!r}; save the state again"
            ) from None
        if config is not None:
            require_same(saved, config)
        if metadata.get("digest") not in (None, digest(tensors)):  # states of before have none
            raise StateError(f"{path} is damaged: its tensors are not those that were saved; save the state again")
        extra = {name: tensors.pop(name) for name in list(tensors) if name.startswith(EXTRA)}
        extra = {name.removeprefix(EXTRA): tensor for name, tensor in extra.items()}
        return cls(saved, _layers(tensors, saved, path), note, extra)


def _layers(tensors: dict[str, Tensor], config: ModelConfig, path: Path) -> tuple[dict[str, Tensor], ...]:
    """The tensors of a state file by layer, or StateError unless they are those of `config`."""
    layers: list[dict[str, Tensor]] = []
    tracked = any(name.endswith(".transition") for name in tensors)
    specs = [layer_spec(config, kind, tracked=tracked) for kind in config.kinds]
    known = {f"layers.{i}.{name}" for i, spec in enumerate(specs) for name in spec}
    if foreign := sorted(tensors.keys() - known):
        raise StateError(f"{path} is damaged: it holds {foreign[0]}, which this model has not; save the state again")
    for i, (kind, spec) in enumerate(zip(config.kinds, specs, strict=True)):
        layer = {}
        for name, entry in spec.items():
            tensor = tensors.get(f"layers.{i}.{name}")
            grows = name in ("k", "v") and config.window_of(kind) is None
            shape = None if tensor is None else tuple(tensor.shape[2 if grows else 1 :])
            if tensor is None or shape != entry.shape[grows:]:
                raise StateError(
                    f"{path} is damaged: layers.{i}.{name} is {'missing' if tensor is None else tuple(tensor.shape)}, "
                    f"expected [batch, {', '.join(map(str, entry.shape))}]; save the state again"
                )
            _require_dtype(f"{path} is damaged: layers.{i}.{name}", entry, tensor.dtype)
            layer[name] = tensor
        layers.append(layer)
    if any(bool((layer["position"] < 0).any()) for layer in layers):
        raise StateError(f"{path} is damaged: it has read fewer tokens than none; save the state again")
    if len({tensor.shape[0] for layer in layers for tensor in layer.values()}) != 1:
        raise StateError(f"{path} is damaged: its tensors differ in batch size; save the state again")
    return tuple(layers)


def _cut_caches(row: MemoryState) -> MemoryState:
    """A state of one row, its caches that grow no longer than they need to be."""
    size = -(-int(row.position) // CACHE_BLOCK) * CACHE_BLOCK
    layers = []
    for kind, layer in zip(row.config.kinds, row.layers, strict=True):
        grows = row.config.parts(kind).attention and row.config.window_of(kind) is None
        cut = {name: layer[name][:, :size].clone() for name in ("k", "v")} if grows else {}
        layers.append(layer | cut)
    return dataclasses.replace(row, layers=tuple(layers))


def require_fit(state: MemoryState, config: ModelConfig, batch: int, dtype: torch.dtype) -> None:
    """Raise StateError unless `state` can go on in a model of `config` and `dtype` with `batch` rows of tokens."""
    require_same(state.config, config)
    if state.batch_size != batch:
        raise StateError(
            f"the state has batch size {state.batch_size}, the tokens {batch}; use state.select or state.repeat "
            "(of a cache: batch_select_indices, batch_repeat_interleave)"
        )
    autocast = torch.is_autocast_enabled(state.position.device.type)
    for name, entry in _first_layer(config).items():
        got = state.layers[0][name].dtype
        if entry.kind == "verbatim" and got != dtype and not autocast:
            raise StateError(f"the state holds {got} rows, the model {dtype}; use state.to(dtype={dtype})")
        _require_dtype(f"{name} of the state", entry, got)


@functools.lru_cache(maxsize=64)  # asked for every token
def _first_layer(config: ModelConfig) -> dict[str, Entry]:
    return layer_spec(config, config.kinds[0])


def _require_dtype(name: str, entry: Entry, got: torch.dtype) -> None:
    if got not in DTYPES[entry.kind]:
        allowed = " or ".join(map(str, DTYPES[entry.kind]))
        raise StateError(f"{name} must be {allowed}, got {got}; save the state again")


def require_same(saved: ModelConfig, config: ModelConfig) -> None:
    """Raise StateError unless a state of `saved` fits a model of `config`."""
    if saved is not config and saved != config:
        ours, theirs = config.to_dict(), saved.to_dict()
        name = next(name for name in ours if ours[name] != theirs[name])
        raise StateError(
            f"the state belongs to another model: {name} is {ours[name]!r} here and {theirs[name]!r} in the state; "
            "load the state with the model that made it"
        )
