"""Quantisation of small vectors: blocks of codes, with one scale for each block.

Symmetric absmax rounding: with ``m = 2^(bits−1) − 1`` and ``s = max|x| / m`` over a block, rounded to
bfloat16, the code of x is ``round(x / s)`` in −m…m. Rounding is idempotent: the largest code of a rounded
block is m again (bfloat16 moves s by at most 2⁻⁹, and 127 · 2⁻⁹ < ½), and ``m · s`` is exact in float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BLOCK = 64


def rounded(values: Tensor, bits: int) -> Tensor:
    """Return values as they are after storage in 32, 16 (bfloat16), 8 or 4 bits, in their own dtype."""
    return unpack("", pack("", values, bits), bits, values)


def pack(name: str, values: Tensor, bits: int) -> dict[str, Tensor]:
    """Return the tensors that store a vector in ``bits`` bits, by name.

    Args:
        name: the vector's name in the checkpoint.
        values: ``(n,)``.
        bits: 32 (the values as they are) or 16 (bfloat16), stored as one tensor ``name``; 8 or 4, stored as
            ``name.codes`` and ``name.scales``.
    """
    if bits in (4, 8):
        codes, scales = encode(values, bits)
        return {f"{name}.codes": codes, f"{name}.scales": scales}
    return {name: values.bfloat16() if bits == 16 else values}


def unpack(name: str, packed: Mapping[str, Tensor], bits: int, like: Tensor) -> Tensor:
    """Return the vector that :func:`pack` stored, with as many values as ``like`` has and in its dtype.

    Args:
        name: the vector's name in the checkpoint.
        packed: the stored tensors, of this vector and possibly of others.
        bits: as for :func:`pack`.
        like: a tensor ``(n,)``.
    """
    if bits in (4, 8):
        return decode(packed[f"{name}.codes"], packed[f"{name}.scales"], bits, like)
    return packed[name].to(like.dtype)


def encode(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a vector in 8 or 4 bits.

    Args:
        values: ``(n,)``.
        bits: 8 or 4.

    Returns:
        codes, uint8: one value in each byte, or two 4-bit ones with the first in the low half; and scales,
        bfloat16, one for each block of 64.
    """
    blocks = _blocks(values.float())
    largest = 2 ** (bits - 1) - 1
    scales = (blocks.abs().amax(1, keepdim=True) / largest).bfloat16()
    unit = torch.where(scales == 0, 1.0, scales.float())
    integers = (blocks / unit).round().clamp(-largest, largest).flatten()[: len(values)]
    codes = (integers + largest).to(torch.uint8)
    if bits == 4:
        pairs = torch.cat([codes, codes.new_zeros(len(codes) % 2)]).view(-1, 2)
        codes = pairs[:, 0] + (pairs[:, 1] << 4)
    return codes, scales.flatten()


def decode(codes: Tensor, scales: Tensor, bits: int, like: Tensor) -> Tensor:
    """Return the values that codes stand for: as many as ``like`` has, in its dtype."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=1).flatten()
    largest = 2 ** (bits - 1) - 1
    integers = _blocks(codes[: len(like)].float() - largest)
    return (integers * scales.float()[:, None]).flatten()[: len(like)].to(like.dtype)


def _blocks(values: Tensor) -> Tensor:
    """The vector cut into rows of one block each, padded with zeros."""
    missing = -len(values) % BLOCK
    return torch.nn.functional.pad(values, (0, missing)).view(-1, BLOCK)
