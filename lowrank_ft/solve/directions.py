"""Directions of a layer's output: the leading or the last left singular vectors of ``W C`` or ``W C^½``."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from lowrank_ft.errors import NonFiniteError
from lowrank_ft.solve.factors import sign_of_largest
from lowrank_ft.solve.symmetric import Triangular, eigenpairs, factor_spd, krylov, krylov_pays


def output_directions(
    weight: Tensor, C: Tensor, rank: int, *, squared: bool, last: bool
) -> tuple[Tensor, Tensor]:
    """Return left singular vectors of ``W C`` or ``W C^½``: the leading ones, or the last.

    The leading ones come from products with thin blocks. The last ones come from the inverse of a triangular
    factor: in the Gram matrix of ``W C`` they would be lost in the rounding error of the leading ones.

    Args:
        weight: ``(out, in)``, any float dtype.
        C: second moment of the input, ``(in, in)``, or its diagonal ``(in,)``; float64.
        rank: how many vectors, from 1 to ``min(out, in)``.
        squared: use ``W C``, where C may be singular, instead of ``W C^½``.
        last: return the last of the ``min(out, in)`` vectors instead of the first.

    Returns:
        ``U (out, rank)`` with orthonormal columns, sign-fixed, and their singular values ``(rank,)``, in
        descending order.

    Raises:
        NonFiniteError: a weight or a moment with NaN or infinite entries.
    """
    W = weight.double()
    # A semidefinite matrix with a finite diagonal is finite, and a sum with a NaN or infinite term is not.
    scale = C if C.dim() == 1 else C.diagonal()
    if not (torch.isfinite(W.sum()) and torch.isfinite(scale).all()):
        raise NonFiniteError("A weight or a moment has NaN or infinite entries.")
    U, values = (_last_directions if last else _leading_directions)(W, C, rank, squared)
    return U * sign_of_largest(U), values


def output_spectrum(weight: Tensor, C: Tensor, *, squared: bool) -> Tensor:
    """Return the singular values of ``W C`` or ``W C^½``, descending, ``(min(out, in),)``."""
    return cast(Tensor, torch.linalg.svdvals(_times_root(weight.double(), C, squared)))


# Squared singular values below this share of the largest are lost to rounding in a Gram matrix.
_RESOLVED = 1e-8


def _leading_directions(W: Tensor, C: Tensor, rank: int, squared: bool) -> tuple[Tensor, Tensor]:
    def apply(rows: Tensor) -> Tensor:
        inner = _times(rows @ W, C)
        return (_times(inner, C) if squared else inner) @ W.T

    pairs = krylov(apply, len(W), rank, W.device)
    if pairs is not None:
        return pairs[1], pairs[0].sqrt()
    X = _times_root(W, C, squared)
    wide = X.shape[0] <= X.shape[1]
    energies, vectors = eigenpairs(X @ X.T if wide else X.T @ X, rank)
    if not energies[-1] > _RESOLVED * energies[0]:
        left, values, _ = torch.linalg.svd(X, full_matrices=False)
        return left[:, :rank], values[:rank]
    values = energies.sqrt()
    return (vectors if wide else X @ vectors / values), values


def _last_directions(W: Tensor, C: Tensor, rank: int, squared: bool) -> tuple[Tensor, Tensor]:
    if not krylov_pays(min(W.shape), rank):
        return _last_of_all(W, C, rank, squared)
    wide = W.shape[0] < W.shape[1]
    if wide:  # W C = T Qᵀ
        factors = [Triangular(_upper(_times_root(W, C, squared).T).T, upper=False)]
    else:  # W = Q R, so W C = Q R L Lᵀ: neither the product nor its factorisation is needed
        factors = [Triangular(_upper(W), upper=True), *_triangular_root(C, squared)]

    def inverse(rows: Tensor) -> Tensor:
        """Multiply by ``(T Tᵀ)⁻¹``, T the product of the factors; its leading directions are T's last."""
        block = rows.T
        for factor in factors:
            block = factor.solve(block)
        for factor in reversed(factors):
            block = factor.transposed.solve(block)
        return block.T

    pairs = None
    if math.prod(factor.spread for factor in factors) > 1e-10:  # so that at least six digits are correct
        pairs = krylov(inverse, min(W.shape), rank, W.device)
    if pairs is None:
        return _last_of_all(W, C, rank, squared)
    values, vectors = pairs
    return (vectors if wide else W @ factors[0].solve(vectors)).flip(1), values.flip(0).rsqrt()


def _last_of_all(W: Tensor, C: Tensor, rank: int, squared: bool) -> tuple[Tensor, Tensor]:
    """The last directions, from a full singular value decomposition."""
    X = _times_root(W, C, squared)
    wide = X.shape[0] < X.shape[1]
    left, values, _ = torch.linalg.svd(_upper(X.T).T if wide else X, full_matrices=False)
    return left[:, -rank:], values[-rank:]


def _upper(matrix: Tensor) -> Tensor:
    """The triangular factor of a QR factorisation."""
    return cast(Tensor, torch.linalg.qr(matrix, mode="r")[1])


def _triangular_root(C: Tensor, squared: bool) -> list[Triangular]:
    """Triangular factors whose product is C, or one factor that is a root of C."""
    if C.dim() == 1:
        return [Triangular(torch.diag(C if squared else C.sqrt()), upper=True)]
    lower, failed = torch.linalg.cholesky_ex(C)
    if failed:
        lower = torch.zeros_like(C)  # the spread is then NaN, and the caller decomposes in full
    root = Triangular(lower, upper=False)
    return [root, root.transposed] if squared else [root]


def _times(rows: Tensor, C: Tensor) -> Tensor:
    """``M C``, where C may be given as its diagonal."""
    return rows @ C if C.dim() == 2 else rows * C


def _times_root(W: Tensor, C: Tensor, squared: bool) -> Tensor:
    """``W C``, or ``W L`` for a root ``C = L Lᵀ``, whose left singular vectors are those of ``W C^½``."""
    if squared:
        return _times(W, C)
    return W * C.sqrt() if C.dim() == 1 else W @ factor_spd(C).lower
