"""Small vectors in few bits: blocks of codes, and a scale for each.

Symmetric absmax rounding: with ``m = 2^(bits−1) − 1`` and ``s = max|x| / m`` over a block, rounded to
bfloat16, the code of x is ``round(x / s)`` in −m…m. Rounding twice is rounding once: the largest code of a
block is m again (bfloat16 moves s by at most 2⁻⁹, and 127 · 2⁻⁹ < ½), and ``m · s`` is exact in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64


def rounded(values: Tensor, bits: int) -> Tensor:
    """Return values as they are after storage in 32, 16 (bfloat16), 8 or 4 bits, in their own dtype."""
    if bits == 32:
        return values
    if bits == 16:
        return values.bfloat16().to(values.dtype)
    return decode(*encode(values, bits), bits, values)


def encode(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a vector in 8 or 4 bits.

    Args:
        values: ``(n,)``.
        bits: 8 or 4.

    Returns:
        codes, uint8: one for each value, or for two of them, the first in the low half; and scales, bfloat16,
        one for each block of 64.
    """
    blocks = _blocks(values.float())
    largest = 2 ** (bits - 1) - 1
    scales = (blocks.abs().amax(1, keepdim=True) / largest).bfloat16()
    unit = torch.where(scales == 0, 1.0, scales.float())
    codes = (blocks / unit).round().clamp(-largest, largest).flatten()[: len(values)]
    whole = (codes + largest).to(torch.uint8)
    if bits == 4:
        whole = torch.cat([whole, whole.new_zeros(len(whole) % 2)]).view(-1, 2)
        whole = whole[:, 0] + (whole[:, 1] << 4)
    return whole, scales.flatten()


def decode(codes: Tensor, scales: Tensor, bits: int, like: Tensor) -> Tensor:
    """Return the values of codes: as many as ``like`` has, in its dtype."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=1).flatten()
    largest = 2 ** (bits - 1) - 1
    whole = _blocks(codes[: len(like)].float() - largest)
    return (whole * scales.float()[:, None]).flatten()[: len(like)].to(like.dtype)


def _blocks(values: Tensor) -> Tensor:
    """The vector cut into rows of one block each, padded with zeros."""
    missing = -len(values) % BLOCK
    return torch.nn.functional.pad(values, (0, missing)).view(-1, BLOCK)
