"""LQ-LoRA: split a weight into a quantised matrix and a low-rank one, which is then trained.

Guo, Greengard, Xing and Kim 2024, arXiv 2311.12023: ``min ‖D_row (W − Q − L₁ L₂) D_col‖_F`` by
alternation (algorithm 1): ``L₁ L₂`` becomes the best low-rank matrix for ``W − Q`` under the metric, then Q
becomes the rounded ``W − L₁ L₂``. ``mode="paper"`` does this, starting from ``Q = 0`` and stopping when the
error grows. It returns the best iterate; the reference code returns the last one, which is worse.

Our default differs in three ways. Errors are weighed by their effect on the loss. Rounding compensates its
own errors (``rounding="feedback"``). And an iteration ends with the low-rank matrix, so that it corrects the
errors of the final Q.
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
    """"feedback": compensate errors in the columns still to be rounded (GPTQ); or "nearest" (the paper)."""
    objective: Weighing = "loss"
    """How errors are weighed: "loss", "activation", "fisher" (the paper), "weight" (the paper, no data)."""
    mode: Literal["refit", "paper"] = "refit"
    """"refit": every iteration ends with the low-rank correction; "paper": it ends with rounding."""
    iterations: int = 3
    """Largest number of iterations; the best of them is kept."""
    tolerance: float = 1e-3
    """Stop when an iteration lowers the squared error by less than this share."""
    factors: FactorType = "auto"
    """Dtype of the low-rank part, which counts in the budget: "auto" is float32 (float64 for layers in
    float64), for training; "bfloat16" halves its size. Recipes train it in float32 in either case; for your
    own loop, see cast_adapters."""
    ranks: tuple[int, ...] = ()
    """Ranks to choose from under a budget, instead of one rank."""

    def __post_init__(self) -> None:
        QuantizeOptions.__post_init__(self)
        LoRAOptions.__post_init__(self)
        if self.iterations < 1:
            raise ConfigError(f"iterations must be at least 1, but is {self.iterations}.")
        if self.dora:
            raise ConfigError(
                "DoRA starts from the weight, but part of the weight is in this LoRA itself: leave dora out."
            )
        if self.ranks and (self.budget is None or self.rank_pattern):
            raise ConfigError("ranks are chosen under a budget: set budget, and leave rank_pattern out.")
        if any(rank < 1 for rank in self.ranks):
            raise ConfigError(f"ranks must be at least 1, but one of them is {min(self.ranks)}.")


@dataclass(frozen=True)
class Split:
    """``W ≈ Q + B A``.

    Attributes:
        packed: the stored tensors of the quantised part.
        factors: the low-rank part.
        errors: squared weighted error after each iteration.
    """

    packed: Tensors
    factors: solve.Factors
    errors: list[float]


@register_method
class LQLoRAMethod(QuantizerMethod):
    """Alternate quantisation and low-rank correction."""

    name = "lq_lora"
    trains = True
    Config = LQLoRA
    config: LQLoRA

    def check(self, site: Site) -> None:
        """Refuse layers that cannot be quantised, and factored layers, which NF and LoRA can handle."""
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
        """Return the ranks to choose from: ``ranks``, each at most the layer's largest, or the one rank."""
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
        """Split the weight into both parts, and report the error after each iteration."""
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
        base.copy_unquantized(stock)
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
    """Return the best split of a matrix among all iterations.

    Args:
        W: ``(out, in)``, float32.
        scheme: how Q is stored.
        metric: weighs the errors.
        rank: the rank of the low-rank part.
        feedback: compensates rounding errors; None rounds to nearest.
        iterations: largest number of iterations.
        tolerance: stop when an iteration lowers the error by less than this share.
        paper: end an iteration with rounding instead of the low-rank part.
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
