"""The two registries: methods, and the kinds of nodes.

Everything that enumerates methods (the command line, the configs, the contract tests) reads these registries,
so a new method needs its own file and nothing else. Third parties register methods by decorator or through
the entry-point group ``lowrank_ft.methods``, whose entries name a module to import.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from lowrank_ft.errors import RegistryError, did_you_mean


class Named(Protocol):
    """A class with the attribute ``name``, such as :class:`lowrank_ft.algorithms.base.Method`."""

    name: ClassVar[str]


class Kind(Protocol):
    """A class with the attribute ``kind``, such as :class:`lowrank_ft.structure.node.Node`."""

    kind: ClassVar[str]


T = TypeVar("T")
MethodT = TypeVar("MethodT", bound=type[Named])
NodeT = TypeVar("NodeT", bound=type[Kind])

ENTRY_POINT_GROUP = "lowrank_ft.methods"


class Registry(Generic[T], Mapping[str, T]):
    """A mapping of names to classes that refuses duplicates, and suggests the nearest name in errors."""

    def __init__(self, what: str, populate: Callable[[], None]) -> None:
        self._what = what
        self._populate = populate
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> None:
        """Register ``entry`` under ``name``.

        Raises:
            RegistryError: the name is taken by something else.
        """
        taken = self._entries.get(name)
        if taken is not None and taken is not entry:
            raise RegistryError(f"{self._what} {name!r} is registered twice: by {taken!r} and by {entry!r}.")
        self._entries[name] = entry

    def remove(self, name: str) -> None:
        """Forget ``name`` (for tests and interactive redefinition)."""
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            self._populate()
        try:
            return self._entries[name]
        except KeyError:
            names = ", ".join(sorted(self._entries))
            raise RegistryError(
                f"There is no {self._what} {name!r}.{did_you_mean(name, self._entries)} Known: {names}."
            ) from None

    def __contains__(self, name: object) -> bool:
        self._populate()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._populate()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._populate()
        return len(self._entries)


def _import_methods() -> None:
    """Import all built-in and all installed third-party methods; raise if an import fails."""
    package = importlib.import_module("lowrank_ft.algorithms")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"lowrank_ft.algorithms.{module.name}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        _load_entry_point(entry)


def _load_entry_point(entry: EntryPoint) -> None:
    try:
        entry.load()
    except Exception as error:
        owner = f" of the package {entry.dist.name!r}" if entry.dist else ""
        raise RegistryError(
            f"The method plugin {entry.name!r}{owner} ({entry.value}) failed to import: "
            f"{type(error).__name__}: {error}. Fix or uninstall it."
        ) from error


methods: Registry[Any] = Registry("method", _import_methods)  # subclasses of Method
nodes: Registry[Any] = Registry("node kind", _import_methods)  # subclasses of Node


def register_method(cls: MethodT) -> MethodT:
    """Class decorator: register a :class:`~lowrank_ft.algorithms.base.Method` under its ``name``."""
    methods.add(cls.name, cls)
    return cls


def register_node(cls: NodeT) -> NodeT:
    """Class decorator: register a :class:`~lowrank_ft.structure.node.Node` under its ``kind``."""
    nodes.add(cls.kind, cls)
    return cls
