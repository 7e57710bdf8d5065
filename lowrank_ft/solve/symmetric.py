"""Symmetric matrices: triangular roots, and the largest eigenvalues with their vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lowrank_ft.errors import ConfigError, NonFiniteError

GRADIENT_RIDGE = 1e-4  # for G: estimated from a few thousand tokens, it is rank-deficient or nearly so
RIDGES = (0.0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6)


@dataclass(frozen=True)
class Triangular:
    """A triangular matrix T, used only to solve linear systems.

    Attributes:
        matrix: ``(n, n)``.
        upper: whether it is upper triangular.
    """

    matrix: Tensor
    upper: bool

    def solve(self, block: Tensor) -> Tensor:
        """Return ``T⁻¹ M``."""
        return cast(Tensor, torch.linalg.solve_triangular(self.matrix, block, upper=self.upper))

    @property
    def transposed(self) -> Triangular:
        """The transpose, on the same memory."""
        return Triangular(self.matrix.T, not self.upper)

    @property
    def spread(self) -> float:
        """The smallest pivot divided by the largest."""
        pivots = self.matrix.diagonal().abs()
        return float(pivots.min() / pivots.max())


@dataclass(frozen=True)
class Root:
    """A triangular square root of a positive semidefinite matrix: ``C + ridge · mean(diag C) · I = L Lᵀ``.

    Attributes:
        lower: ``L``, ``(n, n)``, lower triangular.
        ridge: the ridge that was added, relative to the mean of the diagonal; with ``method`` ``"eigh"``, the
            floor of the eigenvalues.
        method: ``"cholesky"`` or ``"eigh"``.
        condition: squared ratio of the largest to the smallest pivot: a lower bound of the condition number.
    """

    lower: Tensor
    ridge: float
    method: str
    condition: float

    def solve(self, matrix: Tensor) -> Tensor:
        """Return ``L⁻¹ M``."""
        return Triangular(self.lower, upper=False).solve(matrix)

    def solve_transposed(self, matrix: Tensor) -> Tensor:
        """Return ``L⁻ᵀ M``."""
        return Triangular(self.lower.T, upper=True).solve(matrix)


def factor_spd(matrix: Tensor, ridge: float = 0.0) -> Root:
    """Return a triangular root of a symmetric positive semidefinite matrix, and the ridge that it needed.

    Cholesky with a ridge that starts at ``ridge`` and grows tenfold until it succeeds; if 1e-6 is not
    enough, an eigendecomposition with floored eigenvalues. No inverse or pseudo-inverse is formed.

    Args:
        matrix: ``(n, n)``, float64.
        ridge: the smallest ridge to use, relative to the mean of the diagonal.

    Raises:
        NonFiniteError: NaN or infinite entries.
        ConfigError: the diagonal's mean is not positive: no data reached the layer.
    """
    if not torch.isfinite(matrix).all():
        raise NonFiniteError("A second moment has NaN or infinite entries.")
    mean = float(matrix.diagonal().mean())
    if mean <= 0:
        raise ConfigError("A second moment is zero: no data reached the layer.")
    for step in (ridge, *(r for r in RIDGES if r > ridge)):
        lower, failed = torch.linalg.cholesky_ex(with_ridge(matrix, step * mean))
        if not failed:
            return Root(lower, step, "cholesky", _condition(lower))
    values, vectors = torch.linalg.eigh(matrix)
    floor = max(ridge, RIDGES[-1]) * mean
    _, upper = torch.linalg.qr((vectors * values.clamp_min(floor).sqrt()).T)
    lower = upper.T * torch.sign(upper.diagonal())
    return Root(lower, floor / mean, "eigh", _condition(lower))


def with_ridge(matrix: Tensor, amount: float) -> Tensor:
    """Return ``M + amount · I``, in new memory."""
    shifted = matrix.clone()
    shifted.diagonal().add_(amount)
    return shifted


def _condition(lower: Tensor) -> float:
    pivots = lower.diagonal().abs()
    return float((pivots.max() / pivots.min()) ** 2)


def eigenpairs(matrix: Tensor, count: int, *, randomized: bool = False) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues of a symmetric matrix, descending, and their eigenvectors.

    Args:
        matrix: ``(n, n)``, positive semidefinite, float64.
        count: how many, from 1 to n.
        randomized: try block Krylov first where ``count`` is small beside n (:func:`krylov`).

    Returns:
        values ``(count,)`` and vectors ``(n, count)``.
    """
    if randomized:
        pairs = krylov(lambda rows: rows @ matrix, len(matrix), count, matrix.device)
        if pairs is not None:
            return pairs
    values, vectors = torch.linalg.eigh(matrix)
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


