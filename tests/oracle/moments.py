"""Random matrices in float64 that the oracles share."""

from __future__ import annotations

import torch
from torch import Tensor


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal entries."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(features: int, seed: int, tokens: int = 400) -> Tensor:
    """The second moment of correlated rows."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    rows = torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mix
    return rows.T @ rows / tokens


def symmetric_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
