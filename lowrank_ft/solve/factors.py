"""Factors of a matrix under a metric: in float64, sign-fixed, from the smaller Gram matrix.

The compressors minimise ``‖G^½ (W − B A) C^½‖²_F`` over factors of rank r, where ``C`` is the second
moment of the layer's input and ``G`` that of its output's gradient; either may be the identity. The answer is
a truncated singular value decomposition of ``M = G^½ W C^½``, computed from its smaller Gram matrix:

* no more outputs than inputs: ``M Mᵀ = L_Gᵀ (W C Wᵀ) L_G``; C is never factored, so it may be singular;
* more outputs than inputs: ``Mᵀ M = L_Cᵀ (Wᵀ G W) L_C``; G is never factored: only ``Wᵀ G W`` is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_ft.errors import NonFiniteError
from lowrank_ft.solve.symmetric import Root, eigenpairs, factor_spd, with_ridge


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading ``rank`` singular triples of a matrix, from eigenvectors of its smaller Gram matrix.

    Squaring costs accuracy only for singular values below ``1e-8 σ₁``, in float64.

    Args:
        matrix: ``(m, n)``, any float dtype.
        rank: from 1 to ``min(m, n)``.

    Returns:
        ``U (m, rank)``, ``S (rank,)`` descending, ``Vᵀ (rank, n)``, in float64; the largest entry of each
        column of U is positive, so that all runs and devices return the same signs.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    m = matrix.double() if wide else matrix.double().T
    _, left = eigenpairs(m @ m.T, rank)
    right = left.T @ m
    values = right.norm(dim=1)
    right = right / values.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    u, vt = (left, right) if wide else (right.T, left.T)
    sign = sign_of_largest(u)
    return u * sign, values, vt * sign[:, None]


def thin_qr(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``Q[:, :rank]`` and ``R[:rank]`` of a matrix's QR factorisation, in float64, sign-fixed.

    Args:
        matrix: ``(m, n)``.
        rank: from 1 to ``min(m, n)``.
    """
    q, r = torch.linalg.qr(matrix.double())
    q, r = q[:, :rank], r[:rank]
    sign = sign_of_largest(q)
    return q * sign, r * sign[:, None]


def orthonormal(columns: Tensor) -> Tensor:
    """Normalise columns that are orthogonal already, and fix their signs.

    A column of zeros becomes a unit vector orthogonal to the others.
    """
    q: Tensor = torch.linalg.qr(columns)[0]
    return q * sign_of_largest(q)


