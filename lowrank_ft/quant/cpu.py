"""Unpacking by a C kernel (see :mod:`lowrank_ft.compiled`); results are bit-identical to plain torch."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int64
from pathlib import Path

import torch
from torch import Tensor

from lowrank_ft.compiled import Kernel, at

KERNEL = Kernel(
    Path(__file__).with_name("unpack.c"), "packed weights are read by plain torch, several times slower"
)
_SHARE = 2**18  # the fewest weights for which another thread pays


def reads(codes: Tensor) -> bool:
    """Whether the kernel can read these codes; the first call builds it."""
    return codes.device.type == "cpu" and not torch.compiler.is_compiling() and KERNEL.available()


def unpack(codes: Tensor, levels: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    """Return each code's level times its block's scale, ``(blocks, block)``, float32.

    Args:
        codes: packed codes of whole blocks, uint8.
        levels: ``(2^bits,)``, float32.
        scales: ``(blocks,)``, float32.
        bits: bits of a code: 2, 3, 4 or 8.
        block: number of codes that share a scale, a multiple of 8.
    """
    run = KERNEL.function("unpack")
    codes, levels, scales = (tensor.contiguous() for tensor in (codes, levels, scales))
    blocks = len(scales)
    out = torch.empty(blocks, block)

    def part(low: int, high: int) -> None:
        width = block * bits // 8
        run(
            at(codes[low * width :]), at(levels), at(scales[low:]), c_int64(bits), c_int64(block),
            c_int64(high - low), at(out[low:]),
        )  # fmt: skip

    threads = min(torch.get_num_threads(), out.numel() // _SHARE)
    if threads < 2:
        part(0, blocks)
    else:
        cuts = [blocks * i // threads for i in range(threads + 1)]
        list(_pool(threads).map(part, cuts[:-1], cuts[1:]))
    return out


def read_scales(
    codes: Tensor, supers: Tensor, offset: Tensor, largest: int, group: int, first: int
) -> Tensor:
    """Return the scales of blocks ``first``, ``first + 1``, …, float32.

    Args:
        codes: one for each scale, uint8: its magnitude, plus ``largest + 1`` if the scale is negative.
        supers: the largest scale of each group, float32.
        offset: ``(1,)``, the number subtracted from all magnitudes before rounding.
        largest: the largest code of a magnitude, one less than a power of two.
        group: number of scales that share one of ``supers``.
        first: index of the block to which the first code belongs.
    """
    run = KERNEL.function("read_scales")
    codes, supers = codes.contiguous(), supers.contiguous()
    out = torch.empty(len(codes))
    run(
        at(codes), at(supers), at(offset), c_int64(largest), c_int64(group), c_int64(first),
        c_int64(len(codes)), at(out),
    )  # fmt: skip
    return out


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)
