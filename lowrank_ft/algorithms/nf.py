"""NF: store weights in few bits, as in the base model that QLoRA adapts.

Dettmers et al. 2023, arXiv 2305.14314: blocks of weights are rounded to a normal-float codebook, each block
with a scale, and the scales are quantised again. This implementation packs 2, 3, 4 and 8 bits, and has other
codebooks as well. With a budget, an integer program chooses bits and block size of each matrix (Guo et al.
2024, arXiv 2311.12023, section 3.2). The two factors of a decomposed layer are quantised separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_ft.algorithms import lord
from lowrank_ft.algorithms.base import Counts, Family, Method, MethodConfig, Need, Options, Share, Statistics
from lowrank_ft.anatomy.sites import Site
from lowrank_ft.calibration.batches import Calibration
from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.layer import layer_of
from lowrank_ft.modules.lowrank import LowRank, LowRankNode
from lowrank_ft.modules.quantized import Quantized, QuantizedNode
from lowrank_ft.modules.resized import Resized
from lowrank_ft.quant import Scheme, program
from lowrank_ft.quant.program import GridName
from lowrank_ft.quant.rounding import Feedback
from lowrank_ft.quant.scheme import CodebookName, Library, ScaleType
from lowrank_ft.solve import allocation
from lowrank_ft.solve.allocation import Handle, Option
from lowrank_ft.solve.metric import Metric
from lowrank_ft.structure.node import DenseNode, Node
from lowrank_ft.structure.registry import register_method

Weighing = Literal["weight", "fisher", "activation", "loss"]
Rounding = Literal["nearest", "feedback"]
BudgetUnit = Literal["bits", "memory", "disk"]


@dataclass(frozen=True)
class QuantizeOptions:
    """How weights are stored, and how a budget is spent on them."""

    bits: int = 4
    """Bits of a code if there is no budget: 2, 3, 4 or 8."""
    codebook: CodebookName = "nf"
    """Levels: "nf" (normal float), "signed" (scaled by the signed largest entry; better), "fitted" (to each
    matrix), "fp4", or "int8" (one scale for each row)."""
    block: int = 64
    """Weights that share a scale."""
    scale_bits: int = 8
    """Bits of a scale: 2, 3, 4 or 8 (scales are quantised in blocks too), or 32 (scales are float32)."""
    scale_block: int = 256
    """Scales in a block, which share a scale of their own."""
    scale_dtype: ScaleType = "float32"
    """Type of the scales' scales."""
    library: Library = "torch"
    """Packing format: "torch" (this package's), or "bitsandbytes" (nf and fp4 in 4 bits, int8)."""
    rounding: Rounding = "nearest"
    """"nearest", or "feedback": compensate each column's rounding errors in the columns still to be rounded,
    on calibration data (GPTQ)."""
    objective: Weighing = "weight"
    """How errors are weighed: "weight" (all alike, no data), "fisher" (row and column means of squared
    gradients), "activation" (error of the layers' outputs on calibration data), or "loss" (its effect on the
    loss)."""
    budget: float | None = None
    """Size of all weights: bits and block are then chosen for each matrix. Without it all have the same."""
    budget_of: BudgetUnit = "bits"
    """Unit of the budget: "bits" for each targeted weight; or megabytes of the whole model, in "memory" or on
    "disk". Scales and factors are included."""
    solver: Literal["program", "lagrangian", "uniform"] = "program"
    """How the budget is spent: by an integer program (HiGHS), its Lagrangian relaxation, or evenly."""
    grid: GridName = "compact"
    """Schemes to choose from: "compact" (bits, blocks), or "paper" (scales' bits, blocks and types too)."""
    calibration: Calibration = field(default_factory=Calibration)
    """The data that the method looks at."""

    def __post_init__(self) -> None:
        self.scheme  # noqa: B018 (a Scheme checks its values when it is made)
        if self.budget is not None and not self.budget > 0:
            raise ConfigError(f"The budget must be positive, but is {self.budget}.")
        if self.budget is not None and self.library != "torch":
            raise ConfigError("A budget chooses among schemes that bitsandbytes lacks: use library='torch'.")
        if self.rounding == "feedback" and self.library != "torch":
            raise ConfigError("bitsandbytes rounds to nearest: use library='torch' for rounding='feedback'.")
        if self.calibration.sequential:
            raise ConfigError("calibration.sequential is for decompositions: leave it out.")

    @property
    def scheme(self) -> Scheme:
        """The scheme of every matrix if there is no budget."""
        return Scheme(
            self.codebook,
            self.bits,
            self.block,
            self.scale_bits,
            self.scale_block,
            self.scale_dtype,
            self.library,
        )

    def needs(self) -> frozenset[Need]:
        """Return the statistics that these options need."""
        by_objective = {
            "weight": set(),
            "fisher": {Need.INPUT, Need.FISHER},
            "activation": {Need.INPUT},
            "loss": {Need.INPUT, Need.OUTPUT_GRADIENT, Need.WEIGHTED_INPUT},
        }
        needs: set[Need] = by_objective[self.objective]
        return frozenset(needs | ({Need.INPUT} if self.rounding == "feedback" else set()))


