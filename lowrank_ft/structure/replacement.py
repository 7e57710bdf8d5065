"""The base classes of all modules that replace stock ones."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.structure.node import DenseNode, Node


class Replacement(nn.Module):
    """A module that replaces a stock one.

    It carries a zero-length buffer under the stock name ``weight``. Code that would read the weight past
    this module (a stock ``from_pretrained`` of our checkpoint, a model that calls ``F.linear`` on a child's
    weight) then fails with a shape error; without it such a load is silently random, and such a call
    silently ignores the adapter.
    """

    weight: Tensor

    def __init__(self, like: Tensor | None = None) -> None:
        """Create the marker with the dtype and device of ``like``: models read those of a child's weight."""
        super().__init__()
        self.register_buffer("weight", torch.empty(0) if like is None else like.detach().new_empty(0))

    @abstractmethod
    def structure(self) -> Node:
        """Return the node that describes this module, computed from the module."""

    def view(self) -> Any:
        """Return this module as a :class:`~lowrank_ft.modules.layer.Layer`, or None where it is none."""
        return None


class Factored(Replacement):
    """A replacement whose weight is a product of factors."""

    @abstractmethod
    def dense(self, matrix: Tensor | None = None) -> nn.Module:
        """Return one stock layer in place of the factors, with their product or ``matrix`` for a weight."""

    @abstractmethod
    def widened(self, B: Tensor, A: Tensor) -> nn.Module:
        """Return a layer like this one with ``B A`` added to its matrix, by a larger rank."""


class Container(Replacement):
    """A replacement for a module whose children keep their names and are replaced one by one.

    It has no tensors of its own. Unknown attributes are looked up on ``_shell``, a weightless copy of the
    stock module.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)  # no marker: its children have their own

    @abstractmethod
    def dense(self) -> nn.Module:
        """Return the stock module around the same children."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_shell" or "_shell" not in self.__dict__:
                raise
            return getattr(self.__dict__["_shell"], name)


def node_of(module: nn.Module) -> Node:
    """Return the structure of one module: a stock one is dense."""
    return module.structure() if isinstance(module, Replacement) else DenseNode()
