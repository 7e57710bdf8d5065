"""The model card: what a person, and the hub, read first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

CARD = "README.md"

_USE_ADAPTER = """\
```python
import lowrank_ft
from transformers import {loader}

model = {loader}.from_pretrained("{base}")
lowrank_ft.load(model, "path/to/this/directory")
```"""

_USE_MODEL = """\
```python
import lowrank_ft  # not needed where nothing was replaced
from transformers import {loader}

model = {loader}.from_pretrained("path/to/this/directory")
```"""


def write(directory: Path, index: Mapping[str, Any], figures: Mapping[str, Any] | None = None) -> None:
    """Write ``README.md`` from an index and, where a recipe measured any, its figures.

    Args:
        directory: where.
        index: the content of ``lowrank_ft.json``.
        figures: names to values; a nested mapping becomes a table of its own.
    """
    (directory / CARD).write_text(text(index, figures), encoding="utf-8")


def text(index: Mapping[str, Any], figures: Mapping[str, Any] | None = None) -> str:
    """Return the card's Markdown, with the hub's YAML header."""
    from huggingface_hub import ModelCardData

    base = index["base"]
    adapters: Mapping[str, Any] = index.get("adapters", {})
    stages: list[Mapping[str, Any]] = index.get("stages", [])
    methods = sorted({recipe.get("method", "unknown") for recipe in (*stages, *adapters.values())})
    header = ModelCardData(
        base_model=base["name_or_path"] if is_hub_name(base["name_or_path"]) else None,
        library_name="lowrank_ft",
        tags=["lowrank_ft", *methods],
    )
    name = base["name_or_path"] or base["class"]
    is_adapter = index["content"] == "adapters"
    use = (_USE_ADAPTER if is_adapter else _USE_MODEL).format(loader=base["class"], base=name)
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {'Adapter for' if is_adapter else 'From'} {name}",
        use,
        *[_options(f"Compressed: {stage.get('method', 'unknown')}", stage) for stage in stages],
        *[
            _options(f"Adapter `{key}`: {recipe.get('method', 'unknown')}", recipe)
            for key, recipe in adapters.items()
        ],
        _structure(index["manifest"]),
        *_figures(figures or {}),
        "## Versions\n\n" + tabulate(index["versions"].items(), ("package", "version"), "github"),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _options(title: str, recipe: Mapping[str, Any]) -> str:
    rows = [(key, value) for key, value in recipe.get("options", {}).items()]
    rows += [(key, recipe[key]) for key in ("targets", "exclude", "layers") if recipe.get(key)]
    return f"## {title}\n\n{tabulate(rows, ('option', 'value'), 'github', disable_numparse=True)}"


def _structure(groups: list[Mapping[str, Any]]) -> str:
    if not groups:
        return ""
    rows = []
    for group in groups:
        kinds = Counter(name.rpartition(".")[2] for name in group["modules"])
        parts = group["node"].get("deltas") or group["node"].get("copies") or {}
        what = ", ".join(
            f"{n}: {p['kind']}" + (f" r={p['rank']}" if "rank" in p else "") for n, p in parts.items()
        )
        what = what or f"r={group['node'].get('rank')}"
        rows.append((group["node"]["kind"], what, ", ".join(f"{n} × {k}" for k, n in kinds.items())))
    return "## Structure\n\n" + tabulate(rows, ("node", "parts", "modules"), "github")


def _figures(figures: Mapping[str, Any]) -> list[str]:
    flat = [(k, v) for k, v in figures.items() if not isinstance(v, Mapping)]
    tables = [("Figures", flat)] if flat else []
    tables += [(k, list(v.items())) for k, v in figures.items() if isinstance(v, Mapping)]
    return [f"## {title}\n\n{tabulate(rows, ('figure', 'value'), 'github')}" for title, rows in tables]


def is_hub_name(name: str) -> bool:
    """Whether a name can be a repository on the hub, not a local path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()
