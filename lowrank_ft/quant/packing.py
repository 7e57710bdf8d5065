"""Codes of 2, 3, 4 or 8 bits, packed into bytes without gaps: a 3-bit code takes three bits.

Four 2-bit codes, or two 4-bit ones, share a byte, the first in the low bits; eight 3-bit codes share three
bytes, little-endian. A table has the weights of every byte (or 12-bit word), so that one lookup yields
several weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 8  # a group of this many codes fills whole bytes, whatever the number of bits


def packed_size(count: int, bits: int) -> int:
    """Return how many bytes ``count`` codes take, after padding to a multiple of :data:`GROUP`."""
    return -(-count // GROUP) * bits


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return codes packed, uint8.

    Args:
        codes: ``(n,)``, integers below ``2^bits``.
        bits: 2, 3, 4 or 8.
    """
    codes = F.pad(codes.to(torch.uint8), (0, -codes.numel() % GROUP))
    if bits == 8:
        return codes
    if bits == 3:
        c = codes.view(-1, 8).int()
        word = sum((c[:, i] << (3 * i) for i in range(8)), torch.zeros_like(c[:, 0]))
        return torch.stack([word & 255, (word >> 8) & 255, word >> 16], 1).to(torch.uint8).flatten()
    each = 8 // bits
    c = codes.view(-1, each)
    byte = torch.zeros_like(c[:, 0])
    for i in range(each):
        byte |= c[:, i] << (bits * i)
    return byte


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Return all codes in ``packed``, uint8, padding included."""
    if bits == 8:
        return packed
    return look_up(packed, torch.arange(2**bits, device=packed.device), bits).flatten().to(torch.uint8)


def look_up(packed: Tensor, levels: Tensor, bits: int) -> Tensor:
    """Return the level of every code in ``packed``, in the dtype of the levels, ``(words, per word)``."""
    if bits == 8:
        return levels[packed.int()][:, None]
    if bits == 3:
        b = packed.view(-1, 3).int()
        words = torch.stack([b[:, 0] | (b[:, 1] & 15) << 8, b[:, 1] >> 4 | b[:, 2] << 4], 1).flatten()
    else:
        words = packed.int()
    return F.embedding(words, _table(levels, bits))


def _table(levels: Tensor, bits: int) -> Tensor:
    """The levels of each word's codes: ``(256, 8/bits)``, or for 3 bits ``(4096, 4)``."""
    each = 4 if bits == 3 else 8 // bits
    word = torch.arange(2 ** (bits * each), device=levels.device)
    return torch.stack([levels[(word >> (bits * i)) & (2**bits - 1)] for i in range(each)], 1)
