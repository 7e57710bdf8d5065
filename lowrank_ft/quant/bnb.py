"""bitsandbytes' formats, by its functions for quantising and dequantising; its layers are not used.

Its layers are not safe on a CPU: ``dequantize_4bit`` is wrong if a row is not a multiple of the block,
``Linear4bit`` in eval mode repacks its weight in place on processors with AVX512-BF16, and it rejects widths
that are not multiples of 32. Here every call gets a matrix with one block a row, and this package owns the
packed tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_ft.errors import ConfigError
from lowrank_ft.quant.rounding import Feedback
from lowrank_ft.quant.storage import Shape, Storage, Tensors, finite, in_blocks

NESTED_BLOCK = 256  # scales that share a scale of their own, in bitsandbytes' double quantisation


class FourBitStorage(Storage):
    """nf4 and fp4, with scales in float32 or quantised again to bitsandbytes' dynamic eight-bit map.

    A byte holds two codes, the first in the high half. In double quantisation the mean of the scales is
    subtracted first.
    """

    def shapes(self, rows: int, columns: int) -> dict[str, Shape]:
        """Return ``codes`` and ``scales``, and for double quantisation ``supers`` and ``offset``."""
        s = self.scheme
        blocks = -(-rows * columns // s.block)
        codes = Shape((blocks * s.block // 2,), torch.uint8)
        if s.scale_bits == 32:
            return {"codes": codes, "scales": Shape((blocks,), torch.float32)}
        return {
            "codes": codes,
            "scales": Shape((blocks,), torch.uint8),
            "supers": Shape((-(-blocks // NESTED_BLOCK),), torch.float32),
            "offset": Shape((1,), torch.float32),
        }

    def pack(self, matrix: Tensor, feedback: Feedback | None = None) -> Tensors:
        """Quantise a matrix (see :meth:`Storage.pack`).

        Raises:
            ConfigError: feedback, which bitsandbytes' rounding does not support.
        """
        F_ = _functional()
        blocks = _blocks(matrix, self.scheme.block, feedback)
        codes, state = F_.quantize_4bit(
            blocks,
            blocksize=self.scheme.block,
            quant_type=_TYPES[self.scheme.codebook],
            compress_statistics=self.scheme.scale_bits == 8,
        )
        tensors = {"codes": codes.flatten(), "scales": state.absmax.flatten()}
        if self.scheme.scale_bits == 8:
            tensors |= {"supers": state.state2.absmax.flatten(), "offset": state.offset.float().reshape(1)}
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> Tensor:
        """Return some rows (see :meth:`Storage.unpack`)."""
        s, F_ = self.scheme, _functional()
        first, last = start * columns, stop * columns
        low, high = first // s.block, -(-last // s.block)
        state = F_.QuantState(
            absmax=self.block_scales(tensors)[low:high].contiguous(),
            shape=torch.Size((high - low, s.block)),
            code=F_.get_4bit_type(_TYPES[s.codebook], device=tensors["codes"].device, blocksize=s.block),
            blocksize=s.block,
            quant_type=_TYPES[s.codebook],
            dtype=torch.float32 if dtype == torch.float64 else dtype,
        )
        packed = tensors["codes"][low * s.block // 2 : high * s.block // 2, None].contiguous()
        flat: Tensor = F_.dequantize_4bit(packed, state).flatten().to(dtype)
        return flat[first - low * s.block : last - low * s.block].view(stop - start, columns)

    def block_scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the scales of all blocks after storage, float32."""
        if self.scheme.scale_bits == 32:
            return tensors["scales"]
        code = _functional().create_dynamic_map().to(tensors["scales"].device)
        index = torch.arange(len(tensors["scales"]), device=code.device) // NESTED_BLOCK
        scales: Tensor = code[tensors["scales"].int()] * tensors["supers"][index] + tensors["offset"]
        return scales


class Int8Storage(Storage):
    """LLM.int8()'s format: the codes of a row are ``round(127 w / max|w|)`` (Dettmers et al. 2022)."""

    def shapes(self, rows: int, columns: int) -> dict[str, Shape]:
        """Return ``codes`` and ``scales``."""
        return {"codes": Shape((rows, columns), torch.int8), "scales": Shape((rows,), torch.float32)}

    def pack(self, matrix: Tensor, feedback: Feedback | None = None) -> Tensors:
        """Quantise a matrix (see :meth:`Storage.pack`)."""
        W = _blocks(matrix, matrix.shape[1], feedback)
        scales = W.abs().amax(1)
        unit = torch.where(scales == 0, 1.0, scales)[:, None]
        return {"codes": (W * (127.0 / unit)).round().to(torch.int8), "scales": scales}

    def unpack(
        self, tensors: Mapping[str, Tensor], columns: int, start: int, stop: int, dtype: torch.dtype
    ) -> Tensor:
        """Return some rows (see :meth:`Storage.unpack`)."""
        scales = tensors["scales"][start:stop, None] / 127.0
        return (tensors["codes"][start:stop] * scales).to(dtype)


_TYPES = {"nf": "nf4", "fp4": "fp4"}


def _functional() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as error:
        raise ConfigError(
            f"library='bitsandbytes' needs bitsandbytes ({error}): pip install 'lowrank_ft[bnb]', or use "
            f"library='torch'."
        ) from error
    return functional


def _blocks(matrix: Tensor, block: int, feedback: Feedback | None) -> Tensor:
    """Return the matrix in float32 with one block a row, after checking that it can be packed."""
    if feedback is not None:
        raise ConfigError("bitsandbytes rounds to nearest: use library='torch' for rounding='feedback'.")
    return in_blocks(finite(matrix), block)