def krylov(
    apply: Callable[[Tensor], Tensor], n: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Return leading eigenpairs of a symmetric positive semidefinite operator, by a block Krylov space.

    Musco and Musco 2015, arXiv 1504.05477, algorithm 2. Every new block is orthogonalised against the earlier
    ones, and the products with the operator are kept, so that residuals are known at every step. A block has
    ``count`` vectors or more, so that a multiple eigenvalue is found completely. Blocks are stored as rows:
    the product of a few rows with a wide matrix runs at full speed.

    Args:
        apply: multiplies rows ``(b, n)`` from the right by the operator, in float64.
        n: size of the operator.
        count: how many pairs.
        device: where blocks live.

    Returns:
        values ``(count,)``, descending, and vectors ``(n, count)``. Outside of the span of the vectors every
        residual ``M v − λ v`` has a norm of at most ``1e-6 λ``; inside the span it is rounding error of the
        largest λ, which rotates the vectors by no more than rounding does. None if eighteen blocks, or
        blocks for half of the space, are not enough, or if the problem is too small for the method to pay.
    """
    if not krylov_pays(n, count):
        return None
    width = _width(count)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(width, n, generator=generator, dtype=torch.float64).to(device)
    blocks = min(18, n // (2 * width))
    basis, images = (block.new_empty(blocks * width, n) for _ in range(2))
    projected = block.new_empty(blocks * width, blocks * width)
    for step in range(blocks):
        old, new = step * width, (step + 1) * width
        for _ in range(2):  # the second pass removes the rounding errors of the first
            block = torch.linalg.qr((block - block @ basis[:old].T @ basis[:old]).T)[0].T
        image = apply(block)
        basis[old:new], images[old:new] = block, image
        projected[old:new, :new] = image @ basis[:new].T
        projected[:old, old:new] = projected[old:new, :old].T
        block = image
        if step < 5 or step % 2 == 0:  # seldom enough steps, and a check costs about as much as a step
            continue
        small, rotation = torch.linalg.eigh(projected[:new, :new])
        values, rotation = small[-count:].flip(0), rotation[:, -count:].flip(1).T
        vectors = rotation @ basis[:new]
        residual = rotation @ images[:new] - vectors * values[:, None]
        residual -= residual @ vectors.T @ vectors
        done = residual.norm(dim=1) <= 1e-6 * values
        if done.all():
            return values, vectors.T
        outliers = int((values > _OUTLYING * values[-1]).sum())
        if outliers and done[:outliers].all():
            first, deflated = vectors[:outliers], _without(vectors[:outliers], apply)
            others = krylov(deflated, n, count - outliers, device)
            if others is None:
                return None
            # They are orthogonal already up to rounding.
            joined, _ = torch.linalg.qr(torch.cat([first.T, others[1]], 1))
            return torch.cat([values[:outliers], others[0]]), joined
    return None


def _width(count: int) -> int:
    """Vectors per block; fewer than eight would take more steps without saving work."""
    return max(count, 8)


def krylov_pays(n: int, count: int) -> bool:
    """Whether a problem is large enough for a Krylov space to be less work than a full decomposition."""
    return 16 * _width(count) <= n


# Eigenvalues that are larger by this factor are deflated: rounding errors of their products would hide the
# residuals of the other pairs.
_OUTLYING = 1e5


def _without(vectors: Tensor, apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The operator with some of its eigenvectors (given as rows) projected out."""

    def projected(rows: Tensor) -> Tensor:
        return rows - rows @ vectors.T @ vectors

    return lambda rows: projected(apply(projected(rows)))
