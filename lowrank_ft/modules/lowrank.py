"""A layer compressed to two thin factors, applied one after the other."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ft.errors import TargetError
from lowrank_ft.modules.layer import EmbeddingLayer, Layer, LinearLayer, layer_of, stock_linear
from lowrank_ft.modules.resized import Resized, ResizedNode
from lowrank_ft.structure.node import DenseNode, Node
from lowrank_ft.structure.registry import register_node
from lowrank_ft.structure.replacement import Factored, node_of


@register_node
@dataclass(frozen=True)
class LowRankNode(Node):
    """A linear layer or an embedding as ``y = second(first(x))``.

    ``first`` maps ``in → rank`` without bias (for an embedding it is a table of ``rank`` columns),
    ``second`` maps ``rank → out``.
    """

    kind: ClassVar[str] = "lowrank"
    rank: int
    bias: bool = False
    first: Node = field(default_factory=DenseNode)
    second: Node = field(default_factory=DenseNode)

    def build(self, module: nn.Module, name: str = "") -> LowRank:
        """Build both factors for the layer ``module``.

        Raises:
            TargetError: a convolution, or an embedding whose forward does more than a lookup.
        """
        layer = layer_of(module)
        if not supports_low_rank(layer):
            raise TargetError(
                f"A {type(module).__name__} cannot become two linear factors: only linear layers and plain "
                f"embeddings can. Exclude it."
            )
        weight = layer.weight
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        # The factors of a resized layer are resized too; they are built from stock-sized ones.
        outputs, inputs = getattr(module, "stock_shape", (layer.out_features, layer.in_features))
        if layer.kind == "embedding":
            # With a given table, nn.Embedding does not spend time on drawing a random one.
            first: nn.Module = nn.Embedding(
                layer.in_features,
                self.rank,
                padding_idx=cast(nn.Embedding, module).padding_idx,
                _weight=torch.empty(layer.in_features, self.rank, **place),
            )
        else:
            first = _empty_linear(inputs, self.rank, False, place)
        second = _empty_linear(self.rank, outputs, self.bias, place)
        return LowRank(self.first.build(first), self.second.build(second), module)


def low_rank_node(layer: Layer, rank: int, bias: bool) -> LowRankNode:
    """Return the node of a layer's factors; those of a resized layer keep its row and column indices."""
    stock = layer.module
    first: Node = DenseNode()
    second: Node = DenseNode()
    if isinstance(stock, Resized) and stock.columns is not None:
        first = ResizedNode(rank, stock.in_features)
    if isinstance(stock, Resized) and stock.rows is not None:
        second = ResizedNode(stock.out_features, rank, bias)
    return LowRankNode(rank, bias, first, second)


def supports_low_rank(layer: Layer) -> bool:
    """Whether a layer can be replaced by two linear factors."""
    if layer.kind == "embedding":
        return type(layer.module).forward is nn.Embedding.forward
    return layer.kind in ("linear", "transposed-linear")


def _empty_linear(in_features: int, out_features: int, bias: bool, place: dict[str, Any]) -> nn.Linear:
    shell = nn.Linear(in_features, out_features, bias, device="meta", dtype=place["dtype"])
    return shell.to_empty(device=place["device"])


