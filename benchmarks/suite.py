"""What a suite is: jobs to do, a function that measures one, and tables made of the rows."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import suites
from benchmarks.tables import Plot, Table

Key = Mapping[str, Any]  # what identifies a job or a row: names, and strings or numbers
Figures = Mapping[str, Any]  # what was measured
Measured = Iterator[tuple[Key, Figures]]  # what tells a row from the job's other rows, and its figures


@dataclass(frozen=True)
class Row:
    """One line of a results file: its key, which begins with its job's, its figures, and the setting."""

    key: Key
    figures: Figures
    setting: Key = field(default_factory=dict)  # torch's version, threads, device

    def __getitem__(self, name: str) -> Any:
        return self.key[name] if name in self.key else self.figures[name]

    def get(self, name: str) -> Any:
        """Return a part of the key or a figure; None where the row has none of that name."""
        return self.key.get(name, self.figures.get(name))

    def belongs_to(self, job: Key) -> bool:
        """Whether the row is one of a job's."""
        return all(name in self.key and self.key[name] == part for name, part in job.items())


@dataclass(frozen=True)
class Lab:
    """Where a suite runs, and whether one row is wanted at a tiny cost, whatever it says."""

    assets: Path = Path(".cache/assets")  # models and data, see scripts/prepare_assets.py
    cache: Path = Path(".cache/benchmarks")  # calibration statistics, and models that a suite makes
    device: str = "cpu"
    quick: bool = False

    def size(self, usual: int, quick: int) -> int:
        """Return how many steps, samples or rounds to make."""
        return quick if self.quick else usual


@dataclass(frozen=True)
class Suite:
    """What is measured, and how it is shown.

    Attributes:
        jobs: yields the keys of all jobs in order, given the rows so far. The rows grow while it yields, so
            a later job may depend on an earlier result.
        measure: does a job, and yields its rows.
        tables: by name.
        quick: the job that ``--quick`` runs.
        plot: how the rows are drawn.
    """

    jobs: Callable[[Sequence[Row]], Iterable[Key]]
    measure: Callable[[Key, Lab], Measured]
    tables: Mapping[str, Table]
    quick: Key
    plot: Plot | None = None


Parts = Mapping[str, Callable[[Lab], Measured]]


def of_parts(parts: Parts, tables: Mapping[str, Table], quick: str) -> Suite:
    """Return a suite of a few jobs, each with a function of its own; a row's key begins with ``part``."""
    jobs = [{"part": part} for part in parts]
    return Suite(lambda rows: jobs, lambda job, lab: parts[job["part"]](lab), tables, {"part": quick})


def names() -> list[str]:
    """Return the suites there are."""
    return sorted(module.name for module in pkgutil.iter_modules(suites.__path__))


def load(name: str) -> tuple[Suite, str]:
    """Return a suite and its docstring."""
    module = importlib.import_module(f"benchmarks.suites.{name}")
    suite: Suite = module.SUITE
    return suite, (module.__doc__ or "").strip()


def read(path: Path) -> list[Row]:
    """Return the rows of a results file; none where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Row(**json.loads(line)) for line in lines]


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a results file in one write, so that several processes can share one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows]
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))
