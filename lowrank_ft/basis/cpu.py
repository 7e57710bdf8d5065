"""The C kernel (see :mod:`lowrank_ft.compiled`). Without a compiler, plain torch is used instead."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from lowrank_ft.basis.philox import Stream
from lowrank_ft.compiled import Kernel, at

KERNEL = Kernel(
    Path(__file__).with_name("philox.c"), "random bases are drawn by plain torch, many times slower"
)

_BITS = {torch.float32: 32, torch.float64: 64}


def available() -> bool:
    """Whether the kernel can run here; the first call builds it."""
    return KERNEL.available()


def combine(stream: Stream, coefficients: Tensor, count: int, scale: float) -> Tensor:
    """See :func:`lowrank_ft.basis.combine`."""
    coefficients = coefficients.detach().contiguous()
    bits, real = _BITS[coefficients.dtype], _real(coefficients)
    out = coefficients.new_empty(count)
    KERNEL.function(f"combine_{bits}")(
        *_words(stream), at(coefficients), ctypes.c_int64(len(coefficients)), real(scale), at(out),
        ctypes.c_int64(count),
    )  # fmt: skip
    return out


def project(stream: Stream, gradient: Tensor, bases: int, scale: float) -> Tensor:
    """See :func:`lowrank_ft.basis.project`."""
    gradient = gradient.detach().contiguous()
    out = gradient.new_empty(bases)
    sums = torch.empty(bases, dtype=torch.float64)
    KERNEL.function(f"project_{_BITS[gradient.dtype]}")(
        *_words(stream), at(gradient), ctypes.c_int64(len(gradient)), ctypes.c_double(scale), at(out),
        at(sums), ctypes.c_int64(bases),
    )  # fmt: skip
    return out


def _real(tensor: Tensor) -> type[ctypes.c_float] | type[ctypes.c_double]:
    return ctypes.c_float if tensor.dtype == torch.float32 else ctypes.c_double


def _words(stream: Stream) -> tuple[ctypes.Array[ctypes.c_uint32], ctypes.Array[ctypes.c_uint32]]:
    pair = ctypes.c_uint32 * 2
    return pair(*stream.key), pair(*stream.tail)
