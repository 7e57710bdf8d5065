"""LoRD: every layer becomes two thin factors that preserve the layer's outputs on real data.

With ``μ = E[x]`` and ``C = E[(x − μ)(x − μ)ᵀ]``, the factors minimise ``‖(W − B A) C^½‖_F`` and the bias
takes the mean, ``b' = b + (W − B A) μ``. For ``U`` the leading eigenvectors of the outputs' covariance
``W C Wᵀ`` this is atomic feature mimicking: ``A = Uᵀ W``, ``B = U`` (LoRD: Kaushal, Vaidhya and Rish 2023,
arXiv 2309.14021, section 3; AFM: Yu and Wu 2023). Uncentred, with ``C = E[x xᵀ]``, it is the activation-aware
decomposition that others call whitened SVD.

Our default weighs errors of the outputs by their effect on the loss: with ``G`` the second moment of the
loss's gradient at the outputs, ``½ ‖G^½ (W − B A) C^½‖²_F`` is, to second order and with the Fisher matrix
factored by layer, the rise of the loss in nats per token. In this common unit the ranks of all layers compete
for one budget.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_ft import solve
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
from lowrank_ft.anatomy.sites import Site
from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.layer import Layer, layer_of
from lowrank_ft.modules.lowrank import LowRank, LowRankNode, low_rank_node, supports_low_rank
from lowrank_ft.solve.allocation import Handle, Option, allocate, uniform
from lowrank_ft.solve.factors import Cut, Decomposition
from lowrank_ft.structure.registry import register_method

Objective = Literal["loss", "output", "weight"]


@dataclass(frozen=True)
class LoRD(CompressorConfig):
    """LoRD: replace layers by two thin factors that preserve their outputs on real data."""

    objective: Objective = "loss"
    """What to preserve: the model's loss (needs a backward pass), the layers' outputs (the paper), or the
    weights (plain SVD, needs no data)."""
    allocation: Literal["loss", "probe", "uniform"] | None = None
    """How ranks share the budget: "loss" by predicted loss; "probe" by output error times the model's
    sensitivity to it, measured by forward passes (no gradients); "uniform" with one ratio for all layers. By
    default "loss" if that is the objective, else "uniform"."""
    centered: bool | None = None
    """Let the bias compensate the mean error, so that the factors need not represent the mean (AFM). By
    default only in layers with a bias; True adds one to every layer, which some stock models cannot hold."""

    def __post_init__(self) -> None:
        super().__post_init__()
        required = {"loss": "loss", "probe": "output"}.get(self.allocation or "", self.objective)
        if self.objective != required:
            raise ConfigError(
                f"allocation={self.allocation!r} needs objective={required!r}: the errors of "
                f"objective={self.objective!r} cannot be compared between layers, and spending a budget by "
                f"them is worse than uniform ranks."
            )


@register_method
class LoRDMethod(Method[LoRD]):
    """Low-rank decomposition of linear layers and embeddings."""

    name = "lord"
    family = Family.COMPRESSOR
    Config = LoRD
    spending = frozenset({"ratio", "ratio_of"})

    def needs(self) -> frozenset[Need]:
        """Inputs, and for the loss gradients or probes; nothing for plain SVD."""
        if self.config.allocation == "probe":
            return frozenset({Need.INPUT, Need.SENSITIVITY})
        return needs_of(self.config.objective)

    def check(self, site: Site) -> None:
        """Refuse layers that cannot be factored."""
        layer = layer_of(site.modules[0], site.names[0])
        if not supports_low_rank(layer):
            raise TargetError(
                f"{site.names[0]} is a {type(layer.module).__name__}, which {self.name!r} cannot factor: "
                f"linear layers and plain embeddings can be. Exclude it."
            )

    def options(self, site: Site, statistics: Statistics) -> list[Option]:
        """Return every aligned rank that saves parameters, and the unchanged layer."""
        layer, moments = layer_of(site.modules[0]), statistics.get(site.name)
        probed = None if moments is None or self.config.allocation != "probe" else moments.sensitivity
        centers = self._centers(layer)
        return rank_options(
            layer,
            decompose(layer, moments, self.config.objective, centers=centers),
            centers=centers,
            align=self.config.align,
            min_saving=self.config.min_saving,
            loss_per_error=0.5 if probed is None else probed,
        )

    def choose(self, sites: Sequence[Site], options: Options, counts: Counts) -> list[Share]:
        """Spend the budget.

        Raises:
            ConfigError: a budget that these layers cannot meet.
        """
        dense = {site.name: layer_of(site.modules[0]).size for site in sites}
        budget = self.config.budget(sum(dense.values()), counts)
        chosen = allocate(options, budget) if self._predicts else uniform(options, dense, budget)
        return [Share.of(chosen[site.name], predicts=self._predicts) for site in sites]

    def structure(self, site: Site, share: Share) -> Mapping[str, LowRankNode]:
        """Return two factors, or nothing if the layer stays dense."""
        if share.rank is None:
            return {}
        layer = layer_of(site.modules[0])
        bias = layer.bias is not None or self._centers(layer)
        return {site.names[0]: low_rank_node(layer, share.rank, bias)}

    def values(
        self, site: Site, new: Mapping[str, Any], statistics: Statistics, handle: Handle | None = None
    ) -> Mapping[str, Any]:
        """Fill the factors and the bias, and return their errors."""
        layer, moments, module = layer_of(site.modules[0]), statistics.get(site.name), new[site.name]
        centers = self._centers(layer)
        if handle:
            cut = Cut.of_tensors(target_of(layer, moments, centers=centers), handle)
        else:
            cut = decompose(layer, moments, self.config.objective, centers=centers).cut(module.rank)
        return fill(module, layer, moments, cut, centers=centers)

    def _centers(self, layer: Layer) -> bool:
        if self.config.objective == "weight":
            return False
        return centers(layer) if self.config.centered is None else self.config.centered

    @property
    def _predicts(self) -> bool:
        """Whether an option's loss is a prediction in nats per token."""
        return self.config.allocation in ("loss", "probe") or (
            self.config.allocation is None and self.config.objective == "loss"
        )