def sign_of_largest(columns: Tensor) -> Tensor:
    """The sign of each column's largest entry by magnitude; +1 for a zero column."""
    largest = columns.gather(0, columns.abs().argmax(0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


@dataclass(frozen=True)
class Factors:
    """``W ≈ B A``, the best approximation of its rank under a metric.

    Attributes:
        B: ``(out, rank)``.
        A: ``(rank, in)``.
    """

    B: Tensor
    A: Tensor

    def balanced(self, rank: int | None = None) -> Factors:
        """Return the same product with ``BᵀB = A Aᵀ = Σ``, the singular values of the product.

        Args:
            rank: return the nearest product of this rank instead.
        """
        q_b, r_b = torch.linalg.qr(self.B)
        q_a, r_a = torch.linalg.qr(self.A.T)
        middle = r_b @ r_a.T
        u, s, vt = truncated_svd(middle, min(middle.shape) if rank is None else rank)
        return Factors(q_b @ (u * s.sqrt()), (s.sqrt()[:, None] * vt) @ q_a.T)


@dataclass(frozen=True)
class Decomposition:
    """The singular value decomposition of ``G^½ W C^½``, which can be truncated to any rank.

    Attributes:
        weight: ``W``, ``(out, in)``, float64.
        energies: squared singular values, descending, ``(min(out, in),)``, or only the largest.
        total: sum of all squared singular values: the error of rank 0.
        vectors: right singular vectors, ``(in, n)``, if ``tall``; else left ones, ``(out, n)``.
        tall: whether ``vectors`` are those of the input side.
        root: the root of G or C that the Gram matrix needed; None if it needed none.
    """

    weight: Tensor
    energies: Tensor
    total: float
    vectors: Tensor
    tall: bool
    root: Root | None

    def error(self, rank: int) -> float:
        """Return the squared weighted error ``‖G^½ (W − B A) C^½‖²`` of the best factors of a rank."""
        return max(float(self.total - self.energies[:rank].sum()), 0.0)

    def truncate(self, rank: int) -> Factors:
        """Return the best factors of a rank, in float64.

        With fewer outputs than inputs and no G this is ``B = U_r``, ``A = U_rᵀ W``: orthonormal directions
        of the output, as in atomic feature mimicking (Yu and Wu 2023).
        """
        return self.cut(rank).truncate(rank)

    def cut(self, rank: int) -> Cut:
        """Return the leading ``rank`` directions without the root: enough for factors of any smaller rank."""
        vectors = self.vectors[:, :rank]
        if self.root is None:
            return Cut(self.weight, self.energies, self.total, self.tall, vectors, vectors, None)
        away, back = self.root.lower @ vectors, self.root.solve_transposed(vectors)
        conditioning = Conditioning(self.root.ridge, self.root.condition, self.root.method)
        return Cut(self.weight, self.energies, self.total, self.tall, away, back, conditioning)


class Conditioning(NamedTuple):
    """The ridge, condition and method of a :class:`~lowrank_ft.solve.symmetric.Root`."""

    ridge: float
    condition: float
    method: str


@dataclass(frozen=True)
class Cut:
    """The leading directions of a decomposition: much smaller, and enough for factors up to their number.

    Attributes:
        weight: ``W``, ``(out, in)``, float64.
        energies: squared singular values, descending: all of them, or only the largest.
        total: sum of all squared singular values.
        tall: whether the directions are those of the input side.
        away: ``L V``, for V the leading vectors and L the root; V itself without a root.
        back: ``L⁻ᵀ V``; V itself without a root.
        root: how the root was computed; None if no root was needed.
    """

    weight: Tensor
    energies: Tensor
    total: float
    tall: bool
    away: Tensor
    back: Tensor
    root: Conditioning | None

    def error(self, rank: int) -> float:
        """Return the squared weighted error of the best factors of a rank."""
        return max(float(self.total - self.energies[:rank].sum()), 0.0)

    def truncate(self, rank: int) -> Factors:
        """Return the best factors of a rank, in float64 (see :meth:`Decomposition.truncate`)."""
        away, back = self.away[:, :rank], self.back[:, :rank]
        A, B = (back.T, self.weight @ away) if self.tall else (away.T @ self.weight, back)
        sign = sign_of_largest(B)
        return Factors(B * sign, A * sign[:, None])

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Return every attribute but the weight as tensors, by name with ``prefix`` in front."""
        total = torch.tensor([self.total, float(self.tall)], dtype=torch.float64)
        named = {"energies": self.energies, "total": total, "back": self.back}
        if self.root is not None:
            conditioning = [self.root.ridge, self.root.condition, float(self.root.method == "eigh")]
            named |= {"away": self.away, "root": torch.tensor(conditioning, dtype=torch.float64)}
        return {prefix + name: tensor for name, tensor in named.items()}

    @classmethod
    def of_tensors(cls, weight: Tensor, tensors: Mapping[str, Tensor], prefix: str = "") -> Cut:
        """Rebuild a cut from the result of :meth:`tensors`, on the weight's device.

        Args:
            weight: ``(out, in)``, any float dtype.
            tensors: what :meth:`tensors` returned; it may hold other tensors too.
            prefix: the prefix given to :meth:`tensors`.
        """
        energies, total, back = (
            tensors[prefix + name].to(weight.device) for name in ("energies", "total", "back")
        )
        away, root = back, None
        if f"{prefix}root" in tensors:
            away = tensors[f"{prefix}away"].to(weight.device)
            ridge, condition, is_eigh = tensors[f"{prefix}root"].tolist()
            root = Conditioning(ridge, condition, "eigh" if is_eigh else "cholesky")
        total_energy, is_tall = total.tolist()
        return cls(weight.double(), energies, total_energy, bool(is_tall), away, back, root)


def decompose(
    weight: Tensor,
    C: Tensor | None = None,
    G: Tensor | None = None,
    *,
    WtGW: Tensor | None = None,
    ridge: float = 0.0,
    rank: int | None = None,
) -> Decomposition:
    """Decompose a weight under the metric of its input and of its output's gradient.

    Args:
        weight: ``(out, in)``, any float dtype.
        C: second moment of the input, ``(in, in)``, or its diagonal ``(in,)``; None for the identity.
        G: second moment of the output's gradient, ``(out, out)``; None for the identity.
        WtGW: ``Wᵀ G W``, ``(in, in)``, instead of G.
        ridge: the smallest ridge on G, relative to the mean of its diagonal; with ``WtGW``, the multiple of
            ``Wᵀ W`` that the same ridge on G would add.
        rank: compute only this many leading directions, possibly with a randomised solver.

    Raises:
        NonFiniteError: a moment with NaN or infinite entries.
        ConfigError: a moment that is zero.
    """
    W = weight.double()
    out_features, in_features = W.shape
    # From Wᵀ G W alone only the Gram matrix of the input side can be formed.
    tall = out_features > in_features or (WtGW is not None and G is None)
    root = None
    if tall:
        # G itself is not factored on this side, so it needs no ridge.
        gram = gram_under(W, G, WtGW, ridge if G is None else 0.0)
        if C is not None:
            root = factor_spd(torch.diag(C) if C.dim() == 1 else C)
            gram = root.lower.T @ (gram @ root.lower)
    else:
        gram = W @ W.T if C is None else (W * C) @ W.T if C.dim() == 1 else W @ (C @ W.T)
        if G is not None:
            root = factor_spd(G, ridge)
            gram = root.lower.T @ (gram @ root.lower)
    if not torch.isfinite(gram).all():
        raise NonFiniteError("A weight or a moment has NaN or infinite entries.")
    count = min(out_features, in_features)
    energies, vectors = eigenpairs(gram, count if rank is None else rank, randomized=rank is not None)
    return Decomposition(W, energies.clamp_min(0), float(gram.trace()), vectors, tall, root)


def gram_under(
    weight: Tensor, G: Tensor | None = None, WtGW: Tensor | None = None, ridge: float = 0.0
) -> Tensor:
    """Return ``Wᵀ G W`` with a ridge on G, from G or from ``Wᵀ G W``; ``Wᵀ W`` if neither is given.

    Args:
        weight: ``(out, in)``, float64.
        G: second moment of the output's gradient, ``(out, out)``.
        WtGW: ``Wᵀ G W``, ``(in, in)``.
        ridge: relative to the mean of diag G.
    """
    if G is None and WtGW is None:
        return weight.T @ weight
    if WtGW is None:
        assert G is not None
        return weight.T @ (with_ridge(G, ridge * float(G.diagonal().mean())) @ weight)
    if not ridge:
        return WtGW
    return WtGW + ridge * _mean_gradient(WtGW, weight) * (weight.T @ weight)


def _mean_gradient(WtGW: Tensor, W: Tensor) -> float:
    """Estimate the mean of diag G from ``Wᵀ G W``: exact where G is a multiple of the identity."""
    return float(WtGW.trace() / (W * W).sum())


def weighted_error(difference: Tensor, C: Tensor | None = None, G: Tensor | None = None) -> float:
    """Return ``‖G^½ D C^½‖²_F = tr(Dᵀ G D C)`` of a difference ``(out, in)``, in float64."""
    D = difference.double()
    right = D if C is None else D * C if C.dim() == 1 else D @ C
    left = D if G is None else G @ D
    return float((left * right).sum())
