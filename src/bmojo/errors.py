"""What bmojo raises when the user can mend it: what, what was expected, what was got, and how to mend it.

The command line prints such an error as one line and exits with code 2; anything else is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BMojoError(ValueError):
    """Base of every error that a user can mend."""


class ConfigError(BMojoError):
    """A setting that is unknown, out of range, or at odds with another."""


class DataError(BMojoError):
    """Text, a video, a tokenizer or a task that can't be read or is too short."""


class DivergenceError(BMojoError):
    """A training whose loss is no longer finite."""


class CheckpointError(BMojoError):
    """A model or run folder that is corrupt, foreign, or made with another configuration."""


class StateError(BMojoError):
    """A memory state that does not belong to this model, batch or format version."""


class StoreError(BMojoError):
    """A store of blocks or of states that is damaged, in use, or made by another model."""


class CompressionError(BMojoError):
    """A compressed file that is damaged, cut off, or made by another model."""


class RealizationError(BMojoError):
    """A linear system, or data to identify one from, that can't be worked with: unstable, not minimal, too short."""


class UniversalError(BMojoError):
    """A table, search or machine of universal prediction asked for what it can't give, or a file that is not one."""


class MissingPackageError(BMojoError):
    """An optional package that this feature needs."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The tail of an 'unknown name' message: the nearest known name, and the list of all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"
