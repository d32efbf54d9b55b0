"""A store together with the model that it is of."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from bmojo.errors import ConfigError

if TYPE_CHECKING:
    from bmojo.memory.store import Store
    from bmojo.nn.model import BMojoLM


def open_with(
    model: BMojoLM, path: str, *, mode: str, engine: str | None = None, stride: int | None = None,
    blocks: int | None = None,
) -> tuple[BMojoLM, Store]:  # fmt: skip
    """The store at `path`, and the model with the settings of storage that this store was made with. A model without
    any, with a new store, gets it in its last layer that can have it, and a warning."""
    from bmojo.memory.store import Store, stored_settings

    changes = stored_settings(path) or {}
    if not changes and not model.config.storage_layers:
        able = [i for i, kind in enumerate(model.config.kinds) if model.config.parts(kind).attention]
        able = [i for i in able if model.config.window_of(model.config.kinds[i]) is not None]
        if not able:
            raise ConfigError(
                "no layer of this model can have storage: expected one that reads a window; train another"
            )
        changes = {"storage_layers": (able[-1],)}
        warnings.warn(
            f"the model was not trained to read from storage; layer {able[-1]} does. A short training with "
            f"--set storage_layers={able[-1]} teaches it",
            stacklevel=2,
        )
    changes |= {name: n for name, n in (("storage_stride", stride), ("storage_blocks", blocks)) if n is not None}
    if any(getattr(model.config, name) != value for name, value in changes.items()):
        model = model.with_settings(**changes)
    return model, Store.open(path, model, mode=mode, engine=engine)
