"""Second moments of layers' inputs and output gradients, summed in float64.

Products of one batch at a time, in float32, are added to a float64 total. Only one triangle of
it is computed. Padding positions are left out of all sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ft.errors import NonFiniteError
from lowrank_ft.modules.layer import Layer


@dataclass(frozen=True)
class SiteStatistics:
    """The statistics of one layer.

    Attributes:
        tokens: how many positions ``C`` is the mean of.
        C: second moment of the input, ``E[x xᵀ]``, ``(in, in)`` float64; for an embedding, the frequency
            of each token, ``(in,)``, which is the diagonal of the same matrix for one-hot inputs.
        mean: ``E[x]``, ``(in,)`` float64.
        G: second moment of the output's gradient, ``(1/N) Σ g gᵀ`` with g the gradient of the loss summed
            over its tokens; ``(out, out)`` float64. None if it was not asked for, or ``WtGW`` replaces it.
        WtGW: ``Wᵀ G W``, ``(in, in)``, for layers with more outputs than inputs. A decomposition needs no
            more of G, and it takes less memory.
        G_diagonal: diagonal of G, ``(out,)``, if ``WtGW`` replaces G.
        C_weighted: ``Σ ‖g‖² x xᵀ / Σ ‖g‖²`` over tokens, ``(in, in)``. Together with G it approximates the
            Fisher matrix better than C does: tokens that the loss does not depend on (attention sinks, whose
            activations are huge) get no weight.
        G_q: block of G that belongs to the queries, for a layer that computes queries, keys and values at
            once.
        G_k: block of G that belongs to the keys.
        fisher_rows: mean over each row of ``F = Σ (∂ℓ/∂W)²``, one gradient for each sequence, ``(out,)``
            float64.
        fisher_columns: mean over each column of the same, ``(in,)``.
        sensitivity: divergence of the model's output, in nats per token, per unit of ``E‖Δy‖²``, measured
            without gradients.
        influence: of the block that contains the layer, ``1 − E cos(x, y)`` with x the block's input and y
            its output (Men et al. 2024, arXiv 2403.03853, equation 1); None outside a chain of blocks.
    """

    tokens: int
    C: Tensor
    mean: Tensor
    G: Tensor | None = None
    WtGW: Tensor | None = None
    G_diagonal: Tensor | None = None
    C_weighted: Tensor | None = None
    G_q: Tensor | None = None
    G_k: Tensor | None = None
    fisher_rows: Tensor | None = None
    fisher_columns: Tensor | None = None
    sensitivity: float | None = None
    influence: float | None = None


class Moments:
    """Running second moment and mean of rows ``(tokens, n)``."""

    def __init__(self, features: int, *, diagonal: bool = False) -> None:
        self.tokens = 0
        self.features = features
        self.diagonal = diagonal
        self.dtype = torch.float32  # dtype of the moment: float64 where the rows are float64
        self.total = self.sum = None  # type: Tensor | None

    def add(self, rows: Tensor) -> None:
        """Add rows: vectors, or token ids where the moment is diagonal."""
        self.tokens += rows.shape[0]
        if self.diagonal:
            counts = torch.bincount(rows.reshape(-1), minlength=self.features).double()
            self.total = counts if self.total is None else self.total.add_(counts)
            return
        if self.total is None or self.sum is None:
            zero = torch.zeros((), dtype=torch.float64, device=rows.device)
            self.total = zero.new_zeros(self.features, self.features)
            self.sum = zero.new_zeros(self.features)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.dtype = torch.promote_types(self.dtype, rows.dtype)
        self.sum += rows.sum(0)  # summing in float64 would cost as much as the Gram itself
        add_gram(self.total, rows)

    def second(self, name: str) -> Tensor:
        """Return ``E[x xᵀ]`` in float32 (float64 for float64 rows); for token ids, its diagonal in float64.

        Raises:
            NonFiniteError: an activation was NaN or infinite.
        """
        assert self.total is not None
        if not torch.isfinite(self.total.diagonal() if self.total.dim() == 2 else self.total).all():
            raise NonFiniteError(
                f"The activations at {name} are NaN or infinite on the calibration data. Check the data and "
                f"the model's dtype (float16 overflows where bfloat16 does not)."
            )
        if self.diagonal:
            return self.total / self.tokens
        moment = self.total / self.tokens
        mirror(moment)
        return moment.to(self.dtype)

    def mean(self) -> Tensor:
        """Return ``E[x]``; for token ids, the mean of their one-hot vectors."""
        if self.diagonal:
            assert self.total is not None
            return self.total / self.tokens
        assert self.sum is not None
        return self.sum / self.tokens


_SMALLEST = 128  # splitting blocks of fewer columns saves no time


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add the lower triangle of ``Xᵀ X`` to ``total``; each block is multiplied in the dtype of the rows.

    The columns are halved recursively, and the block above the diagonal is left out each time: after three
    halvings 9/16 of the full product is computed.

    Args:
        total: ``(n, n)``, float64, changed in place.
        rows: ``(tokens, n)``.
    """
    n = rows.shape[1]
    if n < 2 * _SMALLEST:
        total += rows.T @ rows
        return
    half = n // 2
    add_gram(total[:half, :half], rows[:, :half])
    add_gram(total[half:, half:], rows[:, half:])
    total[half:, :half] += rows[:, half:].T @ rows[:, :half]


def mirror(matrix: Tensor) -> None:
    """Copy the lower triangle of a square matrix onto the upper one, in place, by the same blocks."""
    n = matrix.shape[0]
    if n < 2 * _SMALLEST:
        matrix.copy_(matrix.tril() + matrix.tril(-1).T)
        return
    half = n // 2
    mirror(matrix[:half, :half])
    mirror(matrix[half:, half:])
    matrix[:half, half:] = matrix[half:, :half].T


def rows_of(layer: Layer, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return a layer's input (or the gradient of its output) as rows, padding left out.

    Args:
        layer: the layer.
        x: ``(batch, tokens, features)``, or any tensor whose last dimension is the features (as from
            ``Layer.rows``); token ids for the input of an embedding.
        mask: ``(batch, tokens)``, true where a position is real.
    """
    is_ids = not x.is_floating_point()
    positions = x.shape if is_ids else x.shape[:-1]
    flat = x.reshape(-1) if is_ids else x.reshape(-1, x.shape[-1])
    if mask is not None and mask.numel() == flat.shape[0] and positions[0] in (mask.shape[0], mask.numel()):
        flat = flat[mask.reshape(-1).to(flat.device)]
    return flat
