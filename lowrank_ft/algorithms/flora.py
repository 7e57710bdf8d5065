"""FLoRA: a Tucker update, which is a small core and one factor for each axis of the weight.

Si et al. 2024, arXiv 2405.14739, equation 4: ``ΔW = s · G ×₁ U₁ … ×_N U_N``. A convolution's channels and
its kernel keep axes of their own, which a LoRA unfolds into one matrix. In the paper the core ``G`` starts
at zero, so at first only its few entries have a gradient. Our default starts with the output channels'
factor at zero, as a LoRA does, which learns faster (docs/flora.md).

On a linear layer, ``ΔW = s · U_out G U_inᵀ`` is no more expressive than a LoRA of the smaller of the two
ranks. FLoRA pays off on convolutions.

By default an axis ("mode") whose rank would equal its size has no factor, since the core can represent
everything that a square factor could. ``full_modes="factor"`` has square factors, as in the paper.
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
    """FLoRA: a Tucker update for convolutions, which is a core and a factor for each axis of the weight."""

    rank_out: int | None = None
    """Rank of the output channels; `rank` by default."""
    rank_in: int | None = None
    """Rank of the input channels; `rank` by default."""
    rank_kernel: int | None = None
    """Rank of each axis of a kernel; by default these axes have no factors."""
    full_modes: Literal["whole", "factor"] = "whole"
    """For an axis whose rank equals its size: "whole" has no factor, "factor" a square one (the paper)."""
    budget: int | None = None
    """Parameters to train in total: all layers get the largest rank for which there are no more."""
    scale: float | None = None
    """Scale of the update, instead of alpha/rank (the paper's code uses 1 to 4)."""
    init: FactorStart = "lora"
    """"lora": the output channels' factor starts at zero, as in a LoRA (for an embedding, the tokens').
    With the others the core starts at zero, and the factors are random: "kaiming-normal" (the paper's code,
    variance 1/(2 rank)), "kaiming-uniform" (the same variance) or "gaussian" (standard deviation 0.02); or
    they are the leading directions of the weight along each axis ("hosvd")."""

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
        """Return a layer's rank for each of its modes (axes), from one rank for its channels.

        A rank is at most the mode's size, and at most the product of the other modes' sizes. If core and
        factors would have as many entries as the weight, no mode has a factor.

        Args:
            layer: the layer.
            rank: the rank of the channels.

        Returns:
            the rank of each mode; None for a mode without a factor.
        """
        shape = layer.tensor_shape
        configured = {"out": self.rank_out or rank, "in": self.rank_in or rank}
        ranks: list[int | None] = []
        for mode, size in zip(layer.modes, shape, strict=True):
            bounded = min(configured.get(mode, self.rank_kernel or size), size, math.prod(shape) // size)
            has_no_factor = size == 1 or (bounded == size and self.full_modes == "whole")
            ranks.append(None if has_no_factor else bounded)
        if self.full_modes == "whole" and size_of(shape, ranks) >= math.prod(shape):
            return (None,) * len(shape)
        return tuple(ranks)

    def scale_of(self, name: str, rank: int) -> float:
        """Return the scale of the update of the layer ``name`` with this rank of its channels."""
        if self.scale is not None:
            return self.scale
        return self.alpha_of(name, rank) / (math.sqrt(rank) if self.scaling == "rslora" else rank)


def core_shape(shape: Sequence[int], ranks: Sequence[int | None]) -> tuple[int, ...]:
    """Return the core's shape: the rank of each mode, or the size of a mode without a factor."""
    return tuple(size if rank is None else rank for size, rank in zip(shape, ranks, strict=True))


def size_of(shape: Sequence[int], ranks: Sequence[int | None]) -> int:
    """Return how many parameters a core and its factors have."""
    factors = sum(size * rank for size, rank in zip(shape, ranks, strict=True) if rank is not None)
    return math.prod(core_shape(shape, ranks)) + factors


@register_node
@dataclass(frozen=True)
class FLoRANode(DeltaNode):
    """The structure of a Tucker update of one layer."""

    kind: ClassVar[str] = "flora"
    ranks: tuple[int | None, ...]  # by mode of the layer's tensor; None means no factor
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if any(rank is not None and rank < 1 for rank in self.ranks):
            raise ConfigError(f"The ranks must be at least 1, but are {self.ranks}.")

    def delta(self, layer: Layer) -> Delta:
        """Return the update for ``layer``.

        Raises:
            ConfigError: the weight has another number of axes, or an axis smaller than its rank.
        """
        shape = layer.tensor_shape
        fits = len(shape) == len(self.ranks) and all(
            rank is None or rank <= size for rank, size in zip(self.ranks, shape, strict=True)
        )
        if not fits:
            raise ConfigError(f"Ranks {self.ranks} do not fit a weight of shape {shape}.")
        return FLoRADelta(self, layer)


class FLoRADelta(Delta):
    """``core``, and ``factor_<mode>``, ``(size, rank)``, for every mode with a factor."""

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
        """The factors by mode; None for a mode without a factor."""
        return {mode: getattr(self, f"factor_{mode}") for mode in self.layer.modes}

    def weight(self) -> Tensor:
        """Return ``ΔW``, ``out × in``."""
        update = solve.tucker(self.core, list(self.factors.values()))
        return self.layer.tensor_to_matrix(update) * self.node.scale

    def as_lora(self) -> LowRankForm | None:
        """Return the exact low-rank form.

        Its rank is the output channels'; on a linear layer, the smaller of the two ranks. None for a
        transposed convolution with groups, which applies the output factor in each group.
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
        """Return ``ΔW x``: on a convolution by three small convolutions or one, whichever is less work."""
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
        """Whether adding ``ΔW`` to a convolution's weight is less work than running it beside the layer."""
        if not isinstance(self.layer, ConvLayer):
            return False  # W + ΔW of every linear layer would be kept for backward
        work = Work.of(self.layer, self.node.ranks, x)
        return work.joined < min(work.factored, work.dense)


@dataclass(frozen=True)
class Work:
    """Multiplications that a Tucker update of a convolution needs, without those of the layer itself.

    A product needs as many in the forward pass as for each of its two gradients.

    Attributes:
        factored: to run a 1×1 convolution, a small one and another 1×1.
        dense: to form ``ΔW``, and to run it beside the layer.
        joined: to form ``ΔW`` and add it to the weight, whose gradient the backward pass then computes.
    """

    factored: int
    dense: int
    joined: int

    @classmethod
    def of(cls, layer: ConvLayer, ranks: Ranks, x: Tensor) -> Work:
        """Return the work for an input ``x``, including the gradients if gradients are enabled."""
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
        forming, expanded = 0, core  # the factors expand the core's modes to their sizes, one after another
        for mode, width in rank.items():
            if width is not None:
                expanded = expanded // width * shape[mode]
                forming += expanded * width
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
        """Give each layer's channels a rank; :meth:`FLoRA.ranks_of` bounds it by the axes' sizes.

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
        """Return the largest common rank within the budget, plus one for layers for which some is left."""
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
        """Return one Tucker update for each layer."""
        self.config.check_dropout(site)
        name, rank = site.names[0], cast(int, share.rank)
        ranks = self.config.ranks_of(layer_of(site.modules[0]), rank)
        return {name: FLoRANode(ranks, self.config.scale_of(name, rank), self.config.dropout)}

    def values(
        self, site: Site, new: Mapping[str, Any], statistics: Statistics, handle: Handle | None = None
    ) -> None:
        """Start with ``ΔW = 0``: one factor is zero, or the core."""
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
    """Start with the output channels' factor at zero, like a LoRA's B; if there is no such factor, the core.

    For an embedding it is the tokens' factor, as in PEFT. The factor of the other channels starts like a
    LoRA's A; the core and the kernel's factors are orthogonal, so that they preserve norms.
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
    """A factor ``(size, rank)`` of variance 1/(2 rank), torch's Kaiming start with a=√3; or "gaussian"."""
    values = torch.empty(shape)
    if start == "gaussian":
        return values.normal_(std=0.02, generator=generator)
    fill = nn.init.kaiming_normal_ if start == "kaiming-normal" else nn.init.kaiming_uniform_
    return fill(values, a=math.sqrt(3), generator=generator)


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number from 0 to ``most`` that fits, if every smaller number fits too."""
    low = 0
    while low < most:
        middle = (low + most + 1) // 2
        low, most = (middle, most) if fits(middle) else (low, middle - 1)
    return low
