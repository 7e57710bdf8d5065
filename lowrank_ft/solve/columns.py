"""Columns of a matrix: which to keep, and the error of removing the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_ft.solve.symmetric import Root, factor_spd, with_ridge


def leverage_scores(C: Tensor, ridge: float = 1.0) -> Tensor:
    """Return the ridge leverage scores ``diag(C (C + λI)⁻¹)`` of a second moment.

    Args:
        C: ``(n, n)``, float64, positive semidefinite.
        ridge: λ, relative to the mean of the diagonal.

    Returns:
        ``(n,)``, in [0, 1).
    """
    amount = ridge * float(C.diagonal().mean())
    half = factor_spd(with_ridge(C, amount)).solve(torch.eye(len(C), dtype=C.dtype, device=C.device))
    return (1 - amount * half.square().sum(0)).clamp(0, 1)


def pivoted_order(C: Tensor) -> Tensor:
    """Return the columns in the order of pivoted Cholesky.

    Each column has the largest residual, given the columns before it (Harbrecht, Peters and Schneider 2012).

    Args:
        C: ``(n, n)``, float64, positive semidefinite.

    Returns:
        a permutation of the columns, ``(n,)``.
    """
    n = len(C)
    residual, lower = C.diagonal().clone(), C.new_zeros(n, n)
    order = torch.empty(n, dtype=torch.long, device=C.device)
    for step in range(n):
        pivot = int(residual.argmax())
        order[step] = pivot
        if residual[pivot] > 0:
            column = C[:, pivot] - lower[:, :step] @ lower[pivot, :step]
            lower[:, step] = column / residual[pivot].sqrt()
            residual -= lower[:, step].square()
        residual[pivot] = -math.inf
    return order


def elimination_order(C: Tensor, K: Tensor, step: int = 16) -> Tensor:
    """Order columns by backward elimination: the columns that cost most to remove come first.

    When the remaining columns J are refitted by least squares, removing column j of them raises
    ``tr(K (C − C[:,J] C[J,J]⁻¹ C[J,:]))`` by ``Q_jj / P_jj``, where ``P = C[J,J]⁻¹`` and ``Q = Tᵀ G T`` for
    the refitted weight ``T`` (the optimal-brain-surgeon formula; Hassibi and Stork 1993). In each step the
    ``step`` cheapest columns are removed, and P and Q are updated.

    Args:
        C: second moment of the columns, ``(n, n)``, float64.
        K: ``Wᵀ G W`` of the weight W whose inputs the columns are, ``(n, n)``.
        step: how many columns are removed at a time.

    Returns:
        a permutation of the columns, ``(n,)``.
    """
    root = factor_spd(C)
    P, Q = torch.cholesky_inverse(root.lower), K.clone()
    remaining = torch.arange(len(C), device=C.device)
    removed: list[Tensor] = []
    while len(remaining) > step:
        cost = Q.diagonal() / P.diagonal()
        order = cost.argsort()
        out, keep = order[:step], order[step:].sort().values
        removed.append(remaining[out])
        small = torch.linalg.cholesky(P[out][:, out])
        M = torch.cholesky_solve(P[out][:, keep], small)
        Q_out = Q[out][:, keep]
        # T_keep ← T_keep − T_out M. Half of the term in M² of Q = TᵀGT goes into each of the two products.
        across = Q_out - 0.5 * Q[out][:, out] @ M
        Q = Q[keep][:, keep].addmm_(M.T, across, alpha=-1).addmm_(across.T, M, alpha=-1)
        P = P[keep][:, keep].addmm_(P[out][:, keep].T, M, alpha=-1)
        remaining = remaining[keep]
    removed.append(remaining[(Q.diagonal() / P.diagonal()).argsort()])
    return torch.cat(removed).flip(0)


def nystrom_errors(C: Tensor, K: Tensor, order: Tensor) -> Tensor:
    """Return ``tr(K (C − C[:,J] C[J,J]⁻¹ C[J,:]))`` for J the first k columns of an order, for every k.

    One Cholesky factorisation ``L Lᵀ`` of the reordered moment serves all k: the residual of C after the
    first k columns is ``Σ_{j≥k} l_j l_jᵀ``.

    Args:
        C: second moment of the columns, ``(n, n)``, float64.
        K: ``Wᵀ G W`` of the weight W whose inputs the columns are, ``(n, n)``.
        order: a permutation, ``(n,)``.

    Returns:
        ``(n + 1,)``: the error with 0, 1, …, n columns kept; the last is 0.
    """
    lower = factor_spd(C[order][:, order]).lower
    each = ((K[order][:, order] @ lower) * lower).sum(0)
    tails = each.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)]).clamp_min(0)


def nystrom_refit(weight: Tensor, C: Tensor, kept: Tensor) -> tuple[Tensor, Root]:
    """Return ``W C[:,J] C[J,J]⁻¹``, the least-squares refit of W to the input columns J, and a root.

    Args:
        weight: ``(out, n)``.
        C: second moment of its input, ``(n, n)``, float64.
        kept: J, ``(k,)``.

    Returns:
        the refitted weight ``(out, k)``, and the root of ``C[J,J]``.
    """
    root = factor_spd(C[kept][:, kept])
    right = weight.double() @ C[:, kept]
    return root.solve_transposed(root.solve(right.T)).T, root
