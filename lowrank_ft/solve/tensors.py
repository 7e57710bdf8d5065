"""Tensors of more than two dimensions: Tucker products and decompositions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_ft.solve.factors import sign_of_largest, truncated_svd
from lowrank_ft.solve.symmetric import eigenpairs


def tucker(core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Return ``G ×₁ U₁ … ×_N U_N`` (Tucker 1966; Kolda and Bader 2009, section 4).

    Args:
        core: ``(r_1, …, r_N)``.
        factors: for each mode ``(n_i, r_i)``, or None if the core has the mode at full size.

    Returns:
        ``(n_1, …, n_N)``.
    """
    product = core
    for factor in factors:  # the first mode moves to the end each time: N moves restore the order
        product = product.movedim(0, -1)
        product = product if factor is None else product @ factor.T
    return product


def hosvd(tensor: Tensor, ranks: Sequence[int | None], sweeps: int = 0) -> tuple[Tensor, list[Tensor | None]]:
    """Return a Tucker decomposition with orthonormal factors, in float64.

    Each factor holds the leading left singular vectors of its mode's unfolding (De Lathauwer et al. 2000).
    The squared error is at most the sum over modes of the discarded squared singular values, and so at most N
    times the best possible; each sweep of orthogonal iteration (HOOI, the same authors) lowers it.

    Args:
        tensor: any float dtype.
        ranks: for each mode, from 1 to the smaller of its size and the product of the other sizes; None
            keeps the mode at full size, without a factor.
        sweeps: rounds of HOOI.

    Returns:
        the core and the factors, as :func:`tucker` takes them; the largest entry of each column of a factor
        is positive.
    """
    whole = tensor.double()
    factors = [None if rank is None else leading(whole, mode, rank) for mode, rank in enumerate(ranks)]
    for _ in range(sweeps):
        for mode, rank in enumerate(ranks):
            if rank is not None:
                others = [None if other == mode else factor for other, factor in enumerate(factors)]
                factors[mode] = leading(_projected(whole, others), mode, rank)
    return _projected(whole, factors), factors


def leading(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """Return the ``rank`` leading left singular vectors of a mode's unfolding, ``(n_mode, rank)``."""
    unfolded = tensor.movedim(mode, 0).flatten(1)
    if unfolded.shape[0] <= unfolded.shape[1]:
        _, vectors = eigenpairs(unfolded @ unfolded.T, rank)
    else:  # the Gram matrix of a long mode, such as a vocabulary, would be too large
        left, _, _ = truncated_svd(unfolded, rank)
        vectors, _ = torch.linalg.qr(left)  # a zero singular value has a zero vector in `left`
    return vectors * sign_of_largest(vectors)


def _projected(tensor: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Multiply every mode by its factor's transpose."""
    return tucker(tensor, [None if factor is None else factor.T for factor in factors])
