"""A compressed convolution: a 1×1 convolution, a smaller one of the stock geometry, and another 1×1."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lowrank_ft import solve
from lowrank_ft.errors import TargetError
from lowrank_ft.modules.layer import ConvLayer, Layer, find_layer
from lowrank_ft.structure.node import Node
from lowrank_ft.structure.registry import register_node
from lowrank_ft.structure.replacement import Factored

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@register_node
@dataclass(frozen=True)
class TuckerNode(Node):
    """A convolution as ``outer(core(inner(x)))``.

    ``inner`` maps ``in → rank_in`` channels at every position, ``outer`` maps ``rank_out → out``; ``core`` is
    the stock convolution from ``rank_in`` to ``rank_out`` channels. A rank of None keeps all channels of that
    side, without a 1×1 convolution.
    """

    kind: ClassVar[str] = "tucker"
    rank_out: int | None
    rank_in: int | None = None

    def build(self, module: nn.Module, name: str = "") -> TuckerConv:
        """Build the convolutions that will replace ``module``.

        Raises:
            TargetError: not a plain convolution without groups, or ranks above its channels.
        """
        layer = find_layer(module)
        if layer is None or not supports_tucker(layer):
            raise TargetError(
                f"{name or 'The module'} is a {type(module).__name__}, which cannot become smaller "
                f"convolutions: only plain Conv1d/2d/3d without groups can. Exclude it."
            )
        conv = cast(ConvLayer, layer).module
        for rank, channels in ((self.rank_out, conv.out_channels), (self.rank_in, conv.in_channels)):
            if rank is not None and not 0 < rank <= channels:
                raise TargetError(
                    f"{name or 'A convolution'} of {channels} channels cannot have rank {rank}."
                )
        return TuckerConv(self, conv)


def supports_tucker(layer: Layer) -> bool:
    """Whether a layer can be replaced by a chain of convolutions."""
    return isinstance(layer, ConvLayer) and layer.kind == "conv" and layer.groups == 1 and layer.is_plain


class TuckerConv(Factored):
    """Two or three convolutions in place of one.

    Attributes:
        inner: 1×1, ``in → rank_in``, or None.
        core: has the stock layer's kernel size, stride, padding and dilation.
        outer: 1×1, ``rank_out → out``, with the layer's bias; if None, the core has the bias.
    """

    inner: nn.modules.conv._ConvNd | None
    core: nn.modules.conv._ConvNd
    outer: nn.modules.conv._ConvNd | None

    def __init__(self, node: TuckerNode, stock: nn.modules.conv._ConvNd) -> None:
        super().__init__(stock.weight)
        inputs, outputs = stock.in_channels, stock.out_channels
        biased = stock.bias is not None
        middle_in, middle_out = node.rank_in or inputs, node.rank_out or outputs
        self.inner = None if node.rank_in is None else _empty(stock, inputs, middle_in, False, pointwise=True)
        self.core = _empty(stock, middle_in, middle_out, biased and node.rank_out is None)
        self.outer = (
            None if node.rank_out is None else _empty(stock, middle_out, outputs, biased, pointwise=True)
        )
        self.train(stock.training)

    def structure(self) -> TuckerNode:
        """Return the node of this layer."""
        return TuckerNode(
            rank_out=None if self.outer is None else self.core.out_channels,
            rank_in=None if self.inner is None else self.core.in_channels,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run the convolutions."""
        for part in (self.inner, self.core, self.outer):
            x = x if part is None else part(x)
        return x

    @property
    def in_channels(self) -> int:
        """Number of input channels."""
        return (self.core if self.inner is None else self.inner).in_channels

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return (self.core if self.outer is None else self.outer).out_channels

    @property
    def bias(self) -> Tensor | None:
        """The bias of the last convolution."""
        return (self.core if self.outer is None else self.outer).bias

    def __getattr__(self, name: str) -> Any:
        """Look unknown attributes (``stride``, ``padding``, ``kernel_size``, ``groups``) up on the core."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "core":
                raise
            return getattr(self.core, name)

    def view(self) -> Layer:
        """Return the view through which adapters use this layer."""
        return FactoredConv(self)

    def factors(self) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return the factors of the weight: ``(out, rank_out)``, the core's weight, ``(in, rank_in)``."""
        outer = None if self.outer is None else self.outer.weight.flatten(1)
        inner = None if self.inner is None else self.inner.weight.flatten(1).T
        return outer, self.core.weight, inner

    def product(self) -> Tensor:
        """Return the weight of the equivalent single convolution, ``(out, in, k…)``."""
        return _product(*self.factors())

    def dense(self, matrix: Tensor | None = None) -> nn.Module:
        """Return one stock convolution in place of all.

        Args:
            matrix: its weight, ``(out, in · k…)``; by default the product of the factors, computed in at
                least float32 and rounded once.
        """
        dtype = self.core.weight.dtype
        with torch.no_grad():
            if matrix is None:
                wide = torch.promote_types(dtype, torch.float32)
                outer, core, inner = self.factors()
                outer, inner = (None if factor is None else factor.to(wide) for factor in (outer, inner))
                matrix = _product(outer, core.to(wide), inner).flatten(1)
            stock = _empty(self.core, self.in_channels, self.out_channels, self.bias is not None)
            stock.weight.copy_(matrix.view_as(stock.weight))
            if self.bias is not None and stock.bias is not None:
                stock.bias.copy_(self.bias)
        return stock.requires_grad_(self._trains()).train(self.training)

    @torch.no_grad()
    def widened(self, B: Tensor, A: Tensor) -> nn.Module:
        """Return a factored convolution of larger ranks, whose matrix is this one's plus ``B A``.

        Args:
            B: ``(out, more)``.
            A: ``(more, in · k…)``.
        """
        outer, core, inner = self.factors()
        added = A.to(core.dtype).reshape(len(A), self.in_channels, *core.shape[2:])
        if inner is not None:
            basis, _ = torch.linalg.qr(added.movedim(1, 0).flatten(1))
            if inner.shape[1] + basis.shape[1] < self.in_channels:
                joined = torch.cat([inner, basis], 1)
                added = _product(None, added, basis.T)
                added, core = _pad(added, core.shape[1], 0), _pad(core, 0, added.shape[1])
                inner = joined
            else:  # the rank would reach the number of channels, so the 1×1 convolution would be no use
                core, inner = _product(None, core, inner), None
        if outer is None:
            core = core + _product(B.to(core.dtype), added, None)
        else:
            core, outer = torch.cat([core, added]), torch.cat([outer, B.to(core.dtype)], 1)
        return self._like(outer, core, inner)

    def _like(self, outer: Tensor | None, core: Tensor, inner: Tensor | None) -> TuckerConv:
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        bias = self.bias
        parts = {"inner": None if inner is None else inner.T, "core": core, "outer": outer}
        last = "core" if outer is None else "outer"
        for name, weight in parts.items():
            if weight is None:
                twin._modules[name] = None
                continue
            part = _empty(self.core, weight.shape[1], weight.shape[0], name == last and bias is not None,
                          pointwise=name != "core")  # fmt: skip
            part.weight.copy_(weight.reshape(part.weight.shape))
            if part.bias is not None and bias is not None:
                part.bias.copy_(bias)
            twin._modules[name] = part.train(self.training)
        return twin.requires_grad_(self._trains())

    def _trains(self) -> bool:
        return any(p.requires_grad for p in self.parameters())


