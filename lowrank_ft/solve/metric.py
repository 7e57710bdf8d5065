"""A two-sided metric that weighs the errors of a matrix, and the best low-rank correction under it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lowrank_ft.solve.factors import Factors
from lowrank_ft.solve.symmetric import GRADIENT_RIDGE, Root, factor_spd

_OVERSAMPLING = 8
_STEPS = 12
_SETTLED = 1e-3  # stop when a step raises the captured energy by a smaller share than this


@dataclass(frozen=True)
class Metric:
    """``unit · ‖L^½ E R^½‖²_F`` of an error ``E (out, in)``; float32 products, float64 sums.

    Attributes:
        left: L, ``(out, out)``, or its diagonal ``(out,)``; None for the identity.
        right: R, ``(in, in)``, or its diagonal ``(in,)``; None for the identity.
        unit: factor on the squared weighted error.
        WtGW: ``Wᵀ G W``, ``(in, in)``, of the original weight W, where it is known and the left side G is
            not; only :func:`~lowrank_ft.solve.factors.decompose` reads it.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    unit: float = 1.0
    WtGW: Tensor | None = None

    def error(self, E: Tensor) -> float:
        """Return the squared weighted error."""
        right = _times(E, self._right)
        left = (
            E if self.left is None else E * self._left[:, None] if self._left.dim() == 1 else self._left @ E
        )
        return self.unit * max(float((left * right).sum(dtype=torch.float64)), 0.0)

    def densities(self, shape: torch.Size) -> Tensor:
        """Return the weight of each entry's squared error (cross terms left out), ``(out, in)``, float32."""
        rows, columns = (_diagonal(side) for side in (self.left, self.right))
        total = torch.full(shape, self.unit, device=_device(self.left, self.right))
        if rows is not None:
            total = total * rows.float()[:, None].to(total)
        return total if columns is None else total * columns.float().to(total)

    def leading(self, E: Tensor, rank: int, start: Tensor | None = None) -> tuple[Factors, Tensor]:
        """Return the best factors of a rank for ``E`` under this metric, and their energies.

        Subspace iteration on ``L^½ E R Eᵀ L^½`` (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm
        4.4). It stops when a step adds no more than 0.1% to the captured energy; if twelve steps are not
        enough, all eigenvectors are computed.

        Args:
            E: ``(out, in)``.
            rank: from 1 to min(out, in).
            start: ``(out, any)``, directions to start from: an earlier ``B``.

        Returns:
            factors, ``B (out, rank)`` and ``A (rank, in)``, float32; and by how much each direction lowers
            :meth:`error`, ``(rank,)``, descending.
        """
        out_features = E.shape[0]
        width = min(rank + _OVERSAMPLING, *E.shape)
        generator = torch.Generator().manual_seed(0)
        X = torch.randn(out_features, width, generator=generator).to(E)
        if start is not None:
            columns = self._half(start)[:, :width]
            X[:, : columns.shape[1]] = columns
        last = 0.0
        for step in range(_STEPS):
            Q = torch.linalg.qr(X)[0]
            X = self._half(E @ _times(self._back(Q).T @ E, self._right).T)
            projected = (Q.T @ X).double()
            values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
            captured = float(values[-rank:].sum())
            settled = captured - last <= _SETTLED * captured
            if settled and step:
                break
            last = captured
        else:
            Q, values, vectors = self._whole(E)
        Q = Q @ vectors[:, -rank:].flip(1).to(Q)
        A = self._back(Q).T @ E
        return Factors(self._undo(Q), A), self.unit * values[-rank:].flip(0).clamp_min(0)

    def _whole(self, E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The whole space as a basis, with all eigenvalues and eigenvectors in it."""
        half = self._half(E.double())
        gram = half @ _times(half, self.right).T
        values, vectors = torch.linalg.eigh(gram)
        return torch.eye(len(gram), device=E.device), values, vectors

    def _half(self, X: Tensor) -> Tensor:
        """``Lᵀ X``, L the root of the left side, in the dtype of X."""
        if self.left is None:
            return X
        if self.left.dim() == 1:
            return X * self.left.to(X.dtype).sqrt()[:, None]
        return (self._root.lower if X.dtype == torch.float64 else self._lower).T @ X

    def _back(self, X: Tensor) -> Tensor:
        """``L X``."""
        if self.left is None:
            return X
        return X * self._left.sqrt()[:, None] if self._left.dim() == 1 else self._lower @ X

    def _undo(self, X: Tensor) -> Tensor:
        """``L⁻ᵀ X``."""
        if self.left is None:
            return X
        if self._left.dim() == 1:
            return X / self._left.sqrt().clamp_min(1e-6 * self._left.max().sqrt())[:, None]
        solved: Tensor = torch.linalg.solve_triangular(self._lower.T, X, upper=True)
        return solved

    @cached_property
    def _left(self) -> Tensor:
        assert self.left is not None
        return self.left.float()

    @cached_property
    def _right(self) -> Tensor | None:
        return None if self.right is None else self.right.float()

    @cached_property
    def _root(self) -> Root:
        assert self.left is not None
        return factor_spd(self.left, GRADIENT_RIDGE)

    @cached_property
    def _lower(self) -> Tensor:
        return self._root.lower.float()


def _times(rows: Tensor, right: Tensor | None) -> Tensor:
    return rows if right is None else rows * right if right.dim() == 1 else rows @ right


def _diagonal(side: Tensor | None) -> Tensor | None:
    return None if side is None else side if side.dim() == 1 else side.diagonal()


def _device(*sides: Tensor | None) -> torch.device:
    return next((side.device for side in sides if side is not None), torch.device("cpu"))
