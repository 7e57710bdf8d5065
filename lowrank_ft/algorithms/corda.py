"""CorDA: a LoRA that starts in the output directions with the most, or the least, energy on a text.

Yang et al. 2024, arXiv 2406.05223. With ``C = E[x xᵀ]`` the second moment of a layer's input on some text
and ``W C = U S Vᵀ``, the paper starts from ``B A = U_r S_r V_rᵀ C⁻¹`` (equations 3–5) with the *first* r
triples, so that training begins in the directions with the most energy ("instruction-previewed"), or with the
*last* r, so that training changes the outputs on the text least ("knowledge-preserved").

The inverse cancels: ``U_rᵀ W C C⁻¹ = U_rᵀ W``. So ``B A = U_r U_rᵀ W`` is the weight projected on directions
of its output; no matrix is inverted, and C may be singular.

The base stays unchanged. A frozen copy ``B₀ A₀`` of the start is kept, and the delta is
``scale · (B A − B₀ A₀)``. It trains as the paper's form does, is exactly zero at the start, and other
adapters can use the same base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor, nn

from lowrank_ft import solve
from lowrank_ft.algorithms.base import Counts, Family, Method, Need, Options, Share, Statistics
from lowrank_ft.algorithms.lora import LoRADelta, LoRANode, LoRAOptions
from lowrank_ft.anatomy.sites import Site
from lowrank_ft.calibration.batches import Calibration
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.layer import ConvLayer, Layer, layer_of
from lowrank_ft.solve.allocation import Handle, Option
from lowrank_ft.structure.registry import register_method


@dataclass(frozen=True)
class CorDA(LoRAOptions):
    """CorDA: a LoRA that starts in the output directions with the most, or the least, energy on a text."""

    mode: Literal["knowledge", "instruction"] = "instruction"
    """"instruction": start in the output directions with the most energy on the calibration text, which
    should be the task's; "knowledge": in those with the least, on a text of the knowledge to preserve."""
    objective: Literal["covariance", "output"] = "covariance"
    """Directions are singular vectors of W C ("covariance", the paper), or of W C^½ ("output"), which are the
    principal components of the layer's output."""
    factors: Literal["balanced", "paper"] = "balanced"
    """How the start is split into two factors: "balanced" evenly; "paper" as U √S and √S Vᵀ C⁻¹, whose norms
    depend on the scale of the activations."""
    budget: int | None = None
    """Parameters to train in total, instead of one rank: ranks depend on the spectra of the layers' outputs
    on the calibration text."""
    calibration: Calibration = field(default_factory=Calibration)
    """The data that the method looks at."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.rank_pattern:
            raise ConfigError("budget decides every layer's rank: leave out rank_pattern, or budget.")
        if self.calibration.sequential:
            raise ConfigError("calibration.sequential is for compressors: an adapter changes no layer.")


@register_method
class CorDAMethod(Method[CorDA]):
    """LoRA with a start computed from calibration data."""

    name = "corda"
    family = Family.ADAPTER
    Config = CorDA

    def needs(self) -> frozenset[Need]:
        """Second moments of the inputs."""
        return frozenset({Need.INPUT})

    def sites(self, model: nn.Module, chosen: list[Site]) -> list[Site]:
        """Return the targeted layers.

        Raises:
            TargetError: a pattern in the config that matches none of them.
        """
        self.config.check_patterns(chosen)
        return chosen

    def check(self, site: Site) -> None:
        """Refuse ranks that are too large, and convolutions with groups."""
        (name,), (module,) = site.names, site.modules
        layer = layer_of(module, name)
        if isinstance(layer, ConvLayer) and layer.module.groups > 1:
            raise TargetError(
                f"{name} is a convolution with groups={layer.module.groups}, whose outputs see different "
                f"inputs, so it has no one second moment: exclude it."
            )
        self.config.node(site, 1, anchored=True)
        if self.config.budget is None:
            self._rank(site)

    def options(self, site: Site, statistics: Statistics) -> list[Option]:
        """Return one option, whose handle is the layer's spectrum, if there is a budget; otherwise none."""
        if self.config.budget is None:
            return []
        layer = layer_of(site.modules[0])
        moment = self._moment(site, layer, statistics)
        spectrum = solve.output_spectrum(layer.matrix(), moment, squared=self._squared)
        return [Option(None, 0, 0.0, handle={"spectrum": spectrum})]

    def choose(self, sites: Sequence[Site], options: Options, counts: Counts) -> list[Share]:
        """Give each layer its rank.

        Raises:
            ConfigError: a rank above min(out, in) of its layer; a budget below rank 1 for all.
        """
        if self.config.budget is None:
            return super().choose(sites, options, counts)
        layers = [layer_of(site.modules[0]) for site in sites]
        spectra = [options[site.name][0].handle["spectrum"] for site in sites]
        prices = [layer.out_features + layer.in_features for layer in layers]
        ranks = spread(spectra, prices, self.config.budget, smallest=self.config.mode == "knowledge")
        return [Share(rank) for rank in ranks]

    def structure(self, site: Site, share: Share) -> Mapping[str, LoRANode]:
        """Return one LoRA for each layer, whose delta is measured from its start."""
        return {site.names[0]: self.config.node(site, cast(int, share.rank), anchored=True)}

    def values(
        self, site: Site, new: Mapping[str, Any], statistics: Statistics, handle: Handle | None = None
    ) -> None:
        """Start from the weight projected on directions of its output, with a delta of zero."""
        delta, layer = cast(LoRADelta, new[site.names[0]]), layer_of(site.modules[0])
        weight, C = layer.matrix().detach().double(), self._moment(site, layer, statistics)
        last = self.config.mode == "knowledge"
        U, S = solve.output_directions(weight, C, delta.node.rank, squared=self._squared, last=last)
        factors = solve.Factors(U, U.T @ weight)
        if self.config.factors == "balanced":
            factors = factors.balanced()
        else:
            zero = 1e-14 * float(weight.norm() * C.norm())  # values up to this are zero but for rounding
            if S[-1] <= zero:
                raise ConfigError(
                    f"The second moment of the input of {site.names[0]} is singular, where factors='paper' "
                    f"is not defined: use more calibration data, or factors='balanced'."
                )
            factors = solve.Factors(U * S.sqrt(), factors.A / S.sqrt()[:, None])
        root = delta.node.scale**0.5
        delta.start_from(factors.B / root, factors.A / root)

    @property
    def _squared(self) -> bool:
        return self.config.objective == "covariance"

    @staticmethod
    def _moment(site: Site, layer: Layer, statistics: Statistics) -> Tensor:
        return statistics[site.names[0]].C.to(layer.weight.device)