@dataclass(frozen=True)
class NF(QuantizeOptions, MethodConfig):
    """NF: store linear layers in few bits."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective != "weight" and self.budget is None:
            raise ConfigError(
                f"objective={self.objective!r} says how a budget is spent: set budget, or leave it out."
            )


class QuantizerMethod(Method[Any]):
    """Base of the quantising methods: their needs, their checks, and the spending of a budget."""

    family = Family.QUANTIZER
    spending = frozenset({"budget", "budget_of", "solver", "bits", "block", "rounding"})
    config: QuantizeOptions

    def needs(self) -> frozenset[Need]:
        """The statistics that the options need."""
        return self.config.needs()

    def check(self, site: Site) -> None:
        """Refuse layers that are not linear, or are quantised already."""
        (name,), (module,) = site.names, site.modules
        layer = layer_of(module, name)
        if isinstance(module, Quantized) or any(isinstance(m, Quantized) for m in module.modules()):
            raise TargetError(f"{name} is quantised already: exclude it, or start from the original model.")
        if layer.kind not in ("linear", "transposed-linear"):
            raise TargetError(
                f"{name} is a {type(layer.module).__name__}, which {self.name!r} cannot store in few bits: "
                f"linear layers can be. Exclude it."
            )

    def ranks(self, site: Site) -> tuple[int, ...]:
        """Return the possible ranks of a site's low-rank correction; none if it has no correction."""
        return ()

    def factor_bits(self, site: Site) -> int:
        """Return the bits of each number in a site's correction."""
        return 0

    def options(self, site: Site, statistics: Statistics) -> list[Option]:
        """Return a site's schemes and ranks with predicted losses; no options if there is no budget."""
        if self.config.budget is None:
            return []
        schemes = program.grid(self.config.scheme, self.config.grid)
        totals: dict[tuple[Scheme, int | None], Option] = {}
        for module, moments in leaves(site.modules[0], statistics.get(site.name)):
            layer = layer_of(module)
            matrix = program.Matrix(
                layer.matrix().detach().float(),
                metric_of(moments, self.config.objective, layer.weight.device),
                self.ranks(site),
                self.factor_bits(site),
            )
            for option in program.options_of(matrix, schemes):
                key = (option.scheme, option.rank)
                before = totals.get(key, Option(option.rank, 0, 0.0))
                totals[key] = replace(option, size=before.size + option.size, loss=before.loss + option.loss)
        return list(totals.values())

    def choose(self, sites: Sequence[Site], options: Options, counts: Counts) -> list[Share]:
        """Spend the budget, or give every matrix the same scheme.

        Raises:
            ConfigError: a budget below the smallest schemes.
        """
        if self.config.budget is None:
            ranks = [self.ranks(site) for site in sites]
            return [Share(max(r) if r else None, scheme=self.config.scheme) for r in ranks]
        solvers = {
            "program": allocation.solve,
            "lagrangian": allocation.allocate,
            "uniform": allocation.same_for_all,
        }
        chosen = solvers[self.config.solver](options, self._bytes(sites, counts))
        by_loss = self.config.objective == "loss"
        return [Share.of(chosen[site.name], predicts=by_loss) for site in sites]

    def _bytes(self, sites: Sequence[Site], counts: Counts) -> int:
        """The budget in bytes of the targeted weights and their factors."""
        assert self.config.budget is not None
        weights = [layer_of(m) for site in sites for m, _ in leaves(site.modules[0], None)]
        numbers = sum(layer.out_features * layer.in_features for layer in weights)
        if self.config.budget_of == "bits":
            return int(self.config.budget * numbers / 8)
        dense = sum(layer.out_features * layer.in_features * layer.weight.element_size() for layer in weights)
        rest = counts.bytes - dense
        if self.config.budget_of == "disk":
            rest += _headers(sites, counts)
        left = int(self.config.budget * 1e6) - rest
        if left <= 0:
            raise ConfigError(
                f"The budget of {self.config.budget} MB is below the {rest / 1e6:.1f} MB that the model "
                f"takes without the targeted weights: raise it, or target more layers."
            )
        return left

    def structure(self, site: Site, share: Share) -> Mapping[str, Node]:
        """Return the quantised layer, or a factored layer with quantised factors."""
        assert share.scheme is not None
        module = site.modules[0]
        if isinstance(module, LowRank):
            first, second = (_quantised(m, share.scheme) for m in (module.first, module.second))
            return {site.names[0]: LowRankNode(module.rank, module.bias is not None, first, second)}
        return {site.names[0]: _quantised(module, share.scheme)}

    def feedback(self, moments: SiteStatistics | None, device: torch.device) -> Feedback | None:
        """Return the error feedback for rounding, if the options ask for it."""
        if self.config.rounding == "nearest":
            return None
        assert moments is not None
        C = moments.C if moments.C_weighted is None else moments.C_weighted
        return Feedback.under(C.to(device))


