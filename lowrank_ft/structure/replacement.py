"""The base classes of all modules that replace stock ones."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.structure.node import DenseNode, Node


class Replacement(nn.Module):
    """A module that replaces a stock one.

    It has a zero-length buffer, a marker, under the stock name ``weight``. Code that uses the weight without
    calling this module (a stock ``from_pretrained`` of our checkpoint, a model that calls ``F.linear`` on a
    child's weight) then fails with a shape error. Without the marker such a load would silently leave random
    values, and such a call would silently ignore the adapter.
    """

    weight: Tensor

    def __init__(self, like: Tensor | None = None) -> None:
        """Create the marker with the dtype and device of ``like``, since models read them off ``weight``."""
        super().__init__()
        self.register_buffer("weight", torch.empty(0) if like is None else like.detach().new_empty(0))

    @abstractmethod
    def structure(self) -> Node:
        """Return the node that describes this module, computed from the module."""

    def view(self) -> Any:
        """Return this module as a :class:`~lowrank_ft.modules.layer.Layer`, or None if it is not a layer."""
        return None


class Factored(Replacement):
    """A replacement whose weight is a product of factors."""

    @abstractmethod
    def dense(self, matrix: Tensor | None = None) -> nn.Module:
        """Return one stock layer in place of the factors; its weight is their product, or ``matrix``."""

    @abstractmethod
    def widened(self, B: Tensor, A: Tensor) -> nn.Module:
        """Return a factored layer of a larger rank, whose matrix is this one's plus ``B A``."""


class Container(Replacement):
    """A replacement for a module whose children keep their names and are replaced one by one.

    It has no tensors of its own. Unknown attributes are looked up on ``_shell``, a weightless copy of the
    stock module.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)  # no marker is needed: the children have weights or markers

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
    """Return the structure of one module: a dense node for a stock module."""
    return module.structure() if isinstance(module, Replacement) else DenseNode()
