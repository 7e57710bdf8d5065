"""Weights in few bits: codebooks, packing, scales, and how each is stored."""

from lowrank_ft.quant.scheme import Scheme
from lowrank_ft.quant.storage import Storage, storage_of

__all__ = ["Scheme", "Storage", "storage_of"]
