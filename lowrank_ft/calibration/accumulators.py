"""Statistics that a backward pass accumulates for one layer: one small class for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from lowrank_ft.calibration.statistics import Moments, rows_of
from lowrank_ft.errors import TargetError
from lowrank_ft.modules.layer import Layer


@dataclass
class Arrival:
    """The gradient that arrived at a layer's output for one batch, beside the layer's input.

    Attributes:
        layer: the layer.
        x: its input, ``(batch, tokens, in)`` or as the layer takes it.
        gradient: of the loss at its output, ``(batch, tokens, out)`` or in the shape of the output.
        mask: ``(batch, tokens)``, true where a position is real; None if all positions are.
    """

    layer: Layer
    x: Tensor
    gradient: Tensor
    mask: Tensor | None

    @cached_property
    def rows(self) -> Tensor:
        """The gradient as rows ``(positions, out)``, padding left out."""
        return rows_of(self.layer, self.layer.output_rows(self.gradient), self.mask)

    @cached_property
    def inputs(self) -> Tensor:
        """The input as rows ``(positions, in)``, padding left out."""
        return rows_of(self.layer, self.layer.rows(self.x), self.mask)


class Accumulator(Protocol):
    """Sums up one statistic of one layer."""

    def add(self, arrival: Arrival) -> None:
        """Add one batch."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the statistic by quantity (see :class:`~lowrank_ft.calibration.statistics.SiteStatistics`).

        Args:
            name: the layer's, for errors.
        """


def accumulators_of(layer: Layer, parts: Sequence[int], fisher: bool, weighted: bool) -> list[Accumulator]:
    """Return the accumulators of a layer, one for each statistic.

    Args:
        layer: the layer.
        parts: how many of its outputs are queries, keys and values; empty unless it computes all three.
        fisher: whether to add row and column means of the weight's squared gradients.
        weighted: whether to add the input's second moment with tokens weighted by their squared gradient.
    """
    accumulators: list[Accumulator] = [OutputMoment(layer)]
    if parts:
        accumulators.append(HeadMoments(parts))
    if weighted and layer.kind in ("linear", "transposed-linear"):
        accumulators.append(WeightedInput(layer))
    if fisher and layer.kind != "embedding":
        accumulators.append(FisherMeans())
    return accumulators


class OutputMoment:
    """``G``; for a layer with more outputs than inputs, ``Wᵀ G W`` and the diagonal of G instead."""

    def __init__(self, layer: Layer) -> None:
        self.moments = Moments(min(layer.out_features, layer.in_features))
        self.is_tall = layer.out_features > layer.in_features
        self.diagonal: Tensor | None = None

    def add(self, arrival: Arrival) -> None:
        """Add the gradient's second moment."""
        rows = arrival.rows
        if self.is_tall:
            squares = rows.square().sum(0, dtype=torch.float64)
            self.diagonal = squares if self.diagonal is None else self.diagonal + squares
            rows = rows @ arrival.layer.matrix()
        self.moments.add(rows)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return ``G``, or ``WtGW`` and ``G_diagonal``.

        Raises:
            TargetError: no gradient ever arrived.
        """
        if self.moments.tokens == 0:
            raise TargetError(
                f"The output of {name} does not reach the loss, so its errors cannot be weighed. "
                f"Exclude it, or pass a loss= that depends on it."
            )
        moment = self.moments.second(name)
        if self.diagonal is None:
            return {"G": moment}
        return {"WtGW": moment, "G_diagonal": self.diagonal / self.moments.tokens}


class HeadMoments:
    """``G_q`` and ``G_k`` of a layer that computes queries, keys and values at once.

    Such a layer has more outputs than inputs, so :class:`OutputMoment` does not keep its whole G.
    """

    def __init__(self, parts: Sequence[int]) -> None:
        self.parts = list(parts)
        self.queries, self.keys = Moments(parts[0]), Moments(parts[1])

    def add(self, arrival: Arrival) -> None:
        """Add the second moments of the queries' and of the keys' gradients."""
        queries, keys, _ = torch.split(arrival.rows, self.parts, -1)
        self.queries.add(queries)
        self.keys.add(keys)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return ``G_q`` and ``G_k``."""
        return {"G_q": self.queries.second(name), "G_k": self.keys.second(name)}


class WeightedInput:
    """``C_weighted``: the input's second moment, each token weighted by its squared gradient."""

    def __init__(self, layer: Layer) -> None:
        self.moments = Moments(layer.in_features)
        self.weight = 0.0

    def add(self, arrival: Arrival) -> None:
        """Add the input's rows, each multiplied by the norm of its gradient."""
        gradient = arrival.rows
        norms = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).norm(dim=1, keepdim=True)
        self.moments.add(arrival.inputs * norms)
        self.weight += float(norms.square().sum(dtype=torch.float64))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return ``C_weighted``, the mean over tokens weighted by their squared gradients."""
        # second() divides by the number of tokens; the mean over weights divides by their sum.
        mean = self.moments.tokens / max(self.weight, 1e-300)
        return {"C_weighted": self.moments.second(name) * mean}


class FisherMeans:
    """Row and column means of the weight's squared gradient, with one gradient for each sequence."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.columns: Tensor | None = None

    def add(self, arrival: Arrival) -> None:
        """Add each sequence's squared gradient."""
        gradient, x = arrival.gradient, arrival.x
        if arrival.mask is not None and arrival.mask.shape == gradient.shape[:-1]:
            gradient = gradient * arrival.mask[..., None].to(gradient)
        sequences = gradient.shape[0] if gradient.dim() > 2 else 1
        for g, inputs in zip(
            gradient.reshape(sequences, -1, gradient.shape[-1]),
            x.reshape(sequences, -1, x.shape[-1]),
            strict=True,
        ):
            square = (g.T @ inputs).square_()
            rows, columns = square.mean(1, dtype=torch.float64), square.mean(0, dtype=torch.float64)
            self.rows = rows if self.rows is None else self.rows + rows
            self.columns = columns if self.columns is None else self.columns + columns

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return ``fisher_rows`` and ``fisher_columns``; an empty dict if no gradient arrived."""
        if self.rows is None or self.columns is None:
            return {}
        return {"fisher_rows": self.rows, "fisher_columns": self.columns}