# One layer, for other methods too ---------------------------------------------------------------------------


def needs_of(objective: Objective) -> frozenset[Need]:
    """Return the statistics that an objective needs: none, inputs, or inputs and output gradients."""
    needs: dict[str, set[Need]] = {
        "weight": set(),
        "output": {Need.INPUT},
        "loss": {Need.INPUT, Need.OUTPUT_GRADIENT},
    }
    return frozenset(needs[objective])


def centers(layer: Layer) -> bool:
    """Whether a layer's bias compensates the mean error by default: if it has a bias, or is an embedding."""
    return layer.bias is not None or layer.kind == "embedding"


def decompose(
    layer: Layer, moments: SiteStatistics | None, objective: Objective, *, centers: bool
) -> Decomposition:
    """Decompose a layer, with errors weighed by its inputs' and its output gradients' second moments.

    Args:
        layer: a linear layer, an embedding, or a convolution (as a matrix on patches).
        moments: the layer's moments; without them the errors are not weighed.
        objective: what weighs the errors.
        centers: whether the bias compensates the mean error.
    """
    if moments is None or objective == "weight":
        return solve.decompose(layer.matrix())
    device, matrix = layer.weight.device, target_of(layer, moments, centers=centers)
    C = moments.C.to(device)
    if centers and C.dim() == 2:
        mean = moments.mean.to(device)
        C = C - torch.outer(mean, mean)
    if objective == "output":
        return solve.decompose(matrix, C)
    G = None if moments.G is None else moments.G.to(device)
    WtGW = None if moments.WtGW is None else moments.WtGW.to(device)
    return solve.decompose(matrix, C, G, WtGW=WtGW, ridge=solve.GRADIENT_RIDGE)


