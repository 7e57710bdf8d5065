"""The Triton kernels: the basis is drawn in registers and never stored.

Signs are flipped in the bits and sums run in the order of the basis matrices, without fused multiply-adds, so
that :func:`combine` gives the bits of the other backends.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import Tensor

from lowrank_ft.basis.philox import Stream

_BLOCKS = 8  # blocks of 128 elements that one program holds
# No fused multiply-adds: products and sums are rounded separately, as on the CPU.
_OPTIONS: dict[str, Any] = {"BLOCKS": _BLOCKS, "enable_fp_fusion": False}


def available() -> bool:
    """Whether Triton is here; it comes with torch's CUDA builds."""
    return importlib.util.find_spec("triton") is not None


def combine(stream: Stream, coefficients: Tensor, count: int, scale: float) -> Tensor:
    """See :func:`lowrank_ft.basis.combine`."""
    out = coefficients.new_empty(count)
    programs = -(-count // (128 * _BLOCKS))
    key, tail = _signed(stream.key), _signed(stream.tail)
    _kernels().combine[(programs,)](
        coefficients.contiguous(), out, *key, *tail, len(coefficients), count, **_OPTIONS
    )
    return out.mul_(scale)  # here, since a scalar argument would be float32


def project(stream: Stream, gradient: Tensor, bases: int, scale: float) -> Tensor:
    """See :func:`lowrank_ft.basis.project`."""
    out = gradient.new_empty(bases)
    key, tail = _signed(stream.key), _signed(stream.tail)
    _kernels().project[(bases,)](gradient.contiguous(), out, *key, *tail, len(gradient), **_OPTIONS)
    return out.mul_(scale)


def _signed(words: tuple[int, int]) -> tuple[int, int]:
    """Words as int32, which is how Triton takes them whatever their size."""
    first, second = (word - (1 << 32) if word >> 31 else word for word in words)
    return first, second


def _kernels() -> Any:
    """The kernels, imported when they are first needed: Triton is only there with a GPU."""
    return importlib.import_module("lowrank_ft.basis.triton_kernels")
