"""The kernels of :mod:`lowrank_ft.basis.gpu`; importing this file needs Triton.

The functions have no type annotations, since Triton would try to compile them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton must not specialise these: an argument of 1 would become a constant, which has no dtype.
_WORDS = ["key0", "key1", "tail0", "tail1"]


@triton.jit
def _signs(first, index, key0, key1, tail0, tail1, BLOCKS: tl.constexpr):
    """The signs of ``BLOCKS`` blocks from ``first``, ``(BLOCKS, 128)``, as bits 0 and 1."""
    zero = tl.zeros((BLOCKS,), dtype=tl.uint32)  # adding it makes any integer unsigned
    c0 = zero + first + tl.arange(0, BLOCKS)
    c1 = zero + index
    c2 = zero + tail0
    c3 = zero + tail1
    k0 = zero + key0
    k1 = zero + key1
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        low0 = c0 * 0xD2511F53
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    j = tl.arange(0, 128)[None, :]
    word = tl.where(
        j < 64,
        tl.where(j < 32, c0[:, None], c1[:, None]),
        tl.where(j < 96, c2[:, None], c3[:, None]),
    )
    return (word >> (j % 32).to(tl.uint32)) & 1


@triton.jit(do_not_specialize=_WORDS)
def combine(
    coefficients,
    out,
    key0,
    key1,
    tail0,
    tail1,
    bases,
    count,
    BLOCKS: tl.constexpr,
):
    """One program sums ``BLOCKS · 128`` elements over all basis matrices, in their order."""
    first = tl.program_id(0) * BLOCKS
    element = (first + tl.arange(0, BLOCKS))[:, None].to(tl.int64) * 128 + tl.arange(0, 128)[None, :]
    total = tl.zeros((BLOCKS, 128), dtype=out.dtype.element_ty)
    for i in range(bases):
        value = tl.load(coefficients + i)
        total += tl.where(_signs(first, i, key0, key1, tail0, tail1, BLOCKS) == 1, -value, value)
    tl.store(out + element, total, mask=element < count)


@triton.jit(do_not_specialize=_WORDS)
def project(
    gradient,
    out,
    key0,
    key1,
    tail0,
    tail1,
    count,
    BLOCKS: tl.constexpr,
):
    """One program computes the inner product with one basis matrix, in the same order in every run."""
    i = tl.program_id(0)
    lanes = tl.zeros((BLOCKS, 128), dtype=out.dtype.element_ty)
    blocks = tl.cdiv(count, 128)
    for first in range(0, blocks, BLOCKS):
        element = (first + tl.arange(0, BLOCKS))[:, None].to(tl.int64) * 128 + tl.arange(0, 128)[None, :]
        values = tl.load(gradient + element, mask=element < count, other=0.0)
        lanes += tl.where(_signs(first, i, key0, key1, tail0, tail1, BLOCKS) == 1, -values, values)
    tl.store(out + i, tl.sum(tl.sum(lanes, axis=1), axis=0))
