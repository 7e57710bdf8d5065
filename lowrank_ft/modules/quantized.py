"""A linear layer with a quantised weight, which is unpacked tile by tile in every multiplication."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ft.errors import TargetError
from lowrank_ft.modules.fused import Frozen, frozen_linear
from lowrank_ft.modules.layer import Layer, LinearLayer, layer_of, stock_linear
from lowrank_ft.modules.resized import Resized, ResizedNode
from lowrank_ft.quant import Scheme, Storage, storage_of
from lowrank_ft.quant.rounding import Feedback
from lowrank_ft.structure.node import DenseNode, Node
from lowrank_ft.structure.registry import register_node
from lowrank_ft.structure.replacement import Replacement

TILE = 2**22  # weights unpacked at a time, 16 MB in float32: layers of small models are one tile


@register_node
@dataclass(frozen=True)
class QuantizedNode(Node):
    """A quantised linear layer; ``base`` describes the layer before quantisation: dense or resized."""

    kind: ClassVar[str] = "quantized"
    scheme: Scheme = field(default_factory=Scheme)
    base: Node = field(default_factory=DenseNode)

    def build(self, module: nn.Module, name: str = "") -> Quantized:
        """Build the packed layer that will replace ``module``.

        Raises:
            TargetError: not a linear layer.
        """
        layer = layer_of(module, name)
        if layer.kind not in ("linear", "transposed-linear"):
            raise TargetError(
                f"{name or 'The module'} is a {type(module).__name__}, which cannot be quantised: only "
                f"linear layers can. Exclude it."
            )
        stock = module if isinstance(module, Resized) else self.base.build(module, name)
        return Quantized(self.scheme, stock)


class Quantized(Replacement):
    """A linear layer with packed tensors in place of its weight.

    Attributes:
        scheme: the parameters of the storage format.
        storage: packs and unpacks the weight.
        in_features: number of inputs.
        out_features: number of outputs.
        rows: indices of the kept outputs of the stock layer; None if all are kept.
        columns: the same for inputs.
        kind: the kind of the layer that was replaced.
        stock_shape: the numbers of outputs and inputs of the stock layer.
    """

    bias: Tensor | None
    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, scheme: Scheme, stock: nn.Module) -> None:
        layer = layer_of(stock)
        super().__init__(layer.weight)
        self.scheme = scheme
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.kind: str = getattr(stock, "kind", layer.kind)
        self.stock_shape = getattr(stock, "stock_shape", (layer.out_features, layer.in_features))
        self.had_bias: bool = getattr(stock, "had_bias", layer.bias is not None)
        self.adds_bias: bool = getattr(stock, "adds_bias", False)
        for name in ("rows", "columns"):
            index = getattr(stock, name, None)
            self.register_buffer(name, None if index is None else index.clone())
        bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.register_parameter("bias", bias)
        self.storage = storage_of(scheme)
        shapes = self.storage.shapes(self.out_features, self.in_features)
        for name, shape in shapes.items():
            empty = torch.empty(shape.size, dtype=shape.dtype, device=layer.weight.device)
            self.register_buffer(name, empty)
        self._weight = PackedWeight(self.storage, tuple(shapes), self.out_features, self.in_features)
        self.train(stock.training)

    @property
    def packed(self) -> dict[str, Tensor]:
        """The packed tensors by name."""
        return {name: cast(Tensor, self._buffers[name]) for name in self._weight.names}

    def structure(self) -> QuantizedNode:
        """Return the node of this layer."""
        if self.rows is None and self.columns is None:
            return QuantizedNode(self.scheme)
        base = ResizedNode(self.out_features, self.in_features, self.bias is not None)
        return QuantizedNode(self.scheme, base)

    def view(self) -> Layer:
        """Return the view through which adapters use this layer."""
        return QuantizedLinear(self)

    @torch.no_grad()
    def fill(self, matrix: Tensor, feedback: Feedback | None = None) -> None:
        """Quantise a matrix ``(out, in)`` into this layer.

        Raises:
            NonFiniteError: NaN or infinite entries.
        """
        self.store(self.storage.pack(matrix, feedback))

    @torch.no_grad()
    def store(self, packed: Mapping[str, Tensor]) -> None:
        """Copy packed tensors into this layer."""
        for name, tensor in packed.items():
            cast(Tensor, self._buffers[name]).copy_(tensor)

    @property
    def weights(self) -> int:
        """The number of weights."""
        return self.out_features * self.in_features

    @property
    def stored_bytes(self) -> int:
        """How many bytes the packed tensors take."""
        return self.storage.bytes(self.out_features, self.in_features)

    @torch.no_grad()
    def copy_unquantized(self, stock: nn.Module) -> None:
        """Copy the tensors that are not quantised (bias, rows and columns) from the layer to be replaced."""
        layer = layer_of(stock)
        for name in ("bias", "rows", "columns"):
            tensor = getattr(self, name)
            if tensor is not None:
                tensor.copy_(layer.bias if name == "bias" else getattr(stock, name))

    def matrix(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the unpacked weight, ``(out, in)``, by default in the layer's dtype."""
        dtype = self.weight.dtype if dtype is None else dtype
        return self.storage.unpack(self.packed, self.in_features, 0, self.out_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x Wᵀ + b``."""
        return frozen_linear(x, *self.frozen(), self.bias)

    def frozen(self) -> tuple[Frozen, tuple[Tensor, ...]]:
        """Return the weight's multiplication, and the tensors that it takes."""
        return self._weight, tuple(self.packed.values())

    @torch.no_grad()
    def dense(self, matrix: Tensor | None = None) -> nn.Module:
        """Return a stock layer that replaces this one.

        Args:
            matrix: the weight of a layer of this size, ``(out, in)``; by default the unpacked weight, in a
                layer of the stock size.
        """
        full = matrix is None
        matrix = self.matrix() if matrix is None else matrix
        bias = None if self.bias is None else self.bias.detach()
        if self.rows is not None or self.columns is not None:
            resized = Resized.of(self, matrix, bias)
            module = resized.dense() if full else resized
        else:
            module = stock_linear(self.kind, matrix, bias)
        return module.requires_grad_(False).train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantized:
        """Move the packed tensors with the layer, but do not cast them: scales keep their dtype."""
        before = self.packed
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = cast(Tensor, self._buffers[name])
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


class QuantizedLinear(LinearLayer):
    """The view of a quantised layer; its ``weight`` serves only for dtype and device."""

    quantized: Quantized

    def __init__(self, module: Quantized) -> None:
        Layer.__init__(self, cast(Any, module))
        self.quantized = module
        self.out_features, self.in_features = module.out_features, module.in_features

    @property
    def _has_stock_forward(self) -> bool:
        return False

    def matrix(self) -> Tensor:
        """The unpacked weight."""
        return self.quantized.matrix()

    def tensor(self) -> Tensor:
        """The unpacked weight."""
        return self.quantized.matrix()

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply a weight to ``x``."""
        return F.linear(x, weight)

    def frozen(self) -> tuple[Frozen, tuple[Tensor, ...]] | None:
        """The packed weight's multiplication and tensors; None if hooks require calling the module."""
        return self.quantized.frozen() if self.is_bare else None

    def clone_with(self, matrix: Tensor) -> nn.Module:
        """Return a stock layer with this matrix."""
        return self.quantized.dense(matrix)


@dataclass(frozen=True)
class PackedWeight:
    """Multiplication by a packed matrix, one tile of rows at a time, so that no full dense copy exists.

    Attributes:
        storage: unpacks the matrix.
        names: names of the packed tensors, in the order of ``tensors``.
        rows: number of outputs.
        columns: number of inputs.
    """

    storage: Storage
    names: tuple[str, ...]
    rows: int
    columns: int

    def multiply(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        """Return ``x Wᵀ + b``, ``(…, rows)``."""
        tiles = list(self._tiles(tensors, x.dtype))
        if len(tiles) == 1:
            return F.linear(x, tiles[0][1](), bias)
        flat = x.reshape(-1, self.columns)
        out = x.new_empty(len(flat), self.rows)
        for rows, weight in tiles:
            part = out[:, rows]
            torch.mm(flat, weight().T, out=part) if bias is None else torch.addmm(
                bias[rows], flat, weight().T, out=part
            )
        return out.view(*x.shape[:-1], self.rows)

    def backpropagate(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return ``g W`` for a gradient g of the output, ``(n, rows)``."""
        total: Tensor | None = None
        for rows, weight in self._tiles(tensors, grad.dtype):
            if total is None:
                total = grad[:, rows] @ weight()
            else:
                total.addmm_(grad[:, rows], weight())
        assert total is not None
        return total

    def _tiles(
        self, tensors: tuple[Tensor, ...], dtype: torch.dtype
    ) -> Iterator[tuple[slice, Callable[[], Tensor]]]:
        """Yield the rows of each tile, and a function that unpacks the tile."""
        packed = dict(zip(self.names, tensors, strict=True))
        height = max(1, TILE // self.columns)
        for start in range(0, self.rows, height):
            stop = min(start + height, self.rows)

            def read(start: int = start, stop: int = stop, packed: Mapping[str, Tensor] = packed) -> Tensor:
                return self.storage.unpack(packed, self.columns, start, stop, dtype)

            yield slice(start, stop), read
