"""Columns of a matrix: which to keep, and the error of leaving the others out."""

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
    """Return columns in the order in which pivoted Cholesky takes them.

    Each has the most energy that the ones before it leave (Harbrecht, Peters and Schneider 2012).

    Args:
        C: ``(n, n)``, float64, positive semidefinite.

    Returns:
        a permutation of the columns, ``(n,)``.
    """
    n = len(C)
    left, lower = C.diagonal().clone(), C.new_zeros(n, n)
    order = torch.empty(n, dtype=torch.long, device=C.device)
    for step in range(n):
        pivot = int(left.argmax())
        order[step] = pivot
        if left[pivot] > 0:
            column = C[:, pivot] - lower[:, :step] @ lower[pivot, :step]
            lower[:, step] = column / left[pivot].sqrt()
            left -= lower[:, step].square()
        left[pivot] = -math.inf
    return order


def elimination_order(C: Tensor, K: Tensor, step: int = 16) -> Tensor:
    """Return columns in descending order of what leaving them out costs, by backward elimination.

    With the columns J that remain refitted by least squares, leaving j out as well raises
    ``tr(K (C − C[:,J] C[J,J]⁻¹ C[J,:]))`` by ``Q_jj / P_jj``, where ``P = C[J,J]⁻¹`` and ``Q = Tᵀ G T`` for
    the refitted weight ``T`` (the optimal-brain-surgeon formula; Hassibi and Stork 1993). In each step the
    ``step`` cheapest columns are removed, and P and Q are updated.

    Args:
        C: second moment of the columns, ``(n, n)``, float64.
        K: ``Wᵀ G W`` of the weight that reads them, ``(n, n)``.
        step: how many columns go at a time.

    Returns:
        a permutation of the columns, ``(n,)``.
    """
    root = factor_spd(C)
    P, Q = torch.cholesky_inverse(root.lower), K.clone()
    remaining = torch.arange(len(C), device=C.device)
    gone: list[Tensor] = []
    while len(remaining) > step:
        cost = Q.diagonal() / P.diagonal()
        order = cost.argsort()
        out, keep = order[:step], order[step:].sort().values
        gone.append(remaining[out])
        small = torch.linalg.cholesky(P[out][:, out])
        M = torch.cholesky_solve(P[out][:, keep], small)
        Q_out = Q[out][:, keep]
        # T_keep ← T_keep − T_out M, so Q = TᵀGT changes by two products and one square of them.
        across = Q_out - 0.5 * Q[out][:, out] @ M
        Q = Q[keep][:, keep].addmm_(M.T, across, alpha=-1).addmm_(across.T, M, alpha=-1)
        P = P[keep][:, keep].addmm_(P[out][:, keep].T, M, alpha=-1)
        remaining = remaining[keep]
    gone.append(remaining[(Q.diagonal() / P.diagonal()).argsort()])
    return torch.cat(gone).flip(0)


def nystrom_errors(C: Tensor, K: Tensor, order: Tensor) -> Tensor:
    """Return ``tr(K (C − C[:,J] C[J,J]⁻¹ C[J,:]))`` for J the first k columns of an order, for every k.

    One Cholesky factorisation ``L Lᵀ`` of the reordered moment serves all k: what the first k columns leave
    is ``Σ_{j≥k} l_j l_jᵀ``.

    Args:
        C: second moment of the columns, ``(n, n)``, float64.
        K: ``Wᵀ G W`` of the weight that reads them.
        order: a permutation, ``(n,)``.

    Returns:
        ``(n + 1,)``: the error with 0, 1, …, n columns kept; the last is 0.
    """
    lower = factor_spd(C[order][:, order]).lower
    each = ((K[order][:, order] @ lower) * lower).sum(0)
    tails = each.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)]).clamp_min(0)


def nystrom_refit(weight: Tensor, C: Tensor, kept: Tensor) -> tuple[Tensor, Root]:
    """Return ``W C[:,J] C[J,J]⁻¹``: the weight on the columns J that best does what W did on all of them.

    Args:
        weight: ``(out, n)``.
        C: second moment of its input, ``(n, n)``, float64.
        kept: J, ``(k,)``.
    """
    root = factor_spd(C[kept][:, kept])
    right = weight.double() @ C[:, kept]
    return root.solve_transposed(root.solve(right.T)).T, root
