"""A linear layer from which some rows or columns were removed, as part of a coupled group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowrank_ft.errors import TargetError
from lowrank_ft.modules.layer import Layer, LinearLayer, layer_of, stock_linear
from lowrank_ft.structure.node import Node
from lowrank_ft.structure.registry import register_node
from lowrank_ft.structure.replacement import Replacement


@register_node
@dataclass(frozen=True)
class ResizedNode(Node):
    """A linear layer with fewer outputs or fewer inputs than the stock one."""

    kind: ClassVar[str] = "resized"
    out_features: int
    in_features: int
    bias: bool = False

    def build(self, module: nn.Module, name: str = "") -> Resized:
        """Build the smaller layer that will replace ``module``.

        Raises:
            TargetError: not a linear layer, or one that is smaller than this node.
        """
        layer = layer_of(module)
        if layer.kind not in ("linear", "transposed-linear"):
            raise TargetError(f"A {type(module).__name__} cannot be resized: linear layers can. Exclude it.")
        if not (0 < self.out_features <= layer.out_features and 0 < self.in_features <= layer.in_features):
            raise TargetError(
                f"A layer of {layer.out_features} × {layer.in_features} cannot be resized to "
                f"{self.out_features} × {self.in_features}."
            )
        return Resized(self, module)


class Resized(Replacement, nn.Linear):
    """An ``nn.Linear`` that records which outputs and inputs of the stock layer it has.

    It needs no marker: loading its checkpoint into a stock model fails because the weight's shape differs.

    Attributes:
        rows: ``(out,)``, the index of each output in the stock layer; None if all outputs are kept.
        columns: ``(in,)``, the same for inputs.
        kind: the kind of the layer that was replaced.
        had_bias: whether the stock layer had a bias.
        adds_bias: whether this layer has a bias although the stock layer had none.
    """

    weight: nn.Parameter
    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, node: ResizedNode, stock: nn.Module) -> None:
        layer = layer_of(stock)
        like = layer.weight
        nn.Linear.__init__(
            self, node.in_features, node.out_features, node.bias, device="meta", dtype=like.dtype
        )
        self.to_empty(device=like.device)
        for name, size, stock_size in (
            ("rows", node.out_features, layer.out_features),
            ("columns", node.in_features, layer.in_features),
        ):
            index = None if size == stock_size else torch.arange(size, device=like.device)
            self.register_buffer(name, index)
        self.stock_shape = (layer.out_features, layer.in_features)
        self.had_bias = layer.bias is not None or getattr(stock, "had_bias", False)
        self.kind = layer.kind
        self.adds_bias = self.kind == "linear" and layer.bias is None and node.bias
        self.train(stock.training)

    @staticmethod
    def of(like: Any, matrix: Tensor, bias: Tensor | None) -> Resized:
        """Return a layer with these values, and the row and column indices of another layer.

        Args:
            like: a layer with ``kind``, ``stock_shape``, ``rows``, ``columns`` and ``adds_bias``.
            matrix: ``(out, in)``.
            bias: ``(out,)`` or None.
        """
        shell = stock_linear(like.kind, matrix.new_empty(like.stock_shape, device="meta"), None)
        node = ResizedNode(matrix.shape[0], matrix.shape[1], bias is not None)
        module = Resized(node, shell)
        module.to_empty(device=matrix.device)
        module.fill(matrix, bias, like.rows, like.columns)
        module.adds_bias = like.adds_bias
        module.had_bias = bias is not None and not like.adds_bias
        return module

    def structure(self) -> ResizedNode:
        """Return the node of this layer."""
        return ResizedNode(self.out_features, self.in_features, self.bias is not None)

    def view(self) -> Layer:
        """Return the view through which adapters use this layer."""
        return LinearLayer(self)

    def fill(
        self,
        matrix: Tensor,
        bias: Tensor | None = None,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> None:
        """Set all values.

        Args:
            matrix: ``(out, in)``, any float dtype; rounded once.
            bias: ``(out,)``; needed if the layer has a bias.
            rows: indices of the outputs in the stock layer, ``(out,)``; needed if some were removed.
            columns: indices of the inputs in the stock layer, ``(in,)``; needed if some were removed.
        """
        self.weight.copy_(matrix)
        for tensor, values in ((self.bias, bias), (self.rows, rows), (self.columns, columns)):
            if tensor is not None:
                assert values is not None
                tensor.copy_(values)

    def trimmed(self) -> nn.Module:
        """Return a stock layer of this size, without the indices."""
        bias = None if self.bias is None else self.bias.detach()
        stock = stock_linear(self.kind, self.weight.detach(), bias)
        return stock.requires_grad_(self._trains()).train(self.training)

    def dense(self) -> nn.Module:
        """Return a stock layer of the stock size, with zeros in the removed rows and columns."""
        out_features, in_features = self.stock_shape
        weight = self.weight.detach()
        rows = torch.arange(out_features, device=weight.device) if self.rows is None else self.rows
        columns = torch.arange(in_features, device=weight.device) if self.columns is None else self.columns
        matrix = weight.new_zeros(out_features, in_features)
        matrix[rows[:, None], columns] = weight
        bias = weight.new_zeros(out_features) if self.had_bias or self.bias is not None else None
        if bias is not None and self.bias is not None:
            bias[rows] = self.bias.detach()
        return stock_linear(self.kind, matrix, bias).requires_grad_(self._trains()).train(self.training)

    def _trains(self) -> bool:
        return any(p.requires_grad for p in self.parameters())
