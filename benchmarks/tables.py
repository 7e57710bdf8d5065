"""Tables and plots made of rows: a declaration says what makes a line and what its columns are."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.suite import Row

Rows = Sequence["Row"]
Cell = Callable[[Rows], str]  # the text of a cell, of the rows that fall into it
Score = Callable[["Row"], float]  # lower is better
Columns = Mapping[str, Cell | str]  # heading to cell; a string is the format of the figure of that name
Figure = str | Callable[["Row"], Any]  # the name of a figure, or what computes one
MARK = r"(<!-- benchmarks: (\w+) ([\w-]+) -->)"
BLOCK = re.compile(MARK + r"(?:(?!<!-- benchmarks).)*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Table:
    """How rows become a table.

    Attributes:
        by: parts of the key; rows that agree in them make one line.
        columns: in order.
        where: the values that some parts of the key must have.
        across: a part of the key and some of its values: each column whose heading contains ``{`` is repeated
            for every value, the heading formatted with it.
        prepare: what happens to the rows first, such as leaving out all but the best rate.
        order: sorts the lines by their first row; without it they come as they do in the file.
    """

    by: tuple[str, ...]
    columns: Columns
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    across: tuple[str, Sequence[Any]] = ("", ())
    prepare: Callable[[Rows], Rows] = lambda rows: rows
    order: Callable[[Row], Any] = lambda row: 0

    def markdown(self, rows: Rows) -> str:
        """Return the table."""
        own = [row for row in rows if all(row.get(name) in values for name, values in self.where.items())]
        groups = sorted(grouped(self.prepare(own), *self.by), key=lambda group: self.order(group[0]))
        columns: dict[str, Cell] = {}
        for heading, shown in self.columns.items():
            cell = value(heading, shown) if isinstance(shown, str) else shown
            part, values = self.across
            repeated = {heading.format(value): _only(part, value, cell) for value in values}
            columns.update(repeated if "{" in heading else {heading: cell})
        lines = [[*columns], *([cell(group) for cell in columns.values()] for group in groups)]
        texts = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([texts[0], "|---" * len(columns) + "|", *texts[1:]])


def _only(part: str, value: Any, cell: Cell) -> Cell:
    """Return a cell that sees the rows with that value alone; empty where there are none."""
    return lambda rows: cell(own) if (own := [row for row in rows if row[part] == value]) else ""


def grouped(rows: Rows, *names: str) -> list[list[Row]]:
    """Return the rows in groups that agree in some names, in the order of the rows."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in names), []).append(row)
    return list(groups.values())


def value(figure: Figure, form: str = "") -> Cell:
    """Return a cell that shows a figure of the first row that has one."""
    return lambda rows: format(figures[0], form) if (figures := _figures(rows, figure)) else ""


def mean(figure: Figure, form: str = ".3f", *, spread: bool = True) -> Cell:
    """Return a cell that shows the mean, and the standard deviation where there are several rows."""

    def cell(rows: Rows) -> str:
        figures = _figures(rows, figure)
        several = spread and len(figures) > 1
        deviation = f" ± {statistics.stdev(figures):{form}}" if several else ""
        return f"{statistics.mean(figures):{form}}{deviation}" if figures else ""

    return cell


def count(figure: str) -> Cell:
    """Return a cell that says how many rows have a figure."""
    return lambda rows: str(len(_figures(rows, figure)))


def _figures(rows: Rows, figure: Figure) -> list[Any]:
    figures = [figure(row) if callable(figure) else row.get(figure) for row in rows]
    return [value for value in figures if value is not None]


def ordered(part: str, values: Iterable[Any]) -> Callable[[Row], int]:
    """Return an order of lines: that of a part of the key in a sequence."""
    places = list(values)
    return lambda row: places.index(row[part])


def lowest(figure: str) -> Score:
    """Return a score of rows: less is better."""
    return lambda row: float(row[figure])


def highest(figure: str) -> Score:
    """Return a score of rows: more is better."""
    return lambda row: -float(row[figure])


def best_rate(rows: Rows, score: Score) -> float | None:
    """Return the learning rate of the best row with the first seed; None where there is no such row."""
    first = [row for row in rows if row.get("seed") == 0]
    return float(min(first, key=score)["rate"]) if first else None


def at_best_rate(score: Score, *by: str) -> Callable[[Rows], Rows]:
    """Return what keeps, of rows that agree in some names, those at the best rate, and those without one."""

    def prepare(rows: Rows) -> Rows:
        rates = [(group, best_rate(group, score)) for group in grouped(rows, *by)]
        return [row for group, rate in rates for row in group if row.get("rate") in (None, rate)]

    return prepare


@dataclass(frozen=True)
class Plot:
    """How rows become a picture; rows at one place of a line become their mean, with a deviation.

    Attributes:
        file: its name in docs.
        x: what lies along the horizontal axis.
        y: what lies along the vertical axis.
        label: names the line that a row is on; it has one colour.
        axes: what matplotlib's ``Axes.set`` takes.
        by: parts of the key that divide the rows of one name into several lines.
        style: of the line and its marks.
        prepare: chooses the rows.
    """

    file: str
    x: Callable[[Row], float]
    y: Callable[[Row], float]
    label: Callable[[Row], str]
    axes: Mapping[str, Any]
    by: tuple[str, ...] = ()
    style: Callable[[Row], str] = lambda row: "o-"
    prepare: Callable[[Rows], Rows] = lambda rows: rows

    def draw(self, rows: Rows, axes: Any) -> None:
        """Draw the rows on matplotlib's axes."""
        lines: dict[tuple[str, ...], list[Row]] = {}
        for row in self.prepare(rows):
            lines.setdefault((self.label(row), *(row[part] for part in self.by)), []).append(row)
        colours: dict[str, str] = {}
        for (name, *_), line in lines.items():
            label = "_nolegend_" if name in colours else name
            colour = colours.setdefault(name, f"C{len(colours)}")
            points = {x: [self.y(row) for row in line if self.x(row) == x] for x in sorted(map(self.x, line))}
            means = [statistics.mean(y) for y in points.values()]
            errors = [statistics.stdev(y) if len(y) > 1 else 0.0 for y in points.values()]
            look = {"color": colour, "label": label, "ms": 4, "lw": 1, "capsize": 3}
            axes.errorbar(list(points), means, errors, fmt=self.style(line[0]), **look)
        axes.set(**self.axes)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


def rewritten(document: str, table: Callable[[str, str], str]) -> str:
    """Return a document with its tables in ``<!-- benchmarks: SUITE TABLE -->`` … ``<!-- end -->``."""
    return BLOCK.sub(lambda match: f"{match[1]}\n\n{table(match[2], match[3])}\n\n{match[4]}", document)
