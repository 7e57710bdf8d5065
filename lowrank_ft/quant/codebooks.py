"""Codebooks: the sorted levels in −1…1 that a weight, divided by its block's scale, is rounded to.

* ``nf``: quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314, section 3; the general
  k of Guo et al. 2024, arXiv 2311.12023, appendix A). A block's scale is its largest magnitude.
* ``fp4``: bitsandbytes' four-bit float.
* ``signed``: a block's scale is its entry of the largest magnitude *with its sign*, so that entry becomes 1
  and −1 needs no level. 0 and 1 are levels; the others minimise the squared error of blocks of normally
  distributed weights (after Blumenberg et al. 2025, arXiv 2505.06653, BOF4-S).
* ``fitted``: signed as well, but the levels minimise the squared error of the matrix that is quantised.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lowrank_ft.errors import ConfigError

NF_OFFSET = 0.9677083  # δ: the quantile of the largest level, from bitsandbytes
FP4 = (0.0, 0.0052083333, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0)
# Cells of −1…1 for densities and histograms. Sums are interpolated between cells, so levels are finer.
_CELLS = 8192


def levels_of(name: str, bits: int, block: int) -> Tensor:
    """Return a codebook by name: ``(2^bits,)``, float32, ascending; for ``fitted``, its starting point.

    Raises:
        ConfigError: there is no such codebook with this number of bits.
    """
    if name == "nf":
        return normal_float(bits)
    if name in ("signed", "fitted"):
        return signed(bits, block)
    if name == "fp4" and bits == 4:
        positive = torch.tensor(FP4)
        return torch.cat([-positive.flip(0), positive])
    raise ConfigError(f"There is no codebook {name!r} of {bits} bits.")


def normal_float(bits: int) -> Tensor:
    """Return NF-k: quantiles of a normal distribution, divided by the largest.

    The probabilities are ``linspace(1−δ, ½, 2^(k−1))`` and ``linspace(½, δ, 2^(k−1)+1)``, with ½ once.
    """
    left = torch.linspace(1 - NF_OFFSET, 0.5, 2 ** (bits - 1), dtype=torch.float64)
    right = torch.linspace(0.5, NF_OFFSET, 2 ** (bits - 1) + 1, dtype=torch.float64)
    quantiles = torch.special.ndtri(torch.cat([left[:-1], right]))
    quantiles[2 ** (bits - 1) - 1] = 0.0  # ½ exactly
    levels: Tensor = quantiles / quantiles[-1]
    return levels.float()


@functools.cache
def signed(bits: int, block: int) -> Tensor:
    """Return the codebook for blocks of ``block`` normal entries, divided by their signed largest entry.

    A block's largest magnitude m has the density ``∝ φ(m) (2Φ(m)−1)^(B−1)``; the other entries x are normal,
    truncated at ±m, and errors are scaled by m². So ``u = x / m`` has the weight
    ``p(u) ∝ ∫ m³ φ(m) φ(um) (2Φ(m)−1)^(B−2) dm``; Lloyd's algorithm fits the levels to it, 0 and 1 fixed.
    """
    u = _centers()
    m = torch.linspace(0, 8, 801, dtype=torch.float64)[1:]
    inside = torch.special.erf(m / math.sqrt(2))
    weight = m**3 * torch.exp(-m * m / 2) * inside ** (max(block, 2) - 2)
    density = torch.exp(-0.5 * (u[:, None] * m) ** 2) @ weight
    return lloyd(density / density.sum(), _start(density, bits), held=(0.0, 1.0)).float()


def fitted(values: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """Return levels that minimise the weighted squared error of values in −1…1.

    Args:
        values: normalised weights, any shape.
        weights: how much each value's squared error counts, of the same shape.
        start: levels to start from.
    """
    cells = ((values.flatten().double() + 1) * (_CELLS / 2)).long().clamp(0, _CELLS - 1)
    mass = torch.zeros(_CELLS, dtype=torch.float64, device=values.device)
    mass.index_add_(0, cells, weights.flatten().double())
    total = float(mass.sum())
    if total == 0:
        return start
    levels = lloyd(mass.cpu() / total, start.double().cpu()).to(values.device)
    return _means(values.flatten().double(), weights.flatten().double(), levels).float()


def _means(values: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Return the exact mean of the values nearest to each level; the histogram rounds them to its cells."""
    nearest = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
    mass, moment = (torch.zeros_like(levels).index_add_(0, nearest, w) for w in (weights, weights * values))
    return torch.where(mass > 0, moment / mass.clamp_min(1e-300), levels)


def lloyd(mass: Tensor, levels: Tensor, held: tuple[float, ...] = (), sweeps: int = 200) -> Tensor:
    """Return levels such that each is the mean of the mass nearest to it (Lloyd 1982).

    Args:
        mass: the mass of each cell of −1…1, ``(_CELLS,)``, float64.
        levels: levels to start from, ascending.
        held: levels that must not move.
        sweeps: the largest number of iterations.
    """
    u = _centers()
    edges = torch.linspace(-1, 1, _CELLS + 1, dtype=torch.float64)
    below = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    moment = torch.cat([mass.new_zeros(1), (mass * u).cumsum(0)])
    fixed = torch.isin(levels, torch.tensor(held, dtype=levels.dtype))
    for _ in range(sweeps):
        cuts = torch.cat([edges[:1], (levels[1:] + levels[:-1]) / 2, edges[-1:]])
        inside = _at(edges, below, cuts).diff()
        means = _at(edges, moment, cuts).diff() / inside.clamp_min(1e-300)
        moved = torch.where(fixed | (inside <= 0), levels, means).sort().values
        if float((moved - levels).abs().max()) < 1e-9:
            break
        levels = moved
    return levels


def _start(density: Tensor, bits: int) -> Tensor:
    """Return levels to start from: −x, 0, x and 1, with x spaced by ``p^⅓`` (Panter and Dite 1951)."""
    side = 2 ** (bits - 1) - 1
    u = _centers()
    cumulative = density[u > 0].pow(1 / 3).cumsum(0)
    quantiles = (torch.arange(side, dtype=torch.float64) + 0.5) / (side + 0.5) * cumulative[-1]
    positive = u[u > 0][torch.searchsorted(cumulative, quantiles).clamp_max(len(cumulative) - 1)]
    return torch.cat([-positive.flip(0), positive.new_zeros(1), positive, positive.new_ones(1)])


def _centers() -> Tensor:
    return (torch.arange(_CELLS, dtype=torch.float64) + 0.5) * (2 / _CELLS) - 1


def _at(grid: Tensor, values: Tensor, points: Tensor) -> Tensor:
    """Interpolate values on an even grid linearly at points."""
    position = (points - grid[0]) / (grid[1] - grid[0])
    index = position.floor().long().clamp(0, len(grid) - 2)
    return torch.lerp(values[index], values[index + 1], position - index)
