"""Which scheme (and rank) for each matrix under one budget: the options, and what each of them costs.

LQ-LoRA decomposes every matrix under every configuration (arXiv 2311.12023, section 3.2), 432 of them. Here
it is done once for each number of bits and block size, and the error that quantised scales add is estimated
from the largest entries of each block; a correction's rank is read off the spectrum of what is left, so that
all ranks cost one decomposition.
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
    """A weight to be stored, as the integer program sees it.

    Attributes:
        weight: ``(out, in)``, float32.
        metric: what weighs its errors.
        ranks: ranks that a correction may have; none for no correction.
        factor_bits: of each number in its factors.
    """

    weight: Tensor
    metric: Metric
    ranks: tuple[int, ...] = ()
    factor_bits: int = 32


def grid(base: Scheme, name: GridName) -> list[Scheme]:
    """Return the schemes to choose from, in the codebook of ``base``.

    ``compact``: 2, 3, 4 and 8 bits in blocks of 16, 32 and 64, scales as in ``base``. ``paper``: times
    scales of 2, 3, 4 and 8 bits in blocks of 16, 64 and 256, their scales in three types: 432 in all.
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
    """Return every scheme with every rank: its bytes, and its predicted cost in the metric's unit."""
    shape = matrix.weight.shape
    options: list[Option] = []
    groups: dict[Scheme, list[Scheme]] = {}
    for scheme in schemes:
        groups.setdefault(replace(scheme, scale_bits=32, scale_block=256, scale_dtype="float32"), []).append(
            scheme
        )
    for plain, members in groups.items():
        # Scales of eight bits cut off next to nothing; the largest entry of a block stands for all.
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
    """The error with exact scales, what a correction's directions take of it, and what other scales add.

    ``cut_off`` is how many entries of a block a scale that was rounded down may clip.
    """
    W, storage = matrix.weight, BlockStorage(plain)
    packed = storage.pack(W)
    read = storage.unpack(packed, W.shape[1], 0, W.shape[0], torch.float32)
    left = matrix.metric.error(W - read)
    energies = torch.zeros(0)
    if matrix.ranks:
        _, energies = matrix.metric.leading(W - read, max(matrix.ranks))
    scales = packed["scales"].abs()
    worth = matrix.metric.densities(W.shape).to(W.device)
    rounding = in_blocks(worth * (W - read).square(), plain.block).sum(1)
    sizes = in_blocks(W.abs(), plain.block)
    largest, where = sizes.max(1, keepdim=True) if cut_off == 1 else sizes.topk(cut_off, 1)
    value = in_blocks(worth, plain.block).gather(1, where)

    def add(scheme: Scheme) -> float:
        """Entries within a rounded scale are rounded on a stretched grid; entries beyond it are clipped."""
        if scheme.scale_bits == 32:
            return 0.0
        moved = BlockStorage(scheme).read_scales(packed["scales"]).abs()
        stretched = (moved / torch.where(scales == 0, 1.0, scales)).square() - 1
        cut = value * (largest - moved[:, None]).clamp_min(0).square()
        return float((rounding * stretched).sum(dtype=torch.float64) + cut.sum(dtype=torch.float64))

    return left, energies, add
