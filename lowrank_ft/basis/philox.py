"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), and the random bases.

The specification, version 1, precise enough for a second implementation (docs/nola.md explains it):

* key: the seed, its low 32 bits first;
* counter: ``(block, index, n, 2 · m + f)``. ``block`` counts runs of elements in a matrix, ``index`` counts
  basis matrices. n is the bits 0–31 and m the bits 32–62 of h, the first eight bytes (little-endian) of the
  SHA-256 of the module's name in UTF-8. f is 0 for the factor A, 1 for B;
* ``rademacher``: the sign of element e of a matrix, counted row by row, is in block ``e // 128``, bit
  ``e % 32`` of word ``e % 128 // 32``; a bit of 0 means +1, a bit of 1 means −1;
* ``uniform``: element e is ``(w >> 8) · 2⁻²³ − 1``, where w is word ``e % 4`` of block ``e // 4``.

This file is the oracle of the compiled kernels, and the implementation where they are not available.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

VERSION = 1

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_AT_ONCE = 1 << 20  # elements drawn at a time, which bounds the memory


@dataclass(frozen=True)
class Stream:
    """All basis matrices of one factor of one layer.

    Attributes:
        seed: an integer of 64 bits.
        name: the module's name in the stock model.
        factor: "A" or "B".
        kind: distribution of the entries.
    """

    seed: int
    name: str
    factor: Literal["A", "B"]
    kind: Literal["rademacher", "uniform"] = "rademacher"

    @property
    def key(self) -> tuple[int, int]:
        """Philox's key."""
        return self.seed & _MASK, self.seed >> 32 & _MASK

    @property
    def tail(self) -> tuple[int, int]:
        """The last two words of the counter."""
        digest = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "little")
        return digest & _MASK, (digest >> 32 << 1 & _MASK) | (self.factor == "B")

    def first_block(self, index: int) -> tuple[int, int, int, int]:
        """Return the four words of the first block of basis matrix ``index``."""
        return philox((0, index, *self.tail), self.key)


class Backend(Protocol):
    """A way to compute with the basis."""

    def combine(self, stream: Stream, coefficients: Tensor, count: int, scale: float) -> Tensor:
        """See :func:`lowrank_ft.basis.combine`."""

    def project(self, stream: Stream, gradient: Tensor, bases: int, scale: float) -> Tensor:
        """See :func:`lowrank_ft.basis.project`."""


Words = tuple[int, int, int, int]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Return one block of Philox4x32-10: four words of 32 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def blocks(stream: Stream, indices: Tensor, count: int) -> Tensor:
    """Return the first ``count`` blocks of basis matrices, ``(len(indices), count, 4)``, words in int64."""
    shape = (len(indices), count)
    c0 = torch.arange(count, device=indices.device).expand(shape)
    c1 = indices[:, None].expand(shape)
    c2, c3 = (torch.full(shape, word, device=indices.device) for word in stream.tail)
    k0, k1 = stream.key
    for _ in range(_ROUNDS):
        (high0, low0), (high1, low1) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _product(words: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a 64-bit product, computed from halves so that int64 does not overflow."""
    low, high = (words & 0xFFFF) * multiplier, (words >> 16) * multiplier
    return (high + (low >> 16)) >> 16, ((high & 0xFFFF) << 16) + low & _MASK


def matrices(stream: Stream, first: int, last: int, count: int, like: Tensor) -> Tensor:
    """Return basis matrices ``first`` to ``last − 1``, flat, ``(last − first, count)``, typed as ``like``."""
    indices = torch.arange(first, last, device=like.device)
    if stream.kind == "uniform":
        words = blocks(stream, indices, -(-count // 4)).flatten(1)[:, :count]
        return (words >> 8).to(like.dtype) * 2.0**-23 - 1
    words = blocks(stream, indices, -(-count // 128))
    bits = words[..., None] >> torch.arange(32, device=like.device) & 1
    return 1 - 2 * bits.flatten(1)[:, :count].to(like.dtype)


def combine(stream: Stream, coefficients: Tensor, count: int, scale: float) -> Tensor:
    """See :func:`lowrank_ft.basis.combine`."""
    total = coefficients.new_zeros(count)
    step = max(1, _AT_ONCE // count)
    for first in range(0, len(coefficients), step):
        part = coefficients[first : first + step]
        for value, matrix in zip(part, matrices(stream, first, first + len(part), count, part), strict=True):
            total += value * matrix
    return total * scale


def project(stream: Stream, gradient: Tensor, bases: int, scale: float) -> Tensor:
    """See :func:`lowrank_ft.basis.project`."""
    step = max(1, _AT_ONCE // len(gradient))
    parts = [
        matrices(stream, first, min(first + step, bases), len(gradient), gradient) @ gradient
        for first in range(0, bases, step)
    ]
    return torch.cat(parts) * scale
