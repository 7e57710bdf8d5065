"""The options of the integer program: schemes (and ranks) for each matrix, with their sizes and errors.

LQ-LoRA decomposes every matrix under each of 432 configurations (arXiv 2311.12023, section 3.2). Here a
matrix is quantised once for each number of bits and block size; the error that quantised scales add is
estimated from the largest entries of each block, and the errors of all ranks of a correction follow from one
decomposition of the quantisation error.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lowrank_ft.quant import storage_of
from lowrank_ft.quant.scheme import SCALE_BITS, Scheme
from lowrank_ft.quant.storage import BlockStorage, in_blocks
from lowrank_ft.solve.allocation import Option
from lowrank_ft.solve.metric import Metric

GridName = Literal["compact", "paper"]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Matrix:
    """A weight to be quantised, with the data that the integer program needs.

    Attributes:
        weight: ``(out, in)``, float32.
        metric: the metric that weighs its errors.
        ranks: ranks that a correction may have; empty for no correction.
        factor_bits: bits of each number in the correction's factors.
    """

    weight: Tensor
    metric: Metric
    ranks: tuple[int, ...] = ()
    factor_bits: int = 32


def grid(base: Scheme, name: GridName) -> list[Scheme]:
    """Return the schemes to choose from, with the codebook of ``base``.

    ``compact``: 2, 3, 4 and 8 bits in blocks of 16, 32 and 64, scales as in ``base``. ``paper``: each of them
    with scales of 2, 3, 4 and 8 bits in blocks of 16, 64 and 256 and three scale types: 432 in all.
    """
    bits = (2, 3, 4, 8) if base.codebook in ("nf", "signed", "fitted") else (base.bits,)
    schemes = [replace(base, bits=b, block=B) for b, B in itertools.product(bits, (16, 32, 64))]
    if name == "compact":
        return schemes
    scales = itertools.product((2, 3, 4, 8), (16, 64, 256), SCALE_BITS)
    return [
        replace(scheme, scale_bits=b, scale_block=B, scale_dtype=dtype)  # type: ignore[arg-type]
        for (b, B, dtype), scheme in itertools.product(list(scales), schemes)
    ]


def options_of(matrix: Matrix, schemes: Sequence[Scheme]) -> list[Option]:
    """Return an option for every scheme and rank: its bytes, and its predicted error in the metric's unit."""
    shape = matrix.weight.shape
    options: list[Option] = []
    groups: dict[Scheme, list[Scheme]] = {}
    for scheme in schemes:
        groups.setdefault(replace(scheme, scale_bits=32, scale_block=256, scale_dtype="float32"), []).append(
            scheme
        )
    for plain, members in groups.items():
        # Scales of eight bits clip next to nothing, so the largest entry of a block is enough.
        coarse = any(scheme.scale_bits < 8 for scheme in members)
        left, energies, add = _errors(matrix, plain, 4 if coarse else 1)
        for scheme in members:
            size = storage_of(scheme).bytes(*shape)
            extra = add(scheme)
            for rank in matrix.ranks or (None,):
                taken = 0.0 if rank is None else float(energies[:rank].sum())
                factors = 0 if rank is None else -(-rank * sum(shape) * matrix.factor_bits // 8)
                loss = max(left - taken, 0.0) + extra
                options.append(Option(rank, size + factors, loss, scheme=scheme))
    return options


def _errors(matrix: Matrix, plain: Scheme, cut_off: int) -> tuple[float, Tensor, Callable[[Scheme], float]]:
    """The error with exact scales, how much each direction of a correction removes, and what a scheme adds.

    ``cut_off`` is the number of entries of a block that a scale rounded down may clip.
    """
    W, storage = matrix.weight, BlockStorage(plain)
    packed = storage.pack(W)
    quantized = storage.unpack(packed, W.shape[1], 0, W.shape[0], torch.float32)
    left = matrix.metric.error(W - quantized)
    energies = torch.zeros(0)
    if matrix.ranks:
        _, energies = matrix.metric.leading(W - quantized, max(matrix.ranks))
    scales = packed["scales"].abs()
    densities = matrix.metric.densities(W.shape).to(W.device)
    rounding = in_blocks(densities * (W - quantized).square(), plain.block).sum(1)
    sizes = in_blocks(W.abs(), plain.block)
    largest, positions = sizes.max(1, keepdim=True) if cut_off == 1 else sizes.topk(cut_off, 1)
    density = in_blocks(densities, plain.block).gather(1, positions)

    def add(scheme: Scheme) -> float:
        """Estimate the error of rounded scales: the grid is stretched, and entries beyond it are clipped."""
        if scheme.scale_bits == 32:
            return 0.0
        moved = BlockStorage(scheme).read_scales(packed["scales"]).abs()
        stretched = (moved / torch.where(scales == 0, 1.0, scales)).square() - 1
        clipped = density * (largest - moved[:, None]).clamp_min(0).square()
        return float((rounding * stretched).sum(dtype=torch.float64) + clipped.sum(dtype=torch.float64))

    return left, energies, add
