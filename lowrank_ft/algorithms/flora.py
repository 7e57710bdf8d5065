"""FLoRA: a Tucker update, a small core and one factor for each axis of the weight.

Si et al. 2024, arXiv 2405.14739, equation 4: ``ΔW = s · G ×₁ U₁ … ×_N U_N``. A convolution's channels and
its kernel keep axes of their own, where a LoRA unfolds them into one matrix. In the paper the core ``G``
starts at zero, so that at first nothing but its few numbers has a gradient. Our default starts with the
output channels' factor at zero, as a LoRA does, which learns faster (docs/flora.md).

On a linear layer, ``ΔW = s · U_out G U_inᵀ`` reaches what a LoRA of the smaller of its two ranks reaches, and
no more. It pays on convolutions.

It also leaves a mode whole, without a factor, where its rank would be its size: a square factor adds
nothing that the core cannot do. ``full_modes="factor"`` has square factors, as the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lowrank_ft import solve
from lowrank_ft.algorithms.base import Counts, Family, Method, Options, Share, Statistics, generator_for
from lowrank_ft.algorithms.lora import ScaledOptions
from lowrank_ft.anatomy.sites import Site, lookup
from lowrank_ft.errors import ConfigError
from lowrank_ft.modules.delta import Delta, DeltaNode, LowRankForm
from lowrank_ft.modules.layer import ConvLayer, Layer, layer_of
from lowrank_ft.solve.allocation import Handle
from lowrank_ft.structure.registry import register_method, register_node

FactorStart = Literal["kaiming-normal", "kaiming-uniform", "gaussian", "hosvd", "lora"]
Ranks = tuple[int | None, ...]


@dataclass(frozen=True)
class FLoRA(ScaledOptions):
    """FLoRA: a Tucker update, made for convolutions: a core, and a factor for each axis of the weight."""

    rank_out: int | None = None
    """Rank of the output channels, where it is not `rank`."""
    rank_in: int | None = None
    """Rank of the input channels, where it is not `rank`."""
    rank_kernel: int | None = None
    """Rank of each axis of a kernel; by default they are left whole."""
    full_modes: Literal["whole", "factor"] = "whole"
    """Where a rank is as large as its axis: leave the axis whole, or give it a square factor (the paper)."""
    budget: int | None = None
    """Numbers to train in all: the largest rank, the same for all layers, that this allows."""
    scale: float | None = None
    """Factor on the update, in place of alpha/rank (the paper's code has 1 to 4)."""
    init: FactorStart = "lora"
    """"lora": the output channels' factor is zero, as in a LoRA (of an embedding, the tokens'). Or the core
    is zero, and the factors start as in the paper's code ("kaiming-normal", variance 1/(2 rank)), uniform of
    that variance, "gaussian" of deviation 0.02, or as the leading directions of the weight's own axes
    ("hosvd")."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank_out", "rank_in", "rank_kernel", "budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, but is {value}.")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"scale must be positive and finite, but is {self.scale}.")
        if self.scale is not None and (self.alpha is not None or self.alpha_pattern):
            raise ConfigError("scale takes the place of alpha/rank: leave out alpha and alpha_pattern.")
        if self.budget is not None and (self.rank_pattern or self.rank_out or self.rank_in):
            raise ConfigError("budget decides the ranks: leave out rank_pattern, rank_out and rank_in.")

    def ranks_of(self, layer: Layer, rank: int) -> Ranks:
        """Return a layer's rank for each of its modes, from one rank for its channels.

        A rank is at most the mode's size, and the size of all other modes together. Where the factors would
        have as many numbers as the weight, all modes are left whole.

        Args:
            layer: the layer.
            rank: of the channels.

        Returns:
            None for a mode that is left whole.
        """
        shape = layer.tensor_shape
        wanted = {"out": self.rank_out or rank, "in": self.rank_in or rank}
        ranks: list[int | None] = []
        for mode, size in zip(layer.modes, shape, strict=True):
            bounded = min(wanted.get(mode, self.rank_kernel or size), size, math.prod(shape) // size)
            whole = size == 1 or (bounded == size and self.full_modes == "whole")
            ranks.append(None if whole else bounded)
        if self.full_modes == "whole" and size_of(shape, ranks) >= math.prod(shape):
            return (None,) * len(shape)
        return tuple(ranks)

    def scale_of(self, name: str, rank: int) -> float:
        """Return the factor on the update of the layer ``name``, whose channels have that rank."""
        if self.scale is not None:
            return self.scale
        return self.alpha_of(name, rank) / (math.sqrt(rank) if self.scaling == "rslora" else rank)


def core_shape(shape: Sequence[int], ranks: Sequence[int | None]) -> tuple[int, ...]:
    """Return the core's shape: ranks, and sizes where a mode is whole."""
    return tuple(size if rank is None else rank for size, rank in zip(shape, ranks, strict=True))


def size_of(shape: Sequence[int], ranks: Sequence[int | None]) -> int:
    """Return how many numbers a core and its factors have."""
    factors = sum(size * rank for size, rank in zip(shape, ranks, strict=True) if rank is not None)
    return math.prod(core_shape(shape, ranks)) + factors


@register_node
@dataclass(frozen=True)
class FLoRANode(DeltaNode):
    """The structure of a Tucker update of one layer."""

    kind: ClassVar[str] = "flora"
    ranks: tuple[int | None, ...]  # by mode of the layer's tensor; None has no factor
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if any(rank is not None and rank < 1 for rank in self.ranks):
            raise ConfigError(f"The ranks must be at least 1, but are {self.ranks}.")

    def delta(self, layer: Layer) -> Delta:
        """Return the update for ``layer``.

        Raises:
            ConfigError: another number of ranks than the weight has axes, or a rank above its axis.
        """
        shape = layer.tensor_shape
        fits = len(shape) == len(self.ranks) and all(
            rank is None or rank <= size for rank, size in zip(self.ranks, shape, strict=True)
        )
        if not fits:
            raise ConfigError(f"Ranks {self.ranks} do not fit a weight of shape {shape}.")
        return FLoRADelta(self, layer)


class FLoRADelta(Delta):
    """``core``, and ``factor_<mode>``, ``(size, rank)``, for every mode that has one."""

    node: FLoRANode
    core: Tensor

    def __init__(self, node: FLoRANode, layer: Layer) -> None:
        super().__init__(node, layer)
        shape = layer.tensor_shape
        self.core = self.new_parameter(*core_shape(shape, node.ranks))
        for mode, size, rank in zip(layer.modes, shape, node.ranks, strict=True):
            self.register_parameter(
                f"factor_{mode}", None if rank is None else self.new_parameter(size, rank)
            )
        self.dropout = node.dropout

    @property
    def factors(self) -> dict[str, Tensor | None]:
        """The factors by mode; None where the core has the mode whole."""
        return {mode: getattr(self, f"factor_{mode}") for mode in self.layer.modes}

    def weight(self) -> Tensor:
        """Return ``ΔW``, ``out × in``."""
        whole = solve.tucker(self.core, list(self.factors.values()))
        return self.layer.tensor_to_matrix(whole) * self.node.scale

    def as_lora(self) -> LowRankForm | None:
        """Return the exact low-rank form, of the output channels' rank; on a linear layer of the smaller.

        None for a transposed convolution with groups, whose output factor stands once for each.
        """
        layer, factors = self.layer, self.factors
        outer, inner = factors["out"], factors["in"]
        if not isinstance(layer, ConvLayer) and outer is not None and inner is not None:
            if inner.shape[1] < outer.shape[1]:
                return LowRankForm(inner.T, outer @ self.core, self.node.scale)
            return LowRankForm(self.core @ inner.T, outer, self.node.scale)
        if layer.modes[0] != "out" and cast(ConvLayer, layer).groups > 1:
            return None
        rest = solve.tucker(self.core, [None if m == "out" else f for m, f in factors.items()])
        if layer.modes[0] != "out":
            rest = rest.transpose(0, 1)
        A = rest.flatten(1)
        if outer is None:
            outer = torch.eye(len(A), dtype=A.dtype, device=A.device)
        return LowRankForm(A, outer, self.node.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``ΔW x``: on a convolution as three small ones, or as one, whichever is less work."""
        layer = self.layer
        if not isinstance(layer, ConvLayer):
            return super().forward(x)
        x = self.drop(x)
        work = Work.of(layer, self.node.ranks, x)
        if work.factored > work.dense:
            return layer.run_matrix(x, self.weight())
        factors = self.factors
        kernel = [None if mode in ("out", "in") else factor for mode, factor in factors.items()]
        core = solve.tucker(self.core, kernel) * self.node.scale
        return layer.run_tucker(x, factors["out"], core, factors["in"])

    def joins_weight(self, x: Tensor) -> bool:
        """Whether to add ``ΔW`` to a convolution's weight is less work than to run it beside."""
        if not isinstance(self.layer, ConvLayer):
            return False  # W + ΔW of every linear layer would be kept for backward
        work = Work.of(self.layer, self.node.ranks, x)
        return work.joined < min(work.factored, work.dense)


@dataclass(frozen=True)
class Work:
    """Multiplications that a Tucker update of a convolution takes, those of the layer itself left out.

    A product takes as many forward as for each of its two gradients.

    Attributes:
        factored: 1×1, a small convolution, 1×1.
        dense: ``ΔW`` formed, and run beside the layer.
        joined: ``ΔW`` formed and added to the weight, of which backward then makes the gradient.
    """

    factored: int
    dense: int
    joined: int

    @classmethod
    def of(cls, layer: ConvLayer, ranks: Ranks, x: Tensor) -> Work:
        """Return the work for an input ``x``, with its gradients where gradients are on."""
        passes = 3 if torch.is_grad_enabled() else 1
        shape = dict(zip(layer.modes, layer.tensor_shape, strict=True))
        rank = dict(zip(layer.modes, ranks, strict=True))
        before, after = layer.positions(x)
        middle = after if layer.modes[0] == "out" else before
        size = math.prod(shape.values())
        core = math.prod(core_shape(list(shape.values()), ranks))
        kernel = math.prod(shape.values()) // (shape["out"] * shape["in"])
        channels = math.prod((rank[m] or shape[m]) for m in ("out", "in"))
        # A mode without a factor contains all groups.
        tiled = 1 if rank[layer.modes[0]] is None else layer.groups
        factored = middle * channels * kernel * tiled
        factored += before * layer.module.in_channels * (rank["in"] or 0)
        factored += after * layer.module.out_channels * (rank["out"] or 0)
        forming, reached = 0, core
        for mode, width in rank.items():
            if width is not None:
                reached = reached // width * shape[mode]
                forming += reached * width
        training = (passes - 1) // 2
        return cls(
            passes * factored, passes * (middle * size + forming), training * middle * size + passes * forming
        )


@register_method
class FLoRAMethod(Method[FLoRA]):
    """Tucker updates."""

    name = "flora"
    family = Family.ADAPTER
    Config = FLoRA

    def choose(self, sites: Sequence[Site], options: Options, counts: Counts) -> list[Share]:
        """Give each layer's channels a rank; ranks above an axis are bounded by it.

        Raises:
            ConfigError: a budget below rank 1 for every layer.
            TargetError: a pattern in the config that matches no site.
        """
        names = [site.names[0] for site in sites]
        self.config.check_patterns(sites)
        if self.config.budget is None:
            return [Share(lookup(self.config.rank_pattern, name, self.config.rank)) for name in names]
        return [Share(rank) for rank in self._spend(sites, self.config.budget)]

    def _spend(self, sites: Sequence[Site], budget: int) -> list[int]:
        """Return the largest rank that the budget allows all, one more for the first that have room."""
        layers = [layer_of(site.modules[0]) for site in sites]

        def size(layer: Layer, rank: int) -> int:
            return size_of(layer.tensor_shape, self.config.ranks_of(layer, rank))

        rank = largest(
            lambda r: sum(size(layer, r) for layer in layers) <= budget,
            max(max(layer.tensor_shape) for layer in layers),
        )
        if rank == 0:
            least = sum(size(layer, 1) for layer in layers)
            raise ConfigError(
                f"The budget of {budget:,} is below {least:,}, what rank 1 takes in every layer: raise it, "
                f"or target fewer layers."
            )
        ranks, left = [], budget - sum(size(layer, rank) for layer in layers)
        for layer in layers:
            more = size(layer, rank + 1) - size(layer, rank)
            ranks.append(rank + 1 if more <= left else rank)
            left -= more if more <= left else 0
        return ranks

    def structure(self, site: Site, share: Share) -> Mapping[str, FLoRANode]:
        """Return one Tucker update a layer."""
        self.config.check_dropout(site)
        name, rank = site.names[0], cast(int, share.rank)
        ranks = self.config.ranks_of(layer_of(site.modules[0]), rank)
        return {name: FLoRANode(ranks, self.config.scale_of(name, rank), self.config.dropout)}

    def values(
        self, site: Site, new: Mapping[str, Any], statistics: Statistics, handle: Handle | None = None
    ) -> None:
        """Start with ``ΔW = 0``: the core zero, the factors not."""
        (name,) = site.names
        delta = cast(FLoRADelta, new[name])
        layer = layer_of(site.modules[0])
        generator = generator_for(self.config.seed, name)
        with torch.no_grad():
            if self.config.init == "lora":
                _start_as_lora(delta, generator)
                return
            delta.core.zero_()
            for mode, factor in enumerate(delta.factors.values()):
                if factor is not None and self.config.init == "hosvd":
                    factor.copy_(solve.leading(layer.tensor().double(), mode, factor.shape[1]))
                elif factor is not None:
                    factor.copy_(_random(factor.shape, self.config.init, generator))


def _start_as_lora(delta: FLoRADelta, generator: torch.Generator) -> None:
    """Start with what corresponds to a LoRA's B at zero, or with the core, where there is no such factor.

    Of an embedding that is the tokens' factor, as in PEFT. The other channels' factor is what a LoRA's other
    one is; core and kernel factors keep lengths.
    """
    embedding = delta.layer.kind == "embedding"
    factors, zero = delta.factors, "in" if embedding else "out"
    for mode, factor in factors.items():
        if factor is None:
            continue
        start = torch.empty(factor.shape)
        if mode == zero:
            start.zero_()
        elif embedding:
            start.normal_(generator=generator)
        elif mode == "in":
            bound = 1 / math.sqrt(len(factor))
            start.uniform_(-bound, bound, generator=generator)
        else:
            nn.init.orthogonal_(start, generator=generator)
        factor.copy_(start)
    if factors[zero] is None:
        delta.core.zero_()
        return
    rows = delta.core.movedim(delta.layer.modes.index(zero), 0)
    start = nn.init.orthogonal_(torch.empty(rows.shape).flatten(1), generator=generator)
    rows.copy_(start.view(rows.shape))


def _random(shape: torch.Size, start: FactorStart, generator: torch.Generator) -> Tensor:
    """A factor ``(size, rank)``: of variance 1/(2 rank), as torch's Kaiming start for a slope of √3."""
    values = torch.empty(shape)
    if start == "gaussian":
        return values.normal_(std=0.02, generator=generator)
    fill = nn.init.kaiming_normal_ if start == "kaiming-normal" else nn.init.kaiming_uniform_
    return fill(values, a=math.sqrt(3), generator=generator)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 0 to ``most`` that fits, where every smaller one does."""
    low = 0
    while low < most:
        middle = (low + most + 1) // 2
        low, most = (middle, most) if fits(middle) else (low, middle - 1)
    return low
