"""Rounding with error feedback: later columns compensate for the errors of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_ft import solve

_WIDTH = 64  # columns with feedback one by one; the feedback of all columns before them is one product


@dataclass(frozen=True)
class Feedback:
    """Error feedback under the metric ``C``: the linear feedback with the least ``tr(E C Eᵀ)`` for one order.

    With ``C = M D Mᵀ``, M unit upper triangular in the order of rounding, that is ``Σ_k D_k ‖(E M)_k‖²``.
    Column k of ``E M`` is ``e_k + Σ_{j<k} e_j M_jk``. If ``w_k + Σ_{j<k} e_j M_jk`` is rounded instead of
    ``w_k``, that column is only the rounding error of step k (Chee et al. 2023, arXiv 2307.13304, section 3;
    the same rounding as GPTQ's, Frantar et al. 2022, arXiv 2210.17323). Columns of large second moment are
    rounded first, while most others can still compensate for their errors. No matrix is inverted.

    Attributes:
        order: the order of rounding, ``(columns,)``.
        factor: ``M``, ``(columns, columns)``, float32, in that order.
    """

    order: Tensor
    factor: Tensor

    @classmethod
    def under(cls, C: Tensor, ridge: float = 1.0) -> Feedback:
        """Return the feedback for a second moment.

        Args:
            C: ``(columns, columns)``, float64.
            ridge: at least this multiple of the mean of diag C is added to the diagonal. Quantising the
                earlier layers perturbs this layer's input in all directions, also in those where C is zero;
                with almost no ridge, rounding errors are moved into these directions and add up there.
        """
        order = C.diagonal().argsort(descending=True, stable=True)
        sorted_ = C[order][:, order]
        flipped = solve.factor_spd(sorted_.flip(0, 1), ridge).lower.flip(0, 1)  # C = U Uᵀ, U upper
        return cls(order, (flipped / flipped.diagonal()).float())

    def codes(self, W: Tensor, scales: Tensor, levels: Tensor) -> Tensor:
        """Return the codes of a matrix, ``(rows, columns)``, int32.

        Args:
            W: ``(rows, columns)``, float32.
            scales: the scale of each entry, of the same shape; none may be zero.
            levels: the codebook, ascending.
        """
        cuts = (levels[1:] + levels[:-1]) / 2
        W, scales = W[:, self.order].T.contiguous(), scales[:, self.order].T.contiguous()
        errors, codes = torch.empty_like(W), torch.empty_like(W, dtype=torch.int32)
        M = self.factor
        for start in range(0, len(W), _WIDTH):
            stop = min(start + _WIDTH, len(W))
            carried = M[:start, start:stop].T @ errors[:start]
            for k in range(start, stop):
                target = W[k] + carried[k - start]
                if k > start:
                    target += M[start:k, k] @ errors[start:k]
                codes[k] = torch.bucketize(target / scales[k], cuts, out_int32=True)
                errors[k] = W[k] - levels[codes[k]] * scales[k]
        restored = torch.empty_like(codes)
        restored[self.order] = codes
        return restored.T
