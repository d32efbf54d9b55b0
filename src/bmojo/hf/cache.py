"""`past_key_values`: a thin adapter over MemoryState, for `generate` and whoever else carries a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from bmojo.errors import StateError
from bmojo.memory.state import MemoryState


class BMojoCache(Cache):
    """The memory of a model, and how many tokens were read through this cache.

        cache = BMojoCache()                      # nothing read yet; a forward pass fills it
        cache = BMojoCache(MemoryState.load(...)) # goes on from a state: give `generate` the new tokens alone

    `state` is a copy to keep: the cache itself is written to in place. A memory that fades can't be cut back
    (`crop`), so whatever needs that, such as assisted generation, is refused.
    """

    def __init__(self, state: MemoryState | None = None) -> None:
        super().__init__(layers=[])
        self._state = None if state is None else state.clone()
        self._length = 0

    @property
    def state(self) -> MemoryState | None:
        return None if self._state is None else self._state.clone()

    def take(self) -> MemoryState | None:
        """The state itself, for the forward pass that will `put` its successor."""
        return self._state

    def put(self, state: MemoryState, tokens: int) -> None:
        """Keep the state that came after `tokens` more tokens (padding included)."""
        self._state, self._length = state, self._length + tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read through this cache, padding included."""
        return self._length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is none."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older Transformers

    @property
    def batch_size(self) -> int:
        """Rows, -1 before the first."""
        return -1 if self._state is None else self._state.batch_size

    def __len__(self) -> int:
        return 0 if self._state is None else len(self._state.layers)

    def __repr__(self) -> str:
        held = "empty" if self._state is None else f"{self._state.batch_size} rows, {self._state.nbytes:,} bytes"
        return f"BMojoCache({self._length} tokens read, {held})"

    @property
    def is_initialized(self) -> bool:
        return self._state is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        self._state, self._length = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        if self._state is not None:
            self._state = self._state.select(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._state is not None:
            self._state = self._state.repeat(repeats)

    def crop(self, *_: Any, **__: Any) -> None:
        raise StateError(
            "a B'MOJO memory can't be cut back to an earlier token; keep `cache.state` before you go on, "
            "and leave assisted generation off"
        )

    def update(self, *_: Any, **__: Any) -> Any:
        raise StateError("a BMojoCache is read by bmojo models alone; give another model its own kind of cache")
