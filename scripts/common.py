"""What the benchmarks share: common options, and rows in a JSON-lines file."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def parser(doc: str | None, results: Path | None = None) -> argparse.ArgumentParser:
    """Return a parser of the options that every benchmark has.

    Args:
        doc: the script's docstring.
        results: where rows go by default; nowhere by default.
    """
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--assets", type=Path, default=Path(".cache/assets"))
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--results", type=Path, default=results, help="append the rows to this file")
    return found


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows that are there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def append(path: Path | None, rows: Iterable[Mapping[str, Any]], **setting: Any) -> None:
    """Append rows, each with the setting that they share; to no file, nothing."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps({**row, **setting}) + "\n" for row in rows))


def is_done(key: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a row with these values is there."""
    return any(all(row.get(name) == value for name, value in key.items()) for row in rows)


def train(model: nn.Module, batches: Sequence[Mapping[str, Tensor]], rate: float) -> None:
    """Train what trains, one cycle of AdamW over the batches, up to a learning rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=len(batches), pct_start=0.1)
    for batch in batches:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()


def drawn(tokens: Tensor, steps: int, size: int = 4) -> list[dict[str, Tensor]]:
    """Return batches of windows of tokens, to be told on, in an order that is always the same."""
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[: size * steps]
    return [{"input_ids": batch, "labels": batch} for batch in torch.split(tokens[order], size)]


def interleaved(steps: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Time each step once a round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(times: Mapping[str, Sequence[float]], first: str, second: str) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times[first], times[second], strict=True))