def _product(outer: Tensor | None, core: Tensor, inner: Tensor | None) -> Tensor:
    """``core ×_out outer ×_in inner``, with factors ``(out, r)`` and ``(in, r)``; None for no factor."""
    return solve.tucker(core, [outer, inner, *(None,) * (core.dim() - 2)])


def _pad(weight: Tensor, before: int, after: int) -> Tensor:
    """Add input channels of zeros before and after those of a weight."""
    shape = list(weight.shape)
    zeros = [weight.new_zeros(shape[0], count, *shape[2:]) for count in (before, after)]
    return torch.cat([zeros[0], weight, zeros[1]], 1)


def _empty(
    like: nn.modules.conv._ConvNd, inputs: int, outputs: int, bias: bool, *, pointwise: bool = False
) -> nn.modules.conv._ConvNd:
    """An unfilled convolution between other numbers of channels: of the same geometry, or 1×1."""
    cls = _CONVOLUTIONS[like.weight.dim() - 3]
    geometry: dict[str, Any] = {"kernel_size": 1}
    if not pointwise:
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        geometry = {name: getattr(like, name) for name in names}
    weight = like.weight
    shell = cls(inputs, outputs, bias=bias, device="meta", dtype=weight.dtype, **geometry)
    return shell.to_empty(device=weight.device)


class FactoredConv(ConvLayer):
    """The view of a factored convolution."""

    def __init__(self, module: TuckerConv) -> None:
        Layer.__init__(self, cast(nn.Module, module))
        self.factored = module
        self.out_features = module.out_channels
        self.in_features = module.in_channels * module.core.weight[0, 0].numel()

    @property
    def weight(self) -> Tensor:
        """The core's weight; callers read its dtype, device and kernel size."""
        return self.factored.core.weight

    @property
    def is_bare(self) -> bool:
        """False: a kernel must not read the weight instead of calling the module."""
        return False

    @property
    def _has_stock_forward(self) -> bool:
        return True  # weights are run through the core's forward, which is stock

    def tensor(self) -> Tensor:
        """The product of the factors."""
        return self.factored.product()

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the stock layer's weight."""
        return (self.out_features, self.factored.in_channels, *self.weight.shape[2:])

    def matrix(self) -> Tensor:
        """The product of the factors."""
        return self.tensor().flatten(1)

    def to_weight(self, matrix: Tensor) -> Tensor:
        """Reshape rows of the matrix into kernels."""
        return matrix.reshape(-1, self.factored.in_channels, *self.weight.shape[2:])

    def clone_with(self, matrix: Tensor) -> nn.Module:
        """Return a stock layer with this matrix."""
        return self.factored.dense(matrix)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, cast(Any, self.factored.core)._conv_forward(x, weight, bias))
