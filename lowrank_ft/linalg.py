"""Linear algebra shared by the methods: in float64, sign-fixed, on the smaller side.

Every compressor here minimises ``‖G^½ (W − B A) C^½‖²_F`` over factors of rank r, where ``C`` is the second
moment of the layer's input and ``G`` that of its output's gradient; either may be the identity. The answer is
a truncated singular value decomposition of ``M = G^½ W C^½``, read off the smaller of its two Gram matrices:

* no more outputs than inputs: ``M Mᵀ = L_Gᵀ (W C Wᵀ) L_G``; C is never factored, so it may be singular;
* more outputs than inputs: ``Mᵀ M = L_Cᵀ (Wᵀ G W) L_C``; G is never factored, and enters only as ``Wᵀ G W``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lowrank_ft.errors import ConfigError, NonFiniteError

GRADIENT_RIDGE = 1e-4  # of G, which a few thousand tokens leave rank-deficient or nearly so


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
    _, left = eigenpairs(m @ m.T, rank)
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


# Symmetric matrices -----------------------------------------------------------------------------------------

RIDGES = (0.0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6)


@dataclass(frozen=True)
class Root:
    """A triangular square root of a positive semidefinite matrix: ``C + ridge · mean(diag C) · I = L Lᵀ``.

    Attributes:
        lower: ``L``, ``(n, n)``, lower triangular.
        ridge: what was added, relative to the mean of the diagonal; the floor of the eigenvalues where
            ``method`` is ``"eigh"``.
        method: ``"cholesky"`` or ``"eigh"``.
        condition: squared ratio of the largest to the smallest pivot: a lower bound of the condition number.
    """

    lower: Tensor
    ridge: float
    method: str
    condition: float

    def solve(self, matrix: Tensor) -> Tensor:
        """Return ``L⁻¹ M``."""
        return cast(Tensor, torch.linalg.solve_triangular(self.lower, matrix, upper=False))

    def solve_transposed(self, matrix: Tensor) -> Tensor:
        """Return ``L⁻ᵀ M``."""
        return cast(Tensor, torch.linalg.solve_triangular(self.lower.T, matrix, upper=True))


def factor_spd(matrix: Tensor, ridge: float = 0.0) -> Root:
    """Return a triangular root of a symmetric positive semidefinite matrix, and say what it took.

    Cholesky, with a ridge that starts at ``ridge`` and grows tenfold until it succeeds; where 1e-6 is not
    enough, from the eigenvectors with floored eigenvalues. Never an inverse, never a pseudo-inverse.

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
        found = krylov(lambda rows: rows @ matrix, len(matrix), count, matrix.device)
        if found is not None:
            return found
    values, vectors = torch.linalg.eigh(matrix)
    return values[-count:].flip(0), vectors[:, -count:].flip(1)