def target_of(layer: Layer, moments: SiteStatistics | None, *, centers: bool) -> Tensor:
    """Return the matrix that the factors approximate, ``(out, in)``, float64.

    It is the layer's own, except for an embedding whose bias compensates the mean. There it is the table
    minus its mean row: for one-hot tokens this centres the outputs.
    """
    matrix = layer.matrix().double()
    if moments is None or not centers or moments.C.dim() == 2:
        return matrix
    return matrix - (matrix @ moments.mean.to(matrix.device))[:, None]


def rank_options(
    layer: Layer,
    decomposition: Decomposition,
    *,
    centers: bool,
    align: int,
    min_saving: float,
    loss_per_error: float = 0.5,
) -> list[Option]:
    """Return every aligned rank that saves parameters, and the unchanged layer.

    Args:
        layer: the layer.
        decomposition: its decomposition.
        centers: whether the bias compensates the mean error, so that the layer needs one.
        align: ranks are multiples of this.
        min_saving: the least share of the layer's parameters that an option must remove.
        loss_per_error: predicted nats per token for one unit of the squared weighted error.
    """
    rows, columns, dense = layer.out_features, layer.in_features, layer.size
    bias = rows if layer.bias is not None or centers else 0
    tails = decomposition.total - torch.cumsum(decomposition.energies, 0)
    step = min(align, min(rows, columns))
    sizes = {r: r * (rows + columns) + bias for r in range(step, min(rows, columns) + 1, step)}
    ranks = [r for r, size in sizes.items() if size < dense and size <= (1 - min_saving) * dense]
    handle = decomposition.cut(max(ranks)).tensors() if ranks else {}
    return [
        Option(None, dense, 0.0),
        *(Option(r, sizes[r], max(loss_per_error * float(tails[r - 1]), 0.0), handle=handle) for r in ranks),
    ]


def fill(
    module: LowRank, layer: Layer, moments: SiteStatistics | None, cut: Cut, *, centers: bool
) -> dict[str, Any]:
    """Fill a low-rank module with the best factors of its rank, and its bias; return their errors.

    Args:
        module: the module to fill.
        layer: the layer that it replaces.
        moments: the layer's moments; None for plain SVD.
        cut: the layer's leading directions, at least as many as the rank.
        centers: whether the bias compensates the mean error.
    """
    factors = cut.truncate(module.rank).balanced()
    weight = layer.matrix().double()
    layer_of(module.second).weight.copy_(factors.B)
    first = layer_of(module.first)
    first.weight.copy_(first.to_weight(factors.A))
    for index in ("rows", "columns"):
        if getattr(module, index) is not None:
            getattr(module, index).copy_(getattr(layer.module, index))
    if module.bias is not None:
        bias = torch.zeros(layer.out_features, dtype=torch.float64, device=weight.device)
        if layer.bias is not None:
            bias += layer.bias
        if centers and moments is not None:
            mean = moments.mean.to(weight.device)
            bias += weight @ mean - factors.B @ (factors.A @ mean)
        module.bias.copy_(bias)
    facts: dict[str, Any] = {
        "relative error": (cut.error(module.rank) / cut.total) ** 0.5 if cut.total else 0.0,
        "spectrum": thinned(cut.energies / cut.total) if cut.total else [],
    }
    if moments is not None:
        facts["tokens"] = moments.tokens
        facts["output error"] = output_error(weight, weight - factors.B @ factors.A, moments.C)
    if cut.root is not None:
        facts.update(ridge=cut.root.ridge, condition=cut.root.condition, factored=cut.root.method)
    return facts


def output_error(weight: Tensor, difference: Tensor, C: Tensor) -> float:
    """Return the relative error of a layer's outputs without the bias: ``‖ΔW C^½‖ / ‖W C^½‖``."""
    C = C.to(weight.device)
    error = max(solve.weighted_error(difference, C), 0.0)  # rounding can make it negative where C is singular
    return math.sqrt(error / max(solve.weighted_error(weight, C), 1e-300))


def thinned(values: Tensor, points: int = 64) -> list[float]:
    """Return evenly spaced values for a plot, fewer than twice ``points``."""
    step = max(1, len(values) // points)
    return [float(f"{value:.4g}") for value in values[::step].tolist()]
