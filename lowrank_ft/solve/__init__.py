"""Mathematics that several methods share: linear algebra in float64, and dividing a budget among layers."""

from lowrank_ft.solve.columns import (
    elimination_order,
    leverage_scores,
    nystrom_errors,
    nystrom_refit,
    pivoted_order,
)
from lowrank_ft.solve.directions import output_directions, output_spectrum
from lowrank_ft.solve.factors import (
    Cut,
    Decomposition,
    Factors,
    decompose,
    gram_under,
    orthonormal,
    thin_qr,
    truncated_svd,
    weighted_error,
)
from lowrank_ft.solve.metric import Metric
from lowrank_ft.solve.symmetric import (
    GRADIENT_RIDGE,
    RIDGES,
    Root,
    eigenpairs,
    factor_spd,
    krylov,
    with_ridge,
)
from lowrank_ft.solve.tensors import hosvd, leading, tucker

__all__ = [
    "GRADIENT_RIDGE",
    "RIDGES",
    "Cut",
    "Decomposition",
    "Factors",
    "Metric",
    "Root",
    "decompose",
    "eigenpairs",
    "elimination_order",
    "factor_spd",
    "gram_under",
    "hosvd",
    "krylov",
    "leading",
    "leverage_scores",
    "nystrom_errors",
    "nystrom_refit",
    "orthonormal",
    "output_directions",
    "output_spectrum",
    "pivoted_order",
    "thin_qr",
    "truncated_svd",
    "tucker",
    "weighted_error",
    "with_ridge",
]
