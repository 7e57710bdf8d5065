"""The base class of modules that host adapters: a base, named parts, and the names of the active ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lowrank_ft.structure.node import Node
from lowrank_ft.structure.replacement import Replacement, node_of


class Host(Replacement):
    """A module that replaces another, its unchanged base, and adds named parts, one for each adapter.

    Attributes:
        base: the module that the host replaced.
        parts: each adapter's module, by adapter name.
        nodes: the structure of each part.
        active: names of the active adapters; the others are kept, frozen and unused.
        running: the parts of the active adapters.
    """

    active: tuple[str, ...]
    running: tuple[nn.Module, ...]

    def __init__(self, base: nn.Module, like: Tensor | None) -> None:
        super().__init__(like)
        self.base = base
        self.parts = nn.ModuleDict()
        self.nodes: dict[str, Node] = {}
        self.use(())
        self.train(base.training)

    def attach(self, name: str, node: Node, part: nn.Module) -> None:
        """Add the part of an adapter and make it the only active one."""
        self.nodes[name] = node
        self.parts[name] = part.train(self.training)
        self.activate((name,))

    def detach(self, name: str) -> None:
        """Remove the part of an adapter."""
        del self.parts[name], self.nodes[name]
        self.activate(tuple(n for n in self.active if n != name))

    def check_active(self, names: Sequence[str]) -> None:
        """Raise ``StateError`` if these adapters cannot be active together on this module."""

    def activate(self, names: Sequence[str]) -> None:
        """Activate those of the named adapters that have a part here, and freeze all other parts."""
        self.use(tuple(name for name in names if name in self.parts))
        for name, part in self.parts.items():
            part.requires_grad_(name in self.active and self.trains(name))

    def use(self, names: tuple[str, ...]) -> None:
        """Run these adapters from now on, without changing ``requires_grad``."""
        self.active = names
        self.running = tuple(self.parts[name] for name in names)

    def trains(self, name: str) -> bool:
        """Whether the part of this adapter is trained when it is active."""
        return True

    def base_node(self) -> Node:
        """Return the structure of the base."""
        return node_of(self.base)

    @abstractmethod
    def merged(self) -> nn.Module:
        """Return a stock module with the same output as this host in its present state."""

    def __getattr__(self, name: str) -> Any:
        """Look unknown attributes (``in_features``, ``bias``, ``stride``) up on the base."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
            return getattr(self.base, name)