@register_method
class NFMethod(QuantizerMethod):
    """Round to a codebook."""

    name = "nf"
    Config = NF
    config: NF

    def values(
        self, site: Site, new: Mapping[str, Any], statistics: Statistics, handle: Handle | None = None
    ) -> Mapping[str, Any]:
        """Store the weights, and return their errors."""
        (name,), (module,) = site.names, site.modules
        moments = statistics.get(name)
        targets = [new[name].first, new[name].second] if isinstance(module, LowRank) else [new[name]]
        for target, (stock, leaf_moments) in zip(targets, leaves(module, moments), strict=True):
            layer = layer_of(stock)
            target.copy_unquantized(stock)
            target.fill(layer.matrix(), self.feedback(leaf_moments, layer.weight.device))
        return facts(site, layer_of(new[name]).matrix(), targets, moments)


def metric_of(moments: SiteStatistics | None, objective: Weighing, device: torch.device) -> Metric:
    """Return the metric that weighs the errors of one layer under an objective.

    ``fisher``: ``diag(row means) ⊗ diag(column means)`` of the squared gradient, divided by its mean, so that
    its sum is that of the Fisher matrix's diagonal and layers can be compared (LQ-LoRA, arXiv 2311.12023,
    section 3.3). ``activation``: the second moment of the input. ``loss``: the second moments of the input
    and of the output's gradient (only the diagonal, for layers with more outputs than inputs), which give
    the predicted rise of the loss in nats per token.

    Raises:
        ConfigError: a layer without the statistics that the objective needs.
    """
    if objective == "weight":
        return Metric()
    if moments is None:
        raise ConfigError(f"objective={objective!r} needs calibration data.")
    if objective == "fisher":
        if moments.fisher_rows is None or moments.fisher_columns is None:
            raise ConfigError("objective='fisher' is for linear layers: exclude the others.")
        mean = moments.fisher_rows.mean().clamp_min(1e-300)
        return Metric(moments.fisher_rows.to(device), (moments.fisher_columns / mean).to(device))
    C = moments.C.to(device)
    if objective == "activation":
        return Metric(None, C)
    G = moments.G if moments.G is not None else moments.G_diagonal
    assert G is not None
    return Metric(G.to(device), C if moments.C_weighted is None else moments.C_weighted.to(device), 0.5)


