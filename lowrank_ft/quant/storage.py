"""The storage protocol: pack a matrix into tensors, unpack some of its rows, and count the bytes.

This file is pure torch and the oracle in the tests of every other storage. Packed tensors are ordinary uint8
and float tensors, so that they shard, cast and save like any others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowrank_ft.errors import NonFiniteError
from lowrank_ft.quant import codebooks, cpu
from lowrank_ft.quant.packing import GROUP, look_up, pack_codes, packed_size, unpack_codes
from lowrank_ft.quant.rounding import Feedback
from lowrank_ft.quant.scheme import Scheme

Tensors = dict[str, Tensor]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Shape(NamedTuple):
    """Size and dtype of one packed tensor."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Bytes that the tensor takes."""
        return math.prod(self.size) * self.dtype.itemsize


class Storage(ABC):
    """One format for a quantised matrix, ``rows × columns``.

    Attributes:
        scheme: the parameters of the format.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    @abstractmethod
    def shapes(self, rows: int, columns: int) -> dict[str, Shape]:
        """Return the packed tensors' names, sizes and dtypes, without allocating anything."""

    @abstractmethod
    def pack(self, matrix: Tensor, feedback: Feedback | None = None) -> Tensors:
        """Quantise a matrix.

        Args:
            matrix: ``(rows, columns)``, any float dtype; converted to float32.
            feedback: compensates for rounding errors in later columns; None rounds to nearest.

        Raises:
            NonFiniteError: NaN or infinite entries.
        """

    @abstractmethod
    def unpack(
        self, tensors: Mapping[str, Tensor], columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> Tensor:
        """Return rows ``start … stop`` of the matrix, ``(stop − start, columns)``, in ``dtype``."""

    def bytes(self, rows: int, columns: int) -> int:
        """Return how many bytes the packed tensors of a matrix take."""
        return sum(shape.bytes for shape in self.shapes(rows, columns).values())


class BlockStorage(Storage):
    """Blocks of codes with a scale each, by LQ-LoRA's double quantisation (arXiv 2311.12023, section 3.2).

    The flattened matrix is cut into blocks of ``B₀`` weights; the last block is padded with zeros. A block's
    scale is its largest magnitude (for signed codebooks, that entry with its sign). The smallest scale of the
    matrix (``offset``) is subtracted from all; the results are rounded to ``b₁`` bits, evenly from 0 to the
    largest of each ``B₁`` of them (``supers``, in ``b₂`` bits). In signed scales one bit is the sign. Weights
    are divided by the scales after rounding.
    """

    def shapes(self, rows: int, columns: int) -> dict[str, Shape]:
        """Return ``codes``, ``scales``, ``levels``, and for double quantisation ``supers`` and ``offset``."""
        s = self.scheme
        blocks = -(-rows * columns // s.block)
        shapes = {
            "codes": Shape((packed_size(blocks * s.block, s.bits),), torch.uint8),
            "levels": Shape((2**s.bits,), torch.float32),
        }
        if s.scale_bits == 32:
            return {**shapes, "scales": Shape((blocks,), torch.float32)}
        return {
            **shapes,
            "scales": Shape((packed_size(blocks, s.scale_bits),), torch.uint8),
            "supers": Shape((-(-blocks // s.scale_block),), _DTYPES[s.scale_dtype]),
            "offset": Shape((1,), torch.float32),
        }

    def pack(self, matrix: Tensor, feedback: Feedback | None = None) -> Tensors:
        """Quantise a matrix (see :meth:`Storage.pack`)."""
        s = self.scheme
        W = finite(matrix)
        blocks = in_blocks(W, s.block)
        tensors = self._pack_scales(_scales_of(blocks, s.is_signed))
        scales = self.block_scales(tensors, 0, len(blocks))[:, None]
        levels = codebooks.levels_of(s.codebook, s.bits, s.block).to(W.device)
        unit = torch.where(scales == 0, 1.0, scales)
        if s.codebook == "fitted":
            weights = scales.square().expand_as(blocks)
            levels = codebooks.fitted(blocks / unit, weights, levels)
        if feedback is None:
            codes = nearest(blocks / unit, levels).flatten()
        else:
            scale_of_each = unit.expand_as(blocks).flatten()[: W.numel()].view_as(W)
            codes = feedback.codes(W, scale_of_each, levels).flatten()
            zero = int(nearest(levels.new_zeros(1), levels))
            codes = F.pad(codes, (0, blocks.numel() - codes.numel()), value=zero)
        return {"codes": pack_codes(codes, s.bits), "levels": levels, **tensors}

    def unpack(
        self, tensors: Mapping[str, Tensor], columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> Tensor:
        """Return some rows (see :meth:`Storage.unpack`)."""
        s = self.scheme
        first, last = start * columns, stop * columns
        low, high = first // s.block, -(-last // s.block)
        width = s.block * s.bits // 8
        codes, scales = tensors["codes"][low * width : high * width], self.block_scales(tensors, low, high)
        if cpu.reads(codes):
            values = cpu.unpack(codes, tensors["levels"], scales, s.bits, s.block)
        else:
            values = look_up(codes, tensors["levels"], s.bits).view(-1, s.block) * scales[:, None]
        flat = values.flatten()[first - low * s.block : last - low * s.block]
        return flat.view(stop - start, columns).to(dtype)

    def block_scales(self, tensors: Mapping[str, Tensor], low: int, high: int) -> Tensor:
        """Return the scales of blocks ``low`` to ``high − 1`` after storage, float32."""
        s = self.scheme
        if s.scale_bits == 32:
            return tensors["scales"][low:high]
        start, stop = low // GROUP, -(-high // GROUP)  # whole groups, since codes can straddle bytes
        codes = unpack_codes(tensors["scales"][start * s.scale_bits : stop * s.scale_bits], s.scale_bits)
        codes = codes[low - start * GROUP : high - start * GROUP]
        if cpu.reads(codes):
            supers = tensors["supers"].float()
            return cpu.read_scales(codes, supers, tensors["offset"], self._largest, s.scale_block, low)
        index = torch.arange(low, high, device=codes.device) // s.scale_block
        steps = tensors["supers"].float()[index] / self._largest
        magnitude = (codes & self._largest) * steps + tensors["offset"]
        return torch.where(codes > self._largest, -magnitude, magnitude) if s.is_signed else magnitude

    def read_scales(self, scales: Tensor) -> Tensor:
        """Return scales as they are after storage."""
        return self.block_scales(self._pack_scales(scales), 0, len(scales))

    def _pack_scales(self, scales: Tensor) -> Tensors:
        s = self.scheme
        if s.scale_bits == 32:
            return {"scales": scales}
        magnitude = scales.abs()
        offset = magnitude.min()
        excess = in_blocks(magnitude - offset, s.scale_block)
        supers = excess.amax(1).to(_DTYPES[s.scale_dtype])
        unit = torch.where(supers == 0, 1.0, supers.float())[:, None]
        steps = (excess / unit * self._largest).round().clamp(0, self._largest).flatten()[: scales.numel()]
        codes = steps.to(torch.uint8)
        if s.is_signed:
            codes = torch.where(scales < 0, codes + self._largest + 1, codes)
        return {"scales": pack_codes(codes, s.scale_bits), "supers": supers, "offset": offset[None]}

    @property
    def _largest(self) -> int:
        """The largest code of a scale's magnitude."""
        return int(2 ** (self.scheme.scale_bits - self.scheme.is_signed)) - 1


def nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Return the index of the level nearest to each value; of two equally near, the lower."""
    cuts = (levels[1:] + levels[:-1]) / 2
    if len(cuts) > 16:
        return torch.bucketize(values, cuts)
    codes = torch.zeros_like(values, dtype=torch.uint8)  # a few comparisons are faster than a search
    for cut in cuts.tolist():
        codes += values > cut
    return codes


def finite(matrix: Tensor) -> Tensor:
    """Return a matrix that is to be quantised, in float32.

    Raises:
        NonFiniteError: NaN or infinite entries.
    """
    values = matrix.detach().float()
    if not torch.isfinite(values).all():
        raise NonFiniteError("A weight to be quantised has NaN or infinite entries.")
    return values


def in_blocks(values: Tensor, block: int) -> Tensor:
    """Return the flattened values as a matrix of one block a row, the last one padded with zeros."""
    flat = values.flatten()
    return F.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _scales_of(blocks: Tensor, signed: bool) -> Tensor:
    if not signed:
        return blocks.abs().amax(1)
    return blocks.gather(1, blocks.abs().argmax(1, keepdim=True))[:, 0]