def krylov(
    apply: Callable[[Tensor], Tensor], n: int, count: int, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Return leading eigenpairs of a symmetric positive semidefinite operator, by a block Krylov space.

    Musco and Musco 2015, arXiv 1504.05477, algorithm 2, with every new block made orthogonal to those before
    it, which keeps the images, so that residuals are known at every step. Blocks have as many vectors as
    pairs are asked for, so that none is missed where an eigenvalue has as many equals; they are stored as
    rows, since a product from the left with a wide matrix is then at full speed whatever their number.

    Args:
        apply: multiplies rows ``(b, n)`` from the right by the operator, in float64.
        n: size of the operator.
        count: how many pairs.
        device: where blocks live.

    Returns:
        values ``(count,)``, descending, and vectors ``(n, count)``, every pair with ``‖M v − λ v‖ ≤ 1e-6 λ``
        outside of the space of these vectors; inside it, rounding errors of the largest λ are all that is
        left, and those turn vectors by no more than rounding. None where half of the whole space, or eighteen
        blocks, are not enough, or where the whole problem is too small for it to pay.
    """
    if not _krylov_pays(n, count):
        return None
    width = _width(count)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(width, n, generator=generator, dtype=torch.float64).to(device)
    blocks = min(18, n // (2 * width))
    basis, images = (block.new_empty(blocks * width, n) for _ in range(2))
    projected = block.new_empty(blocks * width, blocks * width)
    for step in range(blocks):
        old, known = step * width, (step + 1) * width
        for _ in range(2):  # once leaves what rounding made of the part that was taken out
            block = torch.linalg.qr((block - block @ basis[:old].T @ basis[:old]).T)[0].T
        image = apply(block)
        basis[old:known], images[old:known] = block, image
        projected[old:known, :known] = image @ basis[:known].T
        projected[:old, old:known] = projected[old:known, :old].T
        block = image
        if step < 5 or step % 2 == 0:  # hardly ever enough, and a check costs about what a step does
            continue
        small, rotation = torch.linalg.eigh(projected[:known, :known])
        values, rotation = small[-count:].flip(0), rotation[:, -count:].flip(1).T
        vectors = rotation @ basis[:known]
        residual = rotation @ images[:known] - vectors * values[:, None]
        residual -= residual @ vectors.T @ vectors
        done = residual.norm(dim=1) <= 1e-6 * values
        if done.all():
            return values, vectors.T
        outliers = int((values > _OUTLYING * values[-1]).sum())
        if outliers and done[:outliers].all():
            first, rest = vectors[:outliers], _without(vectors[:outliers], apply)
            found = krylov(rest, n, count - outliers, device)
            if found is None:
                return None
            both, _ = torch.linalg.qr(torch.cat([first.T, found[1]], 1))  # orthogonal but for rounding
            return torch.cat([values[:outliers], found[0]]), both
    return None


def _width(count: int) -> int:
    """Vectors of a block; fewer than eight would take more steps for no less work."""
    return max(count, 8)


def _krylov_pays(n: int, count: int) -> bool:
    """Whether a problem is large enough for a Krylov space to be less work than all of it."""
    return 16 * _width(count) <= n


# Beside an eigenvalue as much larger, the rounding errors of its images hide the residuals of the others.
_OUTLYING = 1e5


def _without(vectors: Tensor, apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The operator without eigenvectors of it, given as rows."""

    def projected(rows: Tensor) -> Tensor:
        return rows - rows @ vectors.T @ vectors

    return lambda rows: projected(apply(projected(rows)))


# Factors under a metric -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """``W ≈ B A`` of one rank, optimal under a metric.

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
    """The singular value decomposition of ``G^½ W C^½``, ready to be cut at any rank.

    Attributes:
        energies: squared singular values, descending, ``(min(out, in),)``, or only the largest.
        total: sum of all squared singular values: the error of rank 0.
        root: the square root that was needed (of G, or of C), or None.
    """

    weight: Tensor
    energies: Tensor
    total: float
    vectors: Tensor
    tall: bool
    root: Root | None

    def error(self, rank: int) -> float:
        """Return the squared weighted error ``‖G^½ (W − B A) C^½‖²`` that rank ``rank`` leaves."""
        return max(float(self.total - self.energies[:rank].sum()), 0.0)

    def truncate(self, rank: int) -> Factors:
        """Return the best factors of a rank, in float64.

        With fewer outputs than inputs and no G this is ``B = U_r``, ``A = U_rᵀ W``: orthonormal directions
        of the output, as in atomic feature mimicking (Yu and Wu 2023).
        """
        vectors = self.vectors[:, :rank]
        if self.tall:
            A = vectors.T if self.root is None else self.root.solve_transposed(vectors).T
            B = self.weight @ (vectors if self.root is None else self.root.lower @ vectors)
        else:
            B = vectors if self.root is None else self.root.solve_transposed(vectors)
            A = (vectors if self.root is None else self.root.lower @ vectors).T @ self.weight
        sign = _sign_of_largest(B)
        return Factors(B * sign, A * sign[:, None])


def decompose(
    weight: Tensor,
    C: Tensor | None = None,
    G: Tensor | None = None,
    *,
    pulled: Tensor | None = None,
    ridge: float = 0.0,
    rank: int | None = None,
) -> Decomposition:
    """Decompose a weight under the metric of its input and of its output's gradient.

    Args:
        weight: ``(out, in)``, any float dtype.
        C: second moment of the input, ``(in, in)``, or its diagonal ``(in,)``; None for the identity.
        G: second moment of the output's gradient, ``(out, out)``; None for the identity.
        pulled: ``Wᵀ G W``, ``(in, in)``, instead of G, where out > in.
        ridge: the smallest ridge on G (or, in ``Wᵀ G W``, on the identity it stands for).
        rank: only so many leading directions are wanted: a randomised solver may find them.

    Raises:
        NonFiniteError: a moment with NaN or infinite entries.
        ConfigError: a moment that is zero, or G given as ``pulled`` for a layer that is not tall.
    """
    W = weight.double()
    out_features, in_features = W.shape
    tall = out_features > in_features
    if pulled is not None and not tall:
        raise ConfigError("Wᵀ G W stands for G only where a layer has more outputs than inputs.")
    root = None
    if tall:
        gram = pull(W, G, pulled, ridge if G is None else 0.0)  # a G at hand is not factored, and needs none
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


def pull(weight: Tensor, G: Tensor | None = None, pulled: Tensor | None = None, ridge: float = 0.0) -> Tensor:
    """Return ``Wᵀ G W`` with a ridge on G, whichever of the two is known; ``Wᵀ W`` where neither is.

    Args:
        weight: ``(out, in)``, float64.
        G: second moment of the output's gradient, ``(out, out)``.
        pulled: ``Wᵀ G W``, ``(in, in)``.
        ridge: relative to the mean of diag G.
    """
    if G is None and pulled is None:
        return weight.T @ weight
    if pulled is None:
        assert G is not None
        return weight.T @ (with_ridge(G, ridge * float(G.diagonal().mean())) @ weight)
    if not ridge:
        return pulled
    return pulled + ridge * _mean_gradient(pulled, weight) * (weight.T @ weight)


def _mean_gradient(pulled: Tensor, W: Tensor) -> float:
    """The mean of diag G as far as ``Wᵀ G W`` tells: exact where G is a multiple of the identity."""
    return float(pulled.trace() / (W * W).sum())


def weighted_error(difference: Tensor, C: Tensor | None = None, G: Tensor | None = None) -> float:
    """Return ``‖G^½ D C^½‖²_F = tr(Dᵀ G D C)`` of a difference ``(out, in)``, in float64."""
    D = difference.double()
    right = D if C is None else D * C if C.dim() == 1 else D @ C
    left = D if G is None else G @ D
    return float((left * right).sum())


# Directions of the output -----------------------------------------------------------------------------------


def output_directions(
    weight: Tensor, C: Tensor, rank: int, *, squared: bool, last: bool
) -> tuple[Tensor, Tensor]:
    """Return left singular vectors of ``W C`` or ``W C^½``: the leading ones, or the last.

    The leading ones come from products with thin blocks. The last ones come from the inverse of a triangular
    factor: in the Gram matrix of ``W C`` they would drown in the rounding error of the leading ones.

    Args:
        weight: ``(out, in)``, any float dtype.
        C: second moment of the input, ``(in, in)``, or its diagonal ``(in,)``; float64.
        rank: how many, from 1 to ``min(out, in)``.
        squared: of ``W C``, for which C may be singular; otherwise of ``W C^½``.
        last: the last of the ``min(out, in)`` vectors; otherwise the first.

    Returns:
        ``U (out, rank)`` with orthonormal columns, sign-fixed, and their singular values ``(rank,)``, in
        descending order.

    Raises:
        NonFiniteError: a weight or a moment with NaN or infinite entries.
    """
    W = weight.double()
    scale = C if C.dim() == 1 else C.diagonal()  # a semidefinite matrix is finite where its diagonal is
    if not (torch.isfinite(W.sum()) and torch.isfinite(scale).all()):  # a sum is finite if all its terms are
        raise NonFiniteError("A weight or a moment has NaN or infinite entries.")
    U, values = (_last_directions if last else _leading_directions)(W, C, rank, squared)
    return U * _sign_of_largest(U), values


def output_spectrum(weight: Tensor, C: Tensor, *, squared: bool) -> Tensor:
    """Return the singular values of ``W C`` or ``W C^½``, descending, ``(min(out, in),)``."""
    return cast(Tensor, torch.linalg.svdvals(_times_root(weight.double(), C, squared)))


# Squared singular values below this share of the largest are lost to rounding in a Gram matrix.
_RESOLVED = 1e-8


def _leading_directions(W: Tensor, C: Tensor, rank: int, squared: bool) -> tuple[Tensor, Tensor]:
    def apply(rows: Tensor) -> Tensor:
        inner = _times(rows @ W, C)
        return (_times(inner, C) if squared else inner) @ W.T

    found = krylov(apply, len(W), rank, W.device)
    if found is not None:
        return found[1], found[0].sqrt()
    X = _times_root(W, C, squared)
    wide = X.shape[0] <= X.shape[1]
    energies, vectors = eigenpairs(X @ X.T if wide else X.T @ X, rank)
    if not energies[-1] > _RESOLVED * energies[0]:
        left, values, _ = torch.linalg.svd(X, full_matrices=False)
        return left[:, :rank], values[:rank]
    values = energies.sqrt()
    return (vectors if wide else X @ vectors / values), values


@dataclass(frozen=True)
class _Triangular:
    """A triangular factor of a product."""

    matrix: Tensor
    upper: bool

    def solve(self, block: Tensor) -> Tensor:
        return cast(Tensor, torch.linalg.solve_triangular(self.matrix, block, upper=self.upper))

    @property
    def transposed(self) -> _Triangular:
        return _Triangular(self.matrix.T, not self.upper)

    @property
    def spread(self) -> float:
        """The smallest pivot's share of the largest."""
        pivots = self.matrix.diagonal().abs()
        return float(pivots.min() / pivots.max())


def _last_directions(W: Tensor, C: Tensor, rank: int, squared: bool) -> tuple[Tensor, Tensor]:
    if not _krylov_pays(min(W.shape), rank):
        return _last_of_all(W, C, rank, squared)
    wide = W.shape[0] < W.shape[1]
    if wide:  # W C = T Qᵀ
        factors = [_Triangular(_upper(_times_root(W, C, squared).T).T, upper=False)]
    else:  # W = Q R, so W C = Q R L Lᵀ: neither the product nor its factorisation is needed
        factors = [_Triangular(_upper(W), upper=True), *_triangular_root(C, squared)]

    def inverse(rows: Tensor) -> Tensor:
        """``(T Tᵀ)⁻¹`` for the product T of the factors: in an inverse the last directions come first."""
        block = rows.T
        for factor in factors:
            block = factor.solve(block)
        for factor in reversed(factors):
            block = factor.transposed.solve(block)
        return block.T

    found = None
    if math.prod(factor.spread for factor in factors) > 1e-10:  # so that it has six digits at the least
        found = krylov(inverse, min(W.shape), rank, W.device)
    if found is None:
        return _last_of_all(W, C, rank, squared)
    values, vectors = found
    return (vectors if wide else W @ factors[0].solve(vectors)).flip(1), values.flip(0).rsqrt()


def _last_of_all(W: Tensor, C: Tensor, rank: int, squared: bool) -> tuple[Tensor, Tensor]:
    """The last directions out of all of them."""
    X = _times_root(W, C, squared)
    wide = X.shape[0] < X.shape[1]
    left, values, _ = torch.linalg.svd(_upper(X.T).T if wide else X, full_matrices=False)
    return left[:, -rank:], values[-rank:]


def _upper(matrix: Tensor) -> Tensor:
    """The triangular factor of a QR factorisation."""
    return cast(Tensor, torch.linalg.qr(matrix, mode="r")[1])


def _triangular_root(C: Tensor, squared: bool) -> list[_Triangular]:
    """Triangular factors whose product is C, or a root of it."""
    if C.dim() == 1:
        return [_Triangular(torch.diag(C if squared else C.sqrt()), upper=True)]
    lower, failed = torch.linalg.cholesky_ex(C)
    if failed:
        lower = torch.zeros_like(C)  # singular, as its pivots say
    root = _Triangular(lower, upper=False)
    return [root, root.transposed] if squared else [root]


def _times(rows: Tensor, C: Tensor) -> Tensor:
    """``M C``, where C may be given as its diagonal."""
    return rows @ C if C.dim() == 2 else rows * C


def _times_root(W: Tensor, C: Tensor, squared: bool) -> Tensor:
    """``W C``, or ``W L`` for a root ``C = L Lᵀ``, whose left singular vectors are those of ``W C^½``."""
    if squared:
        return _times(W, C)
    return W * C.sqrt() if C.dim() == 1 else W @ factor_spd(C).lower


# Columns ----------------------------------------------------------------------------------------------------


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
    """Return columns by what leaving them out costs, the dearest first, by backward elimination.

    With the columns J that remain refitted by least squares, leaving j out as well raises
    ``tr(K (C − C[:,J] C[J,J]⁻¹ C[J,:]))`` by ``Q_jj / P_jj``, where ``P = C[J,J]⁻¹`` and ``Q = Tᵀ G T`` for
    the refitted weight ``T`` (the optimal-brain-surgeon formula; Hassibi and Stork 1993). The cheapest
    ``step`` columns go at a time, and P and Q are brought up to date.

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


# Tensors ----------------------------------------------------------------------------------------------------


def tucker(core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Return ``G ×₁ U₁ … ×_N U_N`` (Tucker 1966; Kolda and Bader 2009, section 4).

    Args:
        core: ``(r_1, …, r_N)``.
        factors: for each mode ``(n_i, r_i)``, or None where the core has the mode whole.

    Returns:
        ``(n_1, …, n_N)``.
    """
    whole = core
    for factor in factors:  # each mode in turn is the first, and goes to the end: N turns restore the order
        whole = whole.movedim(0, -1)
        whole = whole if factor is None else whole @ factor.T
    return whole


def hosvd(tensor: Tensor, ranks: Sequence[int | None], sweeps: int = 0) -> tuple[Tensor, list[Tensor | None]]:
    """Return a Tucker decomposition with orthonormal factors, in float64.

    Each factor has the leading left singular vectors of its mode's unfolding (De Lathauwer et al. 2000). The
    squared error is at most the sum over modes of what they cut off, and so within a factor N of the best;
    each sweep of orthogonal iteration (HOOI, the same authors) lowers it.

    Args:
        tensor: any float dtype.
        ranks: for each mode, from 1 to its size and to the product of the others; None leaves it whole,
            without a factor.
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
    else:  # a vocabulary's own Gram matrix would be too large
        left, _, _ = truncated_svd(unfolded, rank)
        vectors, _ = torch.linalg.qr(left)  # where a singular value is zero, so is the vector
    return vectors * _sign_of_largest(vectors)


def _projected(tensor: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Multiply every mode by its factor's transpose."""
    return tucker(tensor, [None if factor is None else factor.T for factor in factors])
