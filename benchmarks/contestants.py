"""Contestants: a method, ours or a peer's, the learning rates it is tried at, and how many seeds it gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

import lowrank_ft
from benchmarks.suite import Key, Row
from benchmarks.tables import Score, best_rate


class Wrap(Protocol):
    """Puts a method on a model; ours and the peers' have this one form."""

    def __call__(self, model: nn.Module, seed: int) -> nn.Module:
        """Return the model that trains, ``model`` itself or one around it; the seed sets the start."""
        ...


@dataclass(frozen=True)
class Ours:
    """A method of this package, and the options of ``wrap``, which refuses those that it does not know."""

    method: str
    options: Mapping[str, Any]

    def __call__(self, model: nn.Module, seed: int) -> nn.Module:
        """Wrap the model in place, and return it."""
        return lowrank_ft.wrap(model, self.method, seed=seed, **self.options)


def ours(method: str, **options: Any) -> Ours:
    """Return a method of this package."""
    return Ours(method, options)


@dataclass(frozen=True)
class Contestant:
    """A method; it runs at every rate with the first seed, and at the best of them with the others."""

    wrap: Wrap
    rates: tuple[float, ...]
    seeds: int = 1


Contestants = Mapping[str, Contestant]


def sweep(contestants: Contestants, rows: Sequence[Row], score: Score, shared: Key) -> Iterator[Key]:
    """Yield every contestant's jobs, whose keys begin with ``shared``; the best rate has the lowest score.

    Other seeds come once all rates are done with the first one, perhaps by another process.
    """
    for name, contestant in contestants.items():
        job = {**shared, "method": name}
        yield from ({**job, "seed": 0, "rate": rate} for rate in contestant.rates)
        for seed in range(1, contestant.seeds):
            first = [row for row in rows if row.belongs_to({**job, "seed": 0})]
            if {row["rate"] for row in first} >= set(contestant.rates):
                yield {**job, "seed": seed, "rate": best_rate(first, score)}


def trained_numbers(model: nn.Module) -> int:
    """Return how many numbers are trained, those of a classifier's head left out."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and "classifier" not in name)
