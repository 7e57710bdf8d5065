"""What the benchmarks share: common options, and rows in a JSON-lines file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


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
