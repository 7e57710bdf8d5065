"""LQ-LoRA: a weight as a quantised matrix and a low-rank one, chosen together; the low-rank one trains.

Guo, Greengard, Xing and Kim 2024, arXiv 2311.12023: ``min ‖D_row (W − Q − L₁ L₂) D_col‖_F`` by turns
(algorithm 1): ``L₁ L₂`` the best low-rank matrix for ``W − Q`` under the metric, then Q what ``W − L₁ L₂``
rounds to. ``mode="paper"`` is that, from ``Q = 0``, stopping when the error grows; the best iterate is
returned, where the reference code returns the last, worse one.

Our default differs in three ways. Errors count by what they do to the loss. Rounding makes up for its own
errors (``rounding="feedback"``). And a turn ends with the low-rank matrix, so that it corrects the rounding
that is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lowrank_ft import solve
from lowrank_ft.algorithms.base import Counts, FactorType, Options, Share, Statistics
from lowrank_ft.algorithms.lora import LoRADelta, LoRANode, LoRAOptions, Scaling  # noqa: F401
from lowrank_ft.algorithms.nf import (  # noqa: F401
    BudgetUnit,
    QuantizeOptions,
    QuantizerMethod,
    Rounding,
    Weighing,
    facts,
    metric_of,
)
from lowrank_ft.anatomy.sites import Site
from lowrank_ft.calibration.batches import Calibration  # noqa: F401 (see LQLoRA)
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.adapted import Adapted
from lowrank_ft.modules.layer import layer_of
from lowrank_ft.modules.lowrank import LowRank
from lowrank_ft.modules.quantized import Quantized
from lowrank_ft.quant import Scheme, storage_of
from lowrank_ft.quant.program import GridName  # noqa: F401
from lowrank_ft.quant.rounding import Feedback
from lowrank_ft.quant.scheme import CodebookName, Library, ScaleType  # noqa: F401
from lowrank_ft.quant.storage import Tensors
from lowrank_ft.solve.allocation import Handle
from lowrank_ft.solve.metric import Metric
from lowrank_ft.structure.registry import register_method


# jsonargparse looks up the types of all inherited fields in this module, which is why they are imported.
@dataclass(frozen=True)
class LQLoRA(QuantizeOptions, LoRAOptions):
    """LQ-LoRA: quantised weights, and a LoRA that starts as their correction."""

    codebook: CodebookName = "signed"
    """Levels: "signed" (scaled by the signed largest entry), "nf" (the paper), or "fitted" (to a matrix)."""
    rounding: Rounding = "feedback"
    """"feedback": make up for errors in columns still to be rounded (GPTQ); or "nearest" (the paper)."""
    objective: Weighing = "loss"
    """What errors count by: "loss", "activation", "fisher" (the paper), or "weight" (the paper, no data)."""
    mode: Literal["refit", "paper"] = "refit"
    """"refit": every turn ends with the low-rank correction of what was rounded; "paper": with rounding."""
    iterations: int = 3
    """Turns at most; the best is kept."""
    tolerance: float = 1e-3
    """Stop when a turn lowers the squared error by less than this share."""
    factors: FactorType = "auto"
    """Type of the low-rank part, as the budget counts it: "auto" is float32 (or the layer's), for training;
    "bfloat16" halves it. Recipes train it in float32 all the same; in your own loop, see
    cast_adapters."""
    ranks: tuple[int, ...] = ()
    """Ranks that the budget may choose from, in place of one rank."""

    def __post_init__(self) -> None:
        QuantizeOptions.__post_init__(self)
        LoRAOptions.__post_init__(self)
        if self.iterations < 1:
            raise ConfigError(f"iterations must be at least 1, but is {self.iterations}.")
        if self.dora:
            raise ConfigError("DoRA starts from the weight, of which a part would lie in it: leave dora out.")
        if self.ranks and (self.budget is None or self.rank_pattern):
            raise ConfigError("ranks are chosen under a budget: set budget, and leave rank_pattern out.")
        if any(rank < 1 for rank in self.ranks):
            raise ConfigError(f"Ranks are at least 1, but among them are {sorted(self.ranks)[:1]}.")


@dataclass(frozen=True)
class Split:
    """``W ≈ Q + B A``.

    Attributes:
        packed: the quantised part, as it is stored.
        factors: the low-rank part.
        errors: squared weighted error after each turn.
    """

    packed: Tensors
    factors: solve.Factors
    errors: list[float]


@register_method
class LQLoRAMethod(QuantizerMethod):
    """Quantise and correct, by turns."""

    name = "lq_lora"
    trains = True
    Config = LQLoRA
    config: LQLoRA

    def check(self, site: Site) -> None:
        """Refuse what cannot be quantised, and factors, which NF and LoRA take."""
        super().check(site)
        if isinstance(site.modules[0], LowRank):
            raise TargetError(
                f"{site.names[0]} was factored, and 'lq_lora' splits whole matrices: stack NF and LoRA on "
                f"it, or exclude it."
            )
        self.config.check_dropout(site)
        if self.config.budget is None or not self.config.ranks:
            self._rank(site)

    def ranks(self, site: Site) -> tuple[int, ...]:
        """Return the ranks to choose from: the one of the config, or those that fit the layer."""
        if self.config.ranks:
            most = layer_of(site.modules[0]).max_rank
            return tuple(sorted({min(rank, most) for rank in self.config.ranks}))
        return (self._rank(site),)

    def factor_bits(self, site: Site) -> int:
        """Return the bits of each number in a site's factors."""
        if self.config.factors in ("bfloat16", "float16"):
            return 16
        return 64 if layer_of(site.modules[0]).weight.dtype == torch.float64 else 32

    def choose(self, sites: Sequence[Site], options: Options, counts: Counts) -> list[Share]:
        """Spend the budget, or give every matrix the same scheme."""
        self.config.check_patterns(sites)
        return super().choose(sites, options, counts)

    def deltas(self, site: Site, share: Share) -> Mapping[str, LoRANode]:
        """Return the LoRA that holds the low-rank part."""
        node = self.config.node(site, cast(int, share.rank), anchored=False)
        return {site.names[0]: replace(node, dtype=self.config.factors, carries=True)}

    def values(
        self, site: Site, new: Mapping[str, Any], statistics: Statistics, handle: Handle | None = None
    ) -> Mapping[str, Any]:
        """Split the weight into both parts, and report how the error fell."""
        (name,), (stock,) = site.names, site.modules
        host, moments = cast(Adapted, new[name]), statistics.get(name)
        base, delta = cast(Quantized, host.base), cast(LoRADelta, next(iter(host.deltas.values())))
        layer = layer_of(stock)
        metric = metric_of(moments, self.config.objective, layer.weight.device)
        parts = split(
            layer.matrix().detach().float(),
            base.scheme,
            metric,
            delta.node.rank,
            feedback=self.feedback(moments, layer.weight.device),
            iterations=self.config.iterations,
            tolerance=self.config.tolerance,
            paper=self.config.mode == "paper",
        )
        base.take(stock)
        base.store(parts.packed)
        root = delta.node.scale**0.5
        with torch.no_grad():
            delta.A.copy_(parts.factors.A / root)
            delta.B.copy_(parts.factors.B / root)
        read = base.matrix(torch.float32) + delta.weight().detach()
        return {**facts(site, read, [base], moments), "errors": [float(f"{e:.6g}") for e in parts.errors]}


def split(
    W: Tensor,
    scheme: Scheme,
    metric: Metric,
    rank: int,
    *,
    feedback: Feedback | None = None,
    iterations: int = 5,
    tolerance: float = 1e-3,
    paper: bool = False,
) -> Split:
    """Return the best split of a matrix over all turns.

    Args:
        W: ``(out, in)``, float32.
        scheme: how Q is stored.
        metric: what errors count by.
        rank: of the low-rank part.
        feedback: makes up for rounding errors.
        iterations: turns at most.
        tolerance: stop when a turn lowers the error by less than this share.
        paper: end a turn with rounding, and not with the low-rank part.
    """
    storage, errors = storage_of(scheme), list[float]()
    factors, _ = metric.leading(W, rank)
    best: tuple[float, Tensors, solve.Factors] | None = None
    for _ in range(iterations):
        packed = storage.pack(W - factors.B @ factors.A, feedback)
        Q = storage.unpack(packed, W.shape[1], 0, W.shape[0], torch.float32)
        corrected, _ = metric.leading(W - Q, rank, factors.B)
        kept = factors if paper else corrected
        errors.append(metric.error(W - Q - kept.B @ kept.A))
        if best is None or errors[-1] < best[0]:
            best = errors[-1], packed, kept
        if len(errors) > 1 and errors[-1] >= errors[-2] * (1 - tolerance):
            break
        factors = corrected
    assert best is not None
    best_factors = solve.Factors(best[2].B.double(), best[2].A.double())
    return Split(best[1], best_factors.balanced(), errors)