def leaves(
    module: nn.Module, moments: SiteStatistics | None
) -> list[tuple[nn.Module, SiteStatistics | None]]:
    """Return the layers that hold a site's weights, with their statistics: both factors of a factored layer.

    With ``W = B A``, the second factor's input ``A x`` has the second moment ``A C Aᵀ``, and the gradient at
    the first factor's output, ``Bᵀ g``, has ``Bᵀ G B``. There is no such rule for the Fisher matrix's means.
    """
    if not isinstance(module, LowRank):
        return [(module, moments)]
    if moments is None:
        return [(module.first, None), (module.second, None)]
    B, A = (factor.detach().double() for factor in module.factors())
    if moments.fisher_rows is not None:
        raise ConfigError(
            "objective='fisher' is not defined for factored layers: use 'activation' or 'loss'."
        )
    G = moments.G
    if G is None and moments.G_diagonal is not None:
        G = torch.diag(moments.G_diagonal)
    C, mean = moments.C.to(A.device), moments.mean.to(A.device)
    weighted = None if moments.C_weighted is None else moments.C_weighted.to(A.device)
    first = SiteStatistics(
        moments.tokens, C, mean, G=None if G is None else B.T @ G.to(B.device) @ B, C_weighted=weighted
    )
    second = SiteStatistics(
        moments.tokens,
        A @ C @ A.T,
        A @ mean,
        G=moments.G,
        G_diagonal=moments.G_diagonal,
        C_weighted=None if weighted is None else A @ weighted @ A.T,
    )
    return [(module.first, first), (module.second, second)]


def facts(
    site: Site, read: Tensor, stored: Sequence[Quantized], moments: SiteStatistics | None
) -> dict[str, Any]:
    """Return the report's facts on a quantised site.

    Args:
        site: the original layer.
        read: its matrix as it is read from storage.
        stored: the quantised layers that store it.
        moments: the original layer's moments.
    """
    weight = layer_of(site.modules[0]).matrix().double()
    error = weight - read.double()
    report: dict[str, Any] = {
        "scheme": stored[0].scheme.label,
        "relative error": float(error.norm() / weight.norm().clamp_min(1e-300)),
        "bits": 8 * sum(m.stored_bytes for m in stored) / sum(m.weights for m in stored),
    }
    if moments is not None:
        report["tokens"] = moments.tokens
        report["output error"] = lord.output_error(weight, error, moments.C)
    return report


def _quantised(module: nn.Module, scheme: Scheme) -> QuantizedNode:
    base: Node = module.structure() if isinstance(module, Resized) else DenseNode()
    return QuantizedNode(scheme, base)


_TENSORS = ("codes", "levels", "scales", "supers", "offset", "weight", "parts.default.A", "parts.default.B")


def _headers(sites: Sequence[Site], counts: Counts) -> int:
    """An upper bound of the bytes of a safetensors file's header: names, types, shapes and offsets."""
    offsets = 2 * len(str(counts.bytes))
    packed = sum(
        len(name) + len(tensor) + 90 + offsets for site in sites for name in site.names for tensor in _TENSORS
    )
    return packed + counts.tensors * (130 + offsets)
