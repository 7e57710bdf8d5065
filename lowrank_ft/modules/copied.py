"""A module with one copy for each adapter: for modules trained in full, and for batch norm statistics.

Heads, norms or embeddings that are trained in full (``modules_to_save``) get a trainable copy per adapter.
Batch norms, whose running statistics change in training even when they are frozen, get a frozen copy per
adapter: the changed statistics are saved with the adapter, and the base does not change.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from lowrank_ft.errors import StateError
from lowrank_ft.modules.host import Host
from lowrank_ft.structure.node import DenseNode, Node
from lowrank_ft.structure.registry import register_node


@register_node
@dataclass(frozen=True)
class CopyNode(Node):
    """A copy of a whole module. Its parameters may be trainable; its buffers change in training anyway."""

    kind: ClassVar[str] = "copy"
    trainable: bool = True

    def build(self, module: nn.Module, name: str = "") -> nn.Module:
        """Return the copy, which starts with the values of ``module``."""
        return copy.deepcopy(module)


@register_node
@dataclass(frozen=True)
class CopiedNode(Node):
    """A module (``base``) with named copies."""

    kind: ClassVar[str] = "copied"
    copies: Mapping[str, CopyNode]
    base: Node = field(default_factory=DenseNode)

    def build(self, module: nn.Module, name: str = "") -> TrainedCopy:
        """Build the base and its copies."""
        host = TrainedCopy(self.base.build(module, name))
        for adapter, node in self.copies.items():
            host.attach(adapter, node, node.build(host.base, name))
        return host


class TrainedCopy(Host):
    """Runs the active adapter's copy, or the base if none is active."""

    nodes: dict[str, CopyNode]  # type: ignore[assignment]

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base, like=next(base.parameters(), None))

    def structure(self) -> CopiedNode:
        """Return the node of this module."""
        return CopiedNode(dict(self.nodes), self.base_node())

    def trains(self, name: str) -> bool:
        """Whether the parameters of the adapter's copy are trained; its buffers change in any case."""
        return self.nodes[name].trainable

    def check_active(self, names: Sequence[str]) -> None:
        """Refuse two active copies, since only one can run."""
        clash = [name for name in names if name in self.parts]
        if len(clash) > 1:
            raise StateError(
                f"The adapters {clash} each train their own copy of one {type(self.base).__name__}, so they "
                f"cannot be active together. Activate one at a time."
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active copy, or the base."""
        return self.merged()(*args, **kwargs)

    def merged(self) -> nn.Module:
        """Return the active copy, or the base."""
        return self.running[0] if self.running else self.base
