"""The errors that users see. Each message says what is wrong and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowRankError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(LowRankError, ValueError):
    """An option is unknown, has the wrong type, or is out of range."""


class RegistryError(LowRankError, LookupError):
    """A method or node kind is unknown, registered twice, or failed to import."""


class TargetError(LowRankError, ValueError):
    """A target pattern matches nothing, or matches a layer that cannot be adapted."""


class StateError(LowRankError, RuntimeError):
    """The operation does not apply to the model's present state (already wrapped, nothing to unload…)."""


class CheckpointError(LowRankError, ValueError):
    """A checkpoint is damaged, incomplete, unsafe, or made for another base model."""


class StorageError(LowRankError, OSError):
    """A disk has too little free space for the files to be written."""


class NonFiniteError(LowRankError, ArithmeticError):
    """A loss or gradient became NaN or infinite."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the names closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.55)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
