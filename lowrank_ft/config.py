"""Configs are frozen dataclasses; this file turns mappings into them, strictly, and back.

A field's docstring is its help text, on the command line and in the method pages.
"""

from __future__ import annotations

import dataclasses
import typing
from argparse import ArgumentError
from collections.abc import Mapping
from typing import Any, TypeVar

from lowrank_ft.errors import ConfigError, did_you_mean

T = TypeVar("T")


def parse(
    cls: type[T], options: Mapping[str, Any], what: str = "", built: Mapping[str, Any] | None = None
) -> T:
    """Build the dataclass ``cls`` from ``options``, checking every name and type.

    Args:
        cls: a dataclass type.
        options: field names to values, as they come from keyword arguments, YAML or JSON.
        what: what error messages call the dataclass; its class name by default.
        built: further fields whose values are built already; they are not checked.

    Raises:
        ConfigError: an unknown option (with the nearest known one), a missing one, a wrong type, or a
            value that the dataclass itself rejects.
    """
    from jsonargparse import ArgumentParser

    what, built = what or cls.__name__, built or {}
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    check_names(options, fields, what)
    missing = [n for n, f in fields.items() if n not in options and n not in built and is_required(f)]
    if missing:
        raise ConfigError(f"{what} needs {', '.join(map(repr, missing))}.")

    hints = typing.get_type_hints(cls)
    parser = ArgumentParser(exit_on_error=False)
    for name in options:
        parser.add_argument(f"--{name}", type=hints[name])
    try:
        parsed = parser.instantiate(parser.parse_object(dict(options)))
    except ArgumentError as error:
        reason = " ".join(str(error).split()).replace("Parser key", "option")
        raise ConfigError(f"{what}: {reason}") from None
    return cls(**built, **{name: parsed[name] for name in options})


def check_names(options: Mapping[str, Any], fields: Mapping[str, Any], what: str) -> None:
    """Raise ``ConfigError`` for the first option that is not in ``fields``, and suggest the nearest field."""
    for name in options:
        if name not in fields:
            listing = ", ".join(sorted(fields)) or "none"
            raise ConfigError(
                f"{what} has no option {name!r}.{did_you_mean(name, fields)} It has: {listing}."
            )


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a dataclass field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass as plain JSON data: tuples become lists, nested dataclasses become mappings."""
    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def plain(value: Any) -> Any:
    """Return ``value`` as JSON data (see :func:`to_dict`)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value
