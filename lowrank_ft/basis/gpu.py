"""The Triton kernels: the basis is drawn in registers and never stored.

Terms are summed in the order of the basis matrices, without fused multiply-adds, so that :func:`combine` is
bit-identical to the other backends.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch import Tensor

from lowrank_ft.basis.philox import Stream

_BLOCKS = 8  # blocks of 128 elements that one Triton program holds
# No fused multiply-adds: products and sums are rounded separately, as on the CPU.
_OPTIONS: dict[str, Any] = {"BLOCKS": _BLOCKS, "enable_fp_fusion": False}


def available() -> bool:
    """Whether Triton is installed; it comes with torch's CUDA builds."""
    return importlib.util.find_spec("triton") is not None


def combine(stream: Stream, coefficients: Tensor, count: int, scale: float) -> Tensor:
    """See :func:`lowrank_ft.basis.combine`."""
    out = coefficients.new_empty(count)
    programs = -(-count // (128 * _BLOCKS))
    key, tail = _signed(stream.key), _signed(stream.tail)
    _kernels().combine[(programs,)](
        coefficients.contiguous(), out, *key, *tail, len(coefficients), count, **_OPTIONS
    )
    return out.mul_(scale)  # not in the kernel, whose scalar arguments are float32


def project(stream: Stream, gradient: Tensor, bases: int, scale: float) -> Tensor:
    """See :func:`lowrank_ft.basis.project`."""
    out = gradient.new_empty(bases)
    key, tail = _signed(stream.key), _signed(stream.tail)
    _kernels().project[(bases,)](gradient.contiguous(), out, *key, *tail, len(gradient), **_OPTIONS)
    return out.mul_(scale)


def _signed(words: tuple[int, int]) -> tuple[int, int]:
    """Return words as int32, so that Triton gives them the same type whatever their size."""
    first, second = (word - (1 << 32) if word >> 31 else word for word in words)
    return first, second


def _kernels() -> Any:
    """The kernels' module, imported on first use, since Triton may be missing."""
    return importlib.import_module("lowrank_ft.basis.triton_kernels")
