"""A session of storage as a value: what goes with the state of a model, and can be saved beside it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from bmojo.errors import StateError
from bmojo.memory.engines import Block, decode, encode
from bmojo.memory.engines.block import frame_length
from bmojo.memory.faded import Faded

if TYPE_CHECKING:
    from bmojo.memory.store import Store

RINGS = ("tokens", "asking", "score")


@dataclass(frozen=True, eq=False)
class Mark:
    """A session of storage at one moment: what goes with the state of the model. A value, as that is.

    Of each row: the names of its source and of those whose past it shares, up to a position; tokens read; blocks handed
    to the store under its name; the position from which on the session keeps its own blocks. `rings` holds the last
    tokens and, of each layer, what its blocks and its questions are made of; `found` and `own`, of each layer and row,
    the blocks found for the stride it is in, and its own; `faded`, with decay, its weights.
    """

    sources: tuple[str, ...]
    ancestors: tuple[dict[str, int], ...]
    positions: tuple[int, ...]
    handed: tuple[int, ...]
    released: tuple[int, ...]
    generation: int
    rings: dict[str, Tensor]
    found: dict[int, tuple[tuple[Block, ...], ...]]
    own: dict[int, tuple[tuple[Block, ...], ...]]
    faded: dict[int, tuple[Faded, ...]] = dataclasses.field(default_factory=dict)

    _ROWS: ClassVar = ("sources", "ancestors", "positions", "handed", "released")

    @classmethod
    def cat(cls, marks: Sequence[Mark]) -> Mark:
        """One of all their rows; they are of one model, all or none with decay, all or none a token old or more."""
        rows = {name: tuple(itertools.chain(*(getattr(mark, name) for mark in marks))) for name in cls._ROWS}
        rings = {name: torch.cat([mark.rings[name] for mark in marks]) for name in marks[0].rings}
        if len({row.decay.policy for mark in marks for rows in mark.faded.values() for row in rows}) > 1:
            raise StateError("streams with decay of other half-lives can't be in one batch; read them one by one")
        found, own, faded = (
            {
                layer: tuple(itertools.chain(*(getattr(mark, name)[layer] for mark in marks)))
                for layer in getattr(marks[0], name)
            }
            for name in ("found", "own", "faded")
        )
        newest = max(mark.generation for mark in marks)
        return cls(generation=newest, rings=rings, found=found, own=own, faded=faded, **rows)

    def split(self) -> list[Mark]:
        """One of each row."""
        return [
            Mark(
                generation=self.generation,
                rings={name: ring[row : row + 1] for name, ring in self.rings.items()},
                found={layer: blocks[row : row + 1] for layer, blocks in self.found.items()},
                own={layer: blocks[row : row + 1] for layer, blocks in self.own.items()},
                faded={layer: rows[row : row + 1] for layer, rows in self.faded.items()},
                **{name: getattr(self, name)[row : row + 1] for name in self._ROWS},
            )
            for row in range(len(self.sources))
        ]

    def to_tensors(self) -> dict[str, Tensor]:
        """As tensors that a file can hold. Of the blocks of other sources they hold the ids alone: what is forgotten is
        to be gone."""
        facts: dict[str, Any] = {name: getattr(self, name) for name in (*self._ROWS, "generation")}
        if self.faded:
            facts["decay"] = {layer: [row.to_dict() for row in rows] for layer, rows in self.faded.items()}
        tensors = dict(self.rings)
        for name in ("found", "own"):
            for layer, rows in getattr(self, name).items():
                for row, blocks in enumerate(rows):
                    mine = {self.sources[row], *self.ancestors[row]}
                    ids = [-1 if block.source in mine else block.id for block in blocks]
                    facts[f"{name}.{layer}.{row}"] = ids
                    frames = (encode(block) for block in blocks if block.source in mine)
                    tensors[f"{name}.{layer}.{row}"] = _bytes(b"".join(frames))
        tensors["facts"] = _bytes(json.dumps(facts).encode())
        return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], store: Store | None = None) -> Mark:
        """The inverse, with the `store` that it was made with. Raises StateError for what is none of its work."""

        def others(number: int) -> Block | None:
            return None if store is None else store.get(number)

        try:
            facts = json.loads(tensors["facts"].cpu().numpy().tobytes())
            rows = {name: tuple(facts[name]) for name in cls._ROWS}
            parts: dict[str, dict[int, list[tuple[Block, ...]]]] = {"found": {}, "own": {}}
            there: dict[str, list[bool]] = {}
            for name in sorted(tensors, key=_by_number):
                kind, *where = name.split(".")
                if kind in parts:
                    mine = iter(_blocks(tensors[name].cpu().numpy().tobytes()))
                    blocks = [next(mine) if number < 0 else others(number) for number in facts[name]]
                    there[name] = [block is not None for block in blocks]
                    parts[kind].setdefault(int(where[0]), []).append(tuple(b for b in blocks if b is not None))
            found, own = ({layer: tuple(all_rows) for layer, all_rows in parts[kind].items()} for kind in parts)
            rings = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in RINGS}
            faded = {
                int(layer): tuple(Faded.from_dict(d).only(there[f"found.{layer}.{row}"]) for row, d in enumerate(each))
                for layer, each in facts.get("decay", {}).items()
            }
            return cls(generation=facts["generation"], rings=rings, found=found, own=own, faded=faded, **rows)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise StateError(f"what was saved of a storage is damaged ({error}); save the stream again") from None


def _bytes(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _blocks(data: bytes) -> tuple[Block, ...]:
    """Of the frames in `data`, one after the other."""
    found = []
    while data:
        found.append(decode(data))
        data = data[frame_length(data) :]
    return tuple(found)


def _by_number(name: str) -> list[int]:
    return [int(part) for part in name.split(".")[1:]]
