"""Nodes: the structure of one module, as a frozen dataclass of plain data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lowrank_ft.structure.registry import register_node


class Node(ABC):
    """The structure of one module: a frozen dataclass of plain data, registered under its ``kind``.

    Fields may hold scalars, tuples, other nodes, and mappings of names to nodes; JSON supports nothing else.
    """

    kind: ClassVar[str]

    @abstractmethod
    def build(self, module: nn.Module, name: str = "") -> nn.Module:
        """Return the module that this node describes, which will replace ``module``.

        Shapes, device and dtype are those of ``module``, which may be on ``meta``; values are left undefined.
        ``module`` must not be changed.

        Args:
            module: the module that will be replaced.
            name: its name in the stock model.
        """


@register_node
@dataclass(frozen=True)
class DenseNode(Node):
    """A stock module, unchanged from the base model."""

    kind: ClassVar[str] = "dense"

    def build(self, module: nn.Module, name: str = "") -> nn.Module:
        """Return ``module`` itself."""
        return module