def spread(spectra: Sequence[Tensor], prices: Sequence[int], budget: int, *, smallest: bool) -> list[int]:
    """Spend a budget on ranks greedily, by the energy that a further direction adds per parameter.

    Energies are relative to the sum of their layer, and every layer gets at least rank 1. The result is
    optimal up to the last direction that does not fit, since a layer's directions are sorted by energy.

    Args:
        spectra: each layer's singular values, descending.
        prices: how many parameters one rank costs in each layer.
        budget: parameters of all ranks together.
        smallest: take the directions with the least energy, from the end of each spectrum, instead of those
            with the most.

    Returns:
        each layer's rank.

    Raises:
        ConfigError: the budget is below rank 1 for every layer.
    """
    left = budget - sum(prices)
    if left < 0:
        raise ConfigError(
            f"The budget of {budget:,} is below {sum(prices):,}, what rank 1 takes in every layer: raise it, "
            f"or target fewer layers."
        )
    directions = []
    for i, (values, price) in enumerate(zip(spectra, prices, strict=True)):
        energies = values.square() / values.square().sum().clamp_min(1e-300)
        ordered = energies.flip(0) if smallest else -energies
        directions += [(value / price, i) for value in ordered.tolist()[1:]]
    ranks, closed = [1] * len(spectra), set()
    for _, i in sorted(directions):
        if i in closed or prices[i] > left:
            closed.add(i)  # a layer's directions are taken in order, so none after this one can be taken
            continue
        ranks[i] += 1
        left -= prices[i]
    return ranks
