"""Random bases that are a pure function of integers: the same bits on every machine, in every release.

:mod:`~lowrank_ft.basis.philox` defines the streams. This file combines basis matrices with coefficients, and
projects gradients onto them, with the fastest backend of the machine: a small C kernel on the CPU (built on
first use if there is a C compiler), Triton on a GPU, else plain torch. Combinations are bit-identical in all
three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_ft.basis import cpu, gpu, philox
from lowrank_ft.basis.philox import Stream

__all__ = ["Stream", "combine", "project"]


def combine(stream: Stream, coefficients: Tensor, count: int, scale: float) -> Tensor:
    """Return ``scale · Σ_i c_i S_i``, flat: the sum in the order of i, in the coefficients' dtype.

    Each term is ``±c_i``, so every step of the sum rounds once, and the result is bit-identical on every
    backend.

    Args:
        stream: the basis matrices.
        coefficients: ``(k,)``, float32 or float64; coefficient i belongs to basis matrix i.
        count: number of elements of a basis matrix.
        scale: factor on the sum.

    Returns:
        ``(count,)``, on the coefficients' device, in their dtype.
    """
    return _backend(stream, coefficients).combine(stream, coefficients, count, scale)


def project(stream: Stream, gradient: Tensor, bases: int, scale: float) -> Tensor:
    """Return ``scale · ⟨S_i, gradient⟩`` for i from 0 to ``bases − 1``: the adjoint of :func:`combine`.

    Args:
        stream: the basis matrices.
        gradient: of any shape, float32 or float64; read row by row.
        bases: how many inner products.
        scale: factor on them.

    Returns:
        ``(bases,)``, on the gradient's device, in its dtype; the order of summation depends on the backend.
    """
    return _backend(stream, gradient).project(stream, gradient.contiguous().flatten(), bases, scale)


def _backend(stream: Stream, tensor: Tensor) -> philox.Backend:
    if stream.kind == "rademacher" and tensor.dtype in (torch.float32, torch.float64):
        if tensor.device.type == "cpu" and cpu.available():
            return cpu
        if tensor.device.type == "cuda" and gpu.available():
            return gpu
    return philox
