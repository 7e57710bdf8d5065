"""Tucker compression: a convolution becomes 1×1, a smaller convolution, 1×1.

Kim et al. 2016, arXiv 1511.06530, section 3: ``W ≈ G ×_out U_out ×_in U_in``, the kernel's own axes left
whole (Tucker-2). With ``objective="weight"`` the factors are those of the higher-order SVD of the weight,
which needs no data. A 1×1 convolution is a matrix, and takes two factors.

Our default weighs errors by what they do to the loss, as LoRD does for linear layers. For ``U_in``, the
kernels stacked at every offset are one tall matrix of channels, decomposed under the channels' second moment
and the gradients'; then for ``U_out``, what is left is one matrix of patches, under theirs. Each step is the
best of its rank. In that one currency the ranks of all layers compete for one budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lowrank_ft import linalg
from lowrank_ft.algorithms import lord
from lowrank_ft.algorithms.base import CompressorConfig, Counts, Family, Method, Need, Share, Statistics
from lowrank_ft.algorithms.lord import Objective
from lowrank_ft.allocation import Option, allocate, undominated, uniform
from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.layer import ConvLayer, layer_of
from lowrank_ft.modules.tucker import TuckerConv, TuckerNode, supports_tucker
from lowrank_ft.registry import register_method
from lowrank_ft.sites import Site


@dataclass(frozen=True)
class Tucker(CompressorConfig):
    """Tucker: replace convolutions by smaller ones in a row that keep what their outputs do on real data."""

    objective: Objective = "loss"
    """What to keep: the model's loss (one backward pass), the layers' outputs, or the weights themselves
    (higher-order SVD, no data)."""
    energy: float | None = None
    """Share of each layer's energy that each of its two ranks keeps, in place of `ratio`."""

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

    def needs(self) -> frozenset[Need]:
        """Nothing for the weights; inputs; gradients too for the loss."""
        return lord.needs_of(self.config.objective)

    def check(self, site: Site) -> None:
        """Refuse what cannot become smaller convolutions."""
        layer = layer_of(site.modules[0], site.names[0])
        if not supports_tucker(layer):
            groups = getattr(layer.module, "groups", 1)
            what = f"convolution with groups={groups}" if groups > 1 else type(layer.module).__name__
            raise TargetError(
                f"{site.names[0]} is a {what}, which 'tucker' cannot decompose: plain Conv1d/2d/3d layers "
                f"without groups can be. Exclude it."
            )

    def plan(self, sites: Sequence[Site], statistics: Statistics, counts: Counts) -> list[Share]:
        """Spend the budget, or keep the energy that was asked for.

        Raises:
            ConfigError: a budget that these layers cannot meet.
        """
        options, dense = {}, {}
        for site in sites:
            name, layer = site.names[0], cast(ConvLayer, layer_of(site.modules[0]))
            dense[name] = lord.size_of(layer)
            options[name] = self._options(layer, statistics.get(name))
        if self.config.energy is not None:
            chosen = {name: min(found, key=lambda option: option.size) for name, found in options.items()}
        else:
            budget = self.config.budget(sum(dense.values()), counts)
            by_loss = self.config.objective == "loss"
            chosen = allocate(options, budget) if by_loss else uniform(options, dense, budget)
        return [self._share(chosen[site.names[0]]) for site in sites]

    def _share(self, option: Option) -> Share:
        predicted = option.loss if self.config.objective == "loss" else None
        return Share(option.rank, predicted, option.ranks)

    def _options(self, layer: ConvLayer, known: SiteStatistics | None) -> list[Option]:
        """Return every pair of aligned ranks that makes the layer smaller, and the layer as it is.

        Only those on the way down: a larger pair with a larger error is left out.
        """
        tails = {"out": self._tails(self._outer(layer, known))}
        tails["in"] = self._tails(self._inner(layer, known)) if has_inner(layer) else torch.zeros(1)
        dense, align = lord.size_of(layer), self.config.align
        channels = {"out": layer.out_features, "in": layer.module.in_channels}
        choices: dict[str, list[int | None]] = {}
        for side, tail in tails.items():
            step = min(align, len(tail))
            ranks = range(step, len(tail), step) if side == "out" or has_inner(layer) else ()
            choices[side] = [None, *(r for r in ranks if r < channels[side])]
        if self.config.energy is not None:
            choices = {side: self._keeping(tails[side], ranks) for side, ranks in choices.items()}
        found = [Option(None, dense, 0.0)]
        for rank_out in choices["out"]:
            for rank_in in choices["in"]:
                size = size_of(layer, rank_out, rank_in)
                if size >= dense or size > (1 - self.config.min_saving) * dense:
                    continue
                lost = sum(
                    float(tails[s][r]) for s, r in (("out", rank_out), ("in", rank_in)) if r is not None
                )
                found.append(
                    Option(rank_out, size, 0.5 * max(lost, 0.0), {} if rank_in is None else {"in": rank_in})
                )
        return undominated(found)

    def _keeping(self, tail: Tensor, ranks: Sequence[int | None]) -> list[int | None]:
        """The least of the ranks that keeps the energy."""
        assert self.config.energy is not None
        allowed = (1 - self.config.energy) * float(tail[0])
        enough = [rank for rank in ranks if rank is not None and float(tail[rank]) <= allowed]
        return [min(enough, default=None)]

    def _tails(self, found: linalg.Decomposition) -> Tensor:
        """The squared weighted error of every rank, from 0 to all."""
        kept = torch.cumsum(found.energies, 0)
        return torch.cat([kept.new_full((1,), found.total), found.total - kept]).clamp_min(0).cpu()

    def structure(self, site: Site, share: Share) -> Mapping[str, TuckerNode]:
        """Return the convolutions in a row, or nothing where the layer stays as it is."""
        if share.rank is None and not share.ranks:
            return {}
        return {site.names[0]: TuckerNode(share.rank, share.ranks.get("in"))}

    def values(self, site: Site, new: Mapping[str, Any], statistics: Statistics) -> Mapping[str, Any]:
        """Fill the factors, and report what they leave."""
        (name,) = site.names
        layer, known = cast(ConvLayer, layer_of(site.modules[0])), statistics.get(name)
        module = cast(TuckerConv, new[name])
        node = module.structure()
        outer, core, inner = self._decompose(layer, known, node)
        module.core.weight.copy_(core)
        if module.inner is not None and inner is not None:
            module.inner.weight.copy_(inner.T.reshape(module.inner.weight.shape))
        if module.outer is not None and outer is not None:
            module.outer.weight.copy_(outer.reshape(module.outer.weight.shape))
        if module.bias is not None and layer.bias is not None:
            module.bias.copy_(layer.bias)
        weight = layer.matrix().double()
        left = weight - module.product().double().flatten(1)
        facts: dict[str, Any] = {
            "relative error": float(left.norm() / weight.norm().clamp_min(1e-300)),
            "ranks": {"out": node.rank_out, "in": node.rank_in},
        }
        if known is not None:
            facts["tokens"] = known.tokens
            facts["output error"] = lord.output_error(weight, left, known.C)
        return facts

    def _decompose(
        self, layer: ConvLayer, known: SiteStatistics | None, node: TuckerNode
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Return the outer factor ``(out, r)``, the core, and the inner factor ``(in, r)``."""
        kernel = layer.weight.shape[2:]
        if known is None:
            modes = (node.rank_out, node.rank_in, *(None,) * len(kernel))
            core, factors = linalg.hosvd(layer.weight, modes)
            return factors[0], core, factors[1]
        core, inner, metric = layer.weight.double(), None, Metric.of(layer, known, self._by_loss)
        if node.rank_in is not None:
            channels = self._inner(layer, known).truncate(node.rank_in)
            core = channels.B.reshape(layer.out_features, *kernel, node.rank_in).movedim(-1, 1)
            inner = channels.A.T
            metric = metric.through(channels.A, kernel.numel())
        if node.rank_out is None:
            return None, core, inner
        pulled = metric.pulled if metric.G is None else None  # G says more, where it is known
        found = linalg.decompose(
            core.flatten(1), metric.C, metric.G, pulled=pulled, ridge=linalg.GRADIENT_RIDGE
        )
        both = found.truncate(node.rank_out)
        return both.B, both.A.reshape(node.rank_out, *core.shape[1:]), inner

    @property
    def _by_loss(self) -> bool:
        return self.config.objective == "loss"

    def _outer(self, layer: ConvLayer, known: SiteStatistics | None) -> linalg.Decomposition:
        """The kernel as a matrix of patches, decomposed under their metric."""
        if known is None:
            return linalg.decompose(layer.matrix())
        return lord.decompose(layer, known, by_loss=self._by_loss, centers=False)

    def _inner(self, layer: ConvLayer, known: SiteStatistics | None) -> linalg.Decomposition:
        """The kernels at every offset, one above the other, decomposed under the channels' metric."""
        stack = layer.weight.double().movedim(1, -1).flatten(0, -2)  # (out · k…, in)
        if known is None:
            return linalg.decompose(stack)
        metric = Metric.of(layer, known, self._by_loss)
        kernel = layer.weight[0, 0].numel()
        C = by_channel(metric.C, kernel) / kernel
        pulled = None if metric.pulled is None else by_channel(metric.pulled, kernel)
        return linalg.decompose(stack, C, pulled=pulled, ridge=linalg.GRADIENT_RIDGE)


@dataclass(frozen=True)
class Metric:
    """What weighs the errors of a convolution's matrix.

    Attributes:
        C: second moment of the patches, ``(in · k…, in · k…)``, float64.
        G: second moment of the output's gradient, ``(out, out)``; None for the outputs' own error.
        pulled: ``Wᵀ G W``; None likewise.
    """

    C: Tensor
    G: Tensor | None
    pulled: Tensor | None

    @classmethod
    def of(cls, layer: ConvLayer, known: SiteStatistics, by_loss: bool) -> Metric:
        """Return a layer's metric."""
        device, weight = layer.weight.device, layer.matrix().double()
        if not by_loss:
            return cls(known.C.to(device), None, None)
        G = None if known.G is None else known.G.to(device)
        pulled = None if known.pulled is None else known.pulled.to(device)
        if pulled is None and G is not None:
            pulled = weight.T @ G @ weight
        return cls(known.C.to(device), G, pulled)

    def through(self, inner: Tensor, kernel: int) -> Metric:
        """Return the metric of what comes after a 1×1 convolution ``(rank, in)``.

        What is left of the weight is ``W M`` with ``M = C Aᵀ (A C Aᵀ)⁻¹`` by channel; G is the output's and
        stays.
        """
        C = by_channel(self.C, kernel) / kernel
        root = linalg.factor_spd(inner @ C @ inner.T)
        back = root.solve_transposed(root.solve(inner @ C)).T
        eye = torch.eye(kernel, dtype=C.dtype, device=C.device)
        patches, weights = torch.kron(inner, eye), torch.kron(back, eye)
        pulled = None if self.pulled is None else weights.T @ self.pulled @ weights
        return Metric(patches @ self.C @ patches.T, self.G, pulled)


def by_channel(moment: Tensor, kernel: int) -> Tensor:
    """Return the sum over the kernel's offsets of a moment's blocks, ``(in, in)``."""
    channels = len(moment) // kernel
    blocks = moment.reshape(channels, kernel, channels, kernel)
    return blocks.diagonal(dim1=1, dim2=3).sum(-1)


def has_inner(layer: ConvLayer) -> bool:
    """Whether a 1×1 convolution in front can pay: not for a kernel of one, nor for few inputs."""
    return layer.weight[0, 0].numel() > 1 and layer.out_features <= layer.in_features


def size_of(layer: ConvLayer, rank_out: int | None, rank_in: int | None) -> int:
    """Return how many parameters the convolutions in a row have."""
    inputs, outputs, kernel = layer.module.in_channels, layer.out_features, layer.weight[0, 0].numel()
    size = (rank_out or outputs) * (rank_in or inputs) * kernel
    size += 0 if rank_out is None else rank_out * outputs
    size += 0 if rank_in is None else rank_in * inputs
    return size + (0 if layer.bias is None else outputs)
