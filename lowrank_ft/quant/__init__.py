"""Quantised weights: codebooks, packing of codes, scales, and the storage formats."""

from lowrank_ft.quant.bnb import FourBitStorage, Int8Storage
from lowrank_ft.quant.scheme import Scheme
from lowrank_ft.quant.storage import BlockStorage, Storage

__all__ = ["Scheme", "Storage", "storage_of"]


def storage_of(scheme: Scheme) -> Storage:
    """Return the storage that implements a scheme."""
    if scheme.library == "bitsandbytes":
        return Int8Storage(scheme) if scheme.codebook == "int8" else FourBitStorage(scheme)
    return BlockStorage(scheme)
