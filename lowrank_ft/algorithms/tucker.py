"""Tucker compression: a convolution becomes a 1×1 convolution, a smaller one, and another 1×1.

Kim et al. 2016, arXiv 1511.06530, section 3: ``W ≈ G ×_out U_out ×_in U_in``, without factors for the
kernel's axes (Tucker-2). With ``objective="weight"`` the factors are those of the higher-order SVD of the
weight, which needs no data. A 1×1 convolution is a matrix, and becomes two factors.

Our default weighs errors by their effect on the loss, as LoRD does for linear layers. For ``U_in``, the
kernels at all offsets are stacked into one tall matrix on channels, decomposed under the second moments of
channels and gradients. Then for ``U_out``, the remaining kernel is one matrix on patches, decomposed under
their second moments. Each step is optimal for its rank. In this common unit the ranks of all layers compete
for one budget.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from lowrank_ft import solve
from lowrank_ft.algorithms import lord
from lowrank_ft.algorithms.base import (
    CompressorConfig,
    Counts,
    Family,
    Method,
    Need,
    Options,
    Share,
    Statistics,
)
from lowrank_ft.algorithms.lord import Objective
from lowrank_ft.anatomy.sites import Site
from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.layer import ConvLayer, layer_of
from lowrank_ft.modules.tucker import TuckerConv, TuckerNode, supports_tucker
from lowrank_ft.solve import Metric
from lowrank_ft.solve.allocation import Handle, Option, allocate, undominated, uniform
from lowrank_ft.solve.factors import Cut, Decomposition
from lowrank_ft.structure.registry import register_method


@dataclass(frozen=True)
class Tucker(CompressorConfig):
    """Tucker: replace each convolution by a chain of smaller ones that preserves its outputs on real data."""

    objective: Objective = "loss"
    """What to preserve: the model's loss (needs a backward pass), the layers' outputs, or the weights
    (higher-order SVD, needs no data)."""
    energy: float | None = None
    """Share of a layer's energy that each of its two ranks keeps; decides the ranks instead of `ratio`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.energy is not None and not 0 < self.energy < 1:
            raise ConfigError(f"energy must lie between 0 and 1, but is {self.energy}.")