class LowRank(Factored):
    """Two factors in place of one layer.

    Attributes:
        first: ``in → rank``; a table of ``rank`` columns if an embedding was replaced.
        second: ``rank → out``, with the layer's bias.
        kind: the kind of the layer that was replaced.
        adds_bias: whether the second factor has a bias although the stock layer had none.
    """

    def __init__(self, first: nn.Module, second: nn.Module, stock: nn.Module) -> None:
        layer = layer_of(stock)
        super().__init__(layer.weight)
        self.first, self.second = first, second
        # A resized layer records the kind of the stock layer.
        self.kind: str = getattr(stock, "kind", layer.kind)
        adds = self.kind == "linear" and layer.bias is None and self.bias is not None
        self.adds_bias: bool = adds or getattr(stock, "adds_bias", False)
        self.train(stock.training)

    def structure(self) -> LowRankNode:
        """Return the node of this layer."""
        return LowRankNode(
            rank=self.rank,
            bias=self.bias is not None,
            first=node_of(self.first),
            second=node_of(self.second),
        )

    @property
    def rows(self) -> Tensor | None:
        """Indices of the kept outputs of the stock layer, if some were removed (``Resized.rows``)."""
        return cast("Tensor | None", getattr(self.second, "rows", None))

    @property
    def columns(self) -> Tensor | None:
        """Indices of the kept inputs of the stock layer, if some were removed (``Resized.columns``)."""
        return cast("Tensor | None", getattr(self.first, "columns", None))

    @property
    def stock_shape(self) -> tuple[int, int]:
        """The numbers of outputs and inputs of the stock layer."""
        outputs, _ = getattr(self.second, "stock_shape", (self.out_features, 0))
        _, inputs = getattr(self.first, "stock_shape", (0, self.in_features))
        return outputs, inputs

    @property
    def rank(self) -> int:
        """The rank of the factors."""
        return layer_of(self.second).in_features

    @property
    def bias(self) -> Tensor | None:
        """The bias of the second factor."""
        return layer_of(self.second).bias

    @property
    def in_features(self) -> int:
        """Number of input features, or size of the vocabulary."""
        return layer_of(self.first).in_features

    @property
    def out_features(self) -> int:
        """Number of output features."""
        return layer_of(self.second).out_features

    def forward(self, x: Tensor) -> Tensor:
        """Run both factors."""
        return cast(Tensor, self.second(self.first(x)))

    def view(self) -> Layer:
        """Return the view through which adapters use this layer."""
        return FactoredEmbedding(self) if self.kind == "embedding" else FactoredLinear(self)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``B (out, rank)`` and ``A (rank, in)``; the layer's matrix is ``B A``."""
        return layer_of(self.second).matrix(), layer_of(self.first).matrix()

    def dense(self, matrix: Tensor | None = None) -> nn.Module:
        """Return one stock layer in place of the factors.

        Args:
            matrix: the weight of a layer of this size, ``(out, in)``. By default the product of the factors,
                computed in at least float32 and rounded once, in a layer of the stock size: removed rows and
                columns become zeros.
        """
        full = matrix is None
        dtype = layer_of(self.first).weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        bias = self.bias
        with torch.no_grad():
            if matrix is None:
                B, A = self.factors()
                matrix = B.to(wide) @ A.to(wide)
            if self.kind == "embedding" and bias is not None:  # a row of the table is one token's output
                matrix, bias = matrix.to(wide) + bias.to(wide)[:, None], None
            if self.kind == "embedding":
                padding = cast(nn.Embedding, self.first).padding_idx
                stock: nn.Module = nn.Embedding(
                    self.in_features, self.out_features, padding, _weight=matrix.T.to(dtype).contiguous()
                )
            elif self.rows is not None or self.columns is not None:
                layer = Resized.of(self, matrix.to(dtype), bias)
                stock = layer.dense() if full else layer
            else:
                stock = stock_linear(self.kind, matrix.to(dtype), bias)
        return stock.requires_grad_(self._trains()).train(self.training)

    def widened(self, B: Tensor, A: Tensor) -> LowRank:
        """Return a factored layer of a larger rank, whose matrix is this one's plus ``B A``.

        Args:
            B: ``(out, more)``.
            A: ``(more, in)``.
        """
        old_B, old_A = self.factors()
        wide_B, wide_A = torch.cat([old_B, B.to(old_B.dtype)], 1), torch.cat([old_A, A.to(old_A.dtype)])
        first = layer_of(self.first).clone_with(wide_A.detach())
        second = layer_of(self.second).clone_with(wide_B.detach())
        for module in (first, second):
            _match_sizes(module)
        twin = copy.copy(self)
        twin._modules = {**self._modules, "first": first, "second": second}
        return twin.requires_grad_(self._trains())

    def _trains(self) -> bool:
        return any(p.requires_grad for p in self.parameters())


def _match_sizes(module: nn.Module) -> None:
    """Set a layer's recorded sizes to those of its weight."""
    rows, columns = cast(Tensor, module.weight).shape
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = rows, columns
    else:
        linear = cast(nn.Linear, module)
        linear.out_features, linear.in_features = rows, columns


class _Factored(Layer):
    """The common part of both views: the matrix is a product, and the weight is the first factor."""

    def __init__(self, module: LowRank) -> None:
        Layer.__init__(self, module)
        self.factored = module
        self.out_features, self.in_features = module.out_features, module.in_features

    @property
    def weight(self) -> Tensor:
        """The first factor; callers read only its dtype and device."""
        return layer_of(self.factored.first).weight

    @property
    def is_bare(self) -> bool:
        """False: a kernel must not read the weight instead of calling the module."""
        return False

    def matrix(self) -> Tensor:
        """The product of the factors."""
        B, A = self.factored.factors()
        return B @ A

    def clone_with(self, matrix: Tensor) -> nn.Module:
        """Return a stock layer with this matrix."""
        return self.factored.dense(matrix)


class FactoredLinear(_Factored, LinearLayer):
    """The view of a factored linear layer."""

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply a weight to ``x``."""
        return F.linear(x, weight)


class FactoredEmbedding(_Factored, EmbeddingLayer):
    """The view of a factored embedding."""

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """Look ``x`` up in a table."""
        return F.embedding(x, weight, cast(nn.Embedding, self.factored.first).padding_idx)
