"""Linear algebra shared by the methods: in float64, sign-fixed, on the smaller side."""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading ``rank`` singular triples of a matrix, by the smaller Gram matrix's eigenvectors.

    Squaring costs accuracy only for singular values below ``1e-8 σ₁``, in float64.

    Args:
        matrix: ``(m, n)``, any float dtype.
        rank: from 1 to ``min(m, n)``.

    Returns:
        ``U (m, rank)``, ``S (rank,)`` descending, ``Vᵀ (rank, n)``, in float64; the largest entry of each
        column of U is positive, so that runs and devices agree.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    m = matrix.double() if wide else matrix.double().T
    _, vectors = torch.linalg.eigh(m @ m.T)
    left = vectors[:, -rank:].flip(1)
    right = left.T @ m
    values = right.norm(dim=1)
    right = right / values.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    u, vt = (left, right) if wide else (right.T, left.T)
    sign = _sign_of_largest(u)
    return u * sign, values, vt * sign[:, None]


def thin_qr(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``Q[:, :rank]`` and ``R[:rank]`` of a matrix's QR factorisation, in float64, sign-fixed.

    Args:
        matrix: ``(m, n)``.
        rank: from 1 to ``min(m, n)``.
    """
    q, r = torch.linalg.qr(matrix.double())
    q, r = q[:, :rank], r[:rank]
    sign = _sign_of_largest(q)
    return q * sign, r * sign[:, None]


def _sign_of_largest(columns: Tensor) -> Tensor:
    """The sign of each column's largest entry by magnitude; +1 for a zero column."""
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)