@register_method
class TuckerMethod(Method[Tucker]):
    """Tucker decomposition of convolutions."""

    name = "tucker"
    family = Family.COMPRESSOR
    Config = Tucker
    spending = frozenset({"ratio", "ratio_of"})

    def needs(self) -> frozenset[Need]:
        """Inputs, and for the loss gradients; nothing for the weights."""
        return lord.needs_of(self.config.objective)

    def check(self, site: Site) -> None:
        """Refuse layers that cannot be decomposed."""
        layer = layer_of(site.modules[0], site.names[0])
        if not supports_tucker(layer):
            groups = getattr(layer.module, "groups", 1)
            what = f"convolution with groups={groups}" if groups > 1 else type(layer.module).__name__
            raise TargetError(
                f"{site.names[0]} is a {what}, which 'tucker' cannot decompose: plain Conv1d/2d/3d layers "
                f"without groups can be. Exclude it."
            )

    def options(self, site: Site, statistics: Statistics) -> list[Option]:
        """Return every pair of aligned ranks that makes the layer smaller, and the unchanged layer.

        Pairs are left out if another pair is no larger and has no larger error.
        """
        layer, moments = cast(ConvLayer, layer_of(site.modules[0])), statistics.get(site.name)
        sides = {"out": self._outer(layer, moments)}
        if has_inner(layer):
            sides["in"] = self._inner(layer, moments)
        tails = {side: tails_of(decomposition) for side, decomposition in sides.items()}
        channels = {"out": layer.out_features, "in": layer.module.in_channels}
        choices: dict[str, list[int | None]] = {"in": [None]}
        for side, tail in tails.items():
            step = min(self.config.align, len(tail))
            choices[side] = [None, *(r for r in range(step, len(tail), step) if r < channels[side])]
            if self.config.energy is not None:
                choices[side] = [self._keeping(tail, choices[side])]
        options = undominated(self._pairs(layer, choices, tails))
        handle: dict[str, Tensor] = {}
        for side, decomposition in sides.items():
            ranks = [o.rank if side == "out" else o.ranks.get("in") for o in options]
            largest = max((rank for rank in ranks if rank is not None), default=0)
            handle |= decomposition.cut(largest).tensors(f"{side}.") if largest else {}
        return [replace(option, handle=handle) for option in options]

    def _pairs(
        self, layer: ConvLayer, choices: Mapping[str, Sequence[int | None]], tails: Mapping[str, Tensor]
    ) -> list[Option]:
        """Return the pairs of ranks that are small enough, with their predicted loss."""
        dense = layer.size
        options = [Option(None, dense, 0.0)]
        for rank_out, rank_in in itertools.product(choices["out"], choices["in"]):
            size = size_of(layer, rank_out, rank_in)
            if size >= dense or size > (1 - self.config.min_saving) * dense:
                continue
            ranks = {"out": rank_out, "in": rank_in}
            lost = sum(float(tails[side][rank]) for side, rank in ranks.items() if rank is not None)
            inner = {} if rank_in is None else {"in": rank_in}
            options.append(Option(rank_out, size, 0.5 * max(lost, 0.0), inner))
        return options

    def choose(self, sites: Sequence[Site], options: Options, counts: Counts) -> list[Share]:
        """Spend the budget, or keep the configured share of the energy.

        Raises:
            ConfigError: a budget that these layers cannot meet.
        """
        by_loss = self.config.objective == "loss"
        if self.config.energy is not None:
            chosen = {name: min(of_site, key=lambda o: o.size) for name, of_site in options.items()}
        else:
            dense = {site.name: layer_of(site.modules[0]).size for site in sites}
            budget = self.config.budget(sum(dense.values()), counts)
            chosen = allocate(options, budget) if by_loss else uniform(options, dense, budget)
        return [Share.of(chosen[site.name], predicts=by_loss) for site in sites]

    def _keeping(self, tail: Tensor, ranks: Sequence[int | None]) -> int | None:
        """The smallest of the ranks that keeps the configured share of the energy; None if none does."""
        assert self.config.energy is not None
        allowed = (1 - self.config.energy) * float(tail[0])
        enough = [rank for rank in ranks if rank is not None and float(tail[rank]) <= allowed]
        return min(enough, default=None)

    def structure(self, site: Site, share: Share) -> Mapping[str, TuckerNode]:
        """Return the chain of convolutions, or nothing if the layer stays unchanged."""
        if share.rank is None and not share.ranks:
            return {}
        return {site.names[0]: TuckerNode(share.rank, share.ranks.get("in"))}

    def values(
        self, site: Site, new: Mapping[str, Any], statistics: Statistics, handle: Handle | None = None
    ) -> Mapping[str, Any]:
        """Fill the factors, and return their errors."""
        (name,) = site.names
        layer, moments = cast(ConvLayer, layer_of(site.modules[0])), statistics.get(name)
        module = cast(TuckerConv, new[name])
        node = module.structure()
        outer, core, inner = self._decompose(layer, moments, node, handle or {})
        module.core.weight.copy_(core)
        if module.inner is not None and inner is not None:
            module.inner.weight.copy_(inner.T.reshape(module.inner.weight.shape))
        if module.outer is not None and outer is not None:
            module.outer.weight.copy_(outer.reshape(module.outer.weight.shape))
        if module.bias is not None and layer.bias is not None:
            module.bias.copy_(layer.bias)
        weight = layer.matrix().double()
        error = weight - module.product().double().flatten(1)
        facts: dict[str, Any] = {
            "relative error": float(error.norm() / weight.norm().clamp_min(1e-300)),
            "ranks": {"out": node.rank_out, "in": node.rank_in},
        }
        if moments is not None:
            facts["tokens"] = moments.tokens
            facts["output error"] = lord.output_error(weight, error, moments.C)
        return facts

    def _decompose(
        self, layer: ConvLayer, moments: SiteStatistics | None, node: TuckerNode, handle: Handle
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return the outer factor ``(out, r)``, the core, and the inner factor ``(in, r)``."""
        kernel = layer.weight.shape[2:]
        if moments is None:
            return self._hosvd(layer, node, handle)
        core, inner, metric = layer.weight.double(), None, metric_of(layer, moments, self._by_loss)
        if node.rank_in is not None:
            channels = self._cut("in", layer, moments, node.rank_in, handle).truncate(node.rank_in)
            core = channels.B.reshape(layer.out_features, *kernel, node.rank_in).movedim(-1, 1)
            inner = channels.A.T
            metric = through(metric, channels.A, kernel.numel())
        if node.rank_out is None:
            return None, core, inner
        if node.rank_in is None:
            both = self._cut("out", layer, moments, node.rank_out, handle).truncate(node.rank_out)
        else:  # the core after the inner factor is a new matrix, which the options did not decompose
            WtGW = metric.WtGW if metric.left is None else None  # G is more exact, if it was gathered
            both = solve.decompose(
                core.flatten(1), metric.right, metric.left, WtGW=WtGW, ridge=solve.GRADIENT_RIDGE
            ).truncate(node.rank_out)
        return both.B, both.A.reshape(node.rank_out, *core.shape[1:]), inner

    def _hosvd(
        self, layer: ConvLayer, node: TuckerNode, handle: Handle
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The higher-order SVD of the weight: orthonormal factors, and the core between them."""
        outer = inner = None
        if node.rank_out is not None:
            outer = solve.orthonormal(
                self._cut("out", layer, None, node.rank_out, handle).truncate(node.rank_out).B
            )
        if node.rank_in is not None:
            inner = solve.orthonormal(
                self._cut("in", layer, None, node.rank_in, handle).truncate(node.rank_in).A.T
            )
        backwards = [None if factor is None else factor.T for factor in (outer, inner)]
        rest = [None] * (layer.weight.dim() - 2)
        return outer, solve.tucker(layer.weight.double(), [*backwards, *rest]), inner

    def _cut(
        self, side: str, layer: ConvLayer, moments: SiteStatistics | None, rank: int, handle: Handle
    ) -> Cut:
        """Return the leading directions of one side: from the options' handle, or computed again."""
        if handle:
            matrix = layer.matrix() if side == "out" else stacked(layer)
            return Cut.of_tensors(matrix, handle, f"{side}.")
        return (self._outer if side == "out" else self._inner)(layer, moments).cut(rank)

    @property
    def _by_loss(self) -> bool:
        return self.config.objective == "loss"

    def _outer(self, layer: ConvLayer, moments: SiteStatistics | None) -> Decomposition:
        """The kernel as a matrix on patches, decomposed under their metric."""
        return lord.decompose(layer, moments, self.config.objective, centers=False)

    def _inner(self, layer: ConvLayer, moments: SiteStatistics | None) -> Decomposition:
        """The kernels at every offset, one above the other, decomposed under the channels' metric."""
        stack = stacked(layer)
        if moments is None:
            return solve.decompose(stack)
        metric = metric_of(layer, moments, self._by_loss)
        assert metric.right is not None
        kernel = layer.weight[0, 0].numel()
        C = by_channel(metric.right, kernel) / kernel
        WtGW = None if metric.WtGW is None else by_channel(metric.WtGW, kernel)
        return solve.decompose(stack, C, WtGW=WtGW, ridge=solve.GRADIENT_RIDGE)


def stacked(layer: ConvLayer) -> Tensor:
    """Return the kernels at every offset, one above the other: ``(out · k…, in)``, float64."""
    return layer.weight.detach().double().movedim(1, -1).flatten(0, -2)


def tails_of(decomposition: Decomposition) -> Tensor:
    """Return the squared weighted error of every rank, from 0 to all."""
    kept = torch.cumsum(decomposition.energies, 0)
    return (
        torch.cat([kept.new_full((1,), decomposition.total), decomposition.total - kept]).clamp_min(0).cpu()
    )


def metric_of(layer: ConvLayer, moments: SiteStatistics, by_loss: bool) -> Metric:
    """Return the metric for errors of a convolution's matrix ``(out, in · k…)``.

    Its right side is the second moment of the patches. By the loss, its left side is the second moment of the
    output's gradient, and it has ``Wᵀ G W`` as well.
    """
    device, weight = layer.weight.device, layer.matrix().double()
    C = moments.C.to(device)
    if not by_loss:
        return Metric(right=C)
    G = None if moments.G is None else moments.G.to(device)
    WtGW = None if moments.WtGW is None else moments.WtGW.to(device)
    if WtGW is None and G is not None:
        WtGW = weight.T @ G @ weight
    return Metric(G, C, WtGW=WtGW)


def through(metric: Metric, inner: Tensor, kernel: int) -> Metric:
    """Return the metric of the convolution that follows the inner 1×1 convolution.

    Its weight is ``W M`` with ``M = C Aᵀ (A C Aᵀ)⁻¹`` by channel. G belongs to the output, and stays.

    Args:
        metric: the metric of the original convolution.
        inner: the 1×1 convolution ``A``, ``(rank, in)``.
        kernel: number of offsets of the kernel.
    """
    assert metric.right is not None
    C = by_channel(metric.right, kernel) / kernel
    root = solve.factor_spd(inner @ C @ inner.T)
    back = root.solve_transposed(root.solve(inner @ C)).T
    eye = torch.eye(kernel, dtype=C.dtype, device=C.device)
    # torch.kron refuses some transposed matrices.
    patches, weights = torch.kron(inner.contiguous(), eye), torch.kron(back.contiguous(), eye)
    WtGW = None if metric.WtGW is None else weights.T @ metric.WtGW @ weights
    return Metric(metric.left, patches @ metric.right @ patches.T, WtGW=WtGW)


def by_channel(moment: Tensor, kernel: int) -> Tensor:
    """Return the sum of a moment's diagonal blocks ``(in, in)``, one for each offset of the kernel."""
    channels = len(moment) // kernel
    blocks = moment.reshape(channels, kernel, channels, kernel)
    return blocks.diagonal(dim1=1, dim2=3).sum(-1)


def has_inner(layer: ConvLayer) -> bool:
    """Whether an inner 1×1 convolution can save parameters: not before 1×1 kernels or with few inputs."""
    return layer.weight[0, 0].numel() > 1 and layer.out_features <= layer.in_features


def size_of(layer: ConvLayer, rank_out: int | None, rank_in: int | None) -> int:
    """Return how many parameters the chain of convolutions has."""
    inputs, outputs, kernel = layer.module.in_channels, layer.out_features, layer.weight[0, 0].numel()
    size = (rank_out or outputs) * (rank_in or inputs) * kernel
    size += 0 if rank_out is None else rank_out * outputs
    size += 0 if rank_in is None else rank_in * inputs
    return size + (0 if layer.bias is None else outputs)
