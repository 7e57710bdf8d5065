"""The parameters of a quantised storage format, as plain data, and its bits per weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowrank_ft.errors import ConfigError

CodebookName = Literal["nf", "signed", "fitted", "fp4", "int8"]
ScaleType = Literal["float32", "bfloat16", "float16"]
Library = Literal["torch", "bitsandbytes"]

SCALE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


@dataclass(frozen=True)
class Scheme:
    """Blocks of codes with one scale each; the scales may be quantised in blocks too."""

    codebook: CodebookName = "nf"
    """Levels that weights are rounded to: "nf" (normal float), "signed", "fitted", "fp4", or "int8" (one
    scale a row)."""
    bits: int = 4
    """Bits of a code: 2, 3, 4 or 8."""
    block: int = 64
    """Number of consecutive weights, row by row, that share a scale."""
    scale_bits: int = 8
    """Bits of a scale: 2, 3, 4 or 8 (double quantisation), or 32 for scales in float32."""
    scale_block: int = 256
    """Number of scales that share a second-level scale, in double quantisation."""
    scale_dtype: ScaleType = "float32"
    """Type of the second-level scales."""
    library: Library = "torch"
    """Library that quantises the weights: "torch" (this package) or "bitsandbytes"."""

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8):
            raise ConfigError(f"Codes have 2, 3, 4 or 8 bits, but not {self.bits}.")
        if self.scale_bits not in (2, 3, 4, 8, 32):
            raise ConfigError(f"Scales have 2, 3, 4, 8 or 32 bits, but not {self.scale_bits}.")
        if self.block < 8 or self.block % 8 or self.scale_block < 8 or self.scale_block % 8:
            raise ConfigError(
                f"Blocks are multiples of 8, but block={self.block} and scale_block={self.scale_block}."
            )
        wanted = {"fp4": 4, "int8": 8}.get(self.codebook, self.bits)
        if self.bits != wanted:
            raise ConfigError(f"The codebook {self.codebook!r} has {wanted} bits, not {self.bits}.")
        if self.library == "bitsandbytes":
            self._check_bitsandbytes()
        elif self.codebook == "int8":
            raise ConfigError(
                "Only bitsandbytes stores int8 with one scale a row: set library='bitsandbytes'."
            )

    def _check_bitsandbytes(self) -> None:
        if self.codebook == "int8":
            return
        if self.codebook not in ("nf", "fp4") or self.bits != 4:
            raise ConfigError(
                f"bitsandbytes stores nf and fp4 in 4 bits and int8, but not {self.codebook!r} in "
                f"{self.bits}: use library='torch'."
            )
        if self.block not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise ConfigError(f"bitsandbytes has blocks of 32, 64, … 4096, but not {self.block}.")
        if self.scale_bits not in (8, 32) or self.scale_block != 256 or self.scale_dtype != "float32":
            raise ConfigError(
                "bitsandbytes keeps scales in 32 bits, or in 8 with a float32 for each 256 of them."
            )

    @property
    def bits_per_weight(self) -> float:
        """``b₀ + b₁/B₀ + b₂/(B₀ B₁)``, without padding, offset and codebook (LQ-LoRA, section 3.2)."""
        if self.codebook == "int8":
            return 8.0  # the scale, 32 bits for each row, is left out
        if self.scale_bits == 32:
            return self.bits + 32 / self.block
        scales = SCALE_BITS[self.scale_dtype] / (self.block * self.scale_block)
        return self.bits + self.scale_bits / self.block + scales

    @property
    def is_signed(self) -> bool:
        """Whether a block's scale carries the sign of its largest entry."""
        return self.codebook in ("signed", "fitted")

    @property
    def label(self) -> str:
        """A short name for tables: ``nf3/64``."""
        return f"{self.codebook}{'' if self.codebook in ('fp4', 'int8') else self.bits}/{self.block}"
