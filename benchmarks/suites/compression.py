"""Perplexity of compressed SmolLM2: plain SVD, LoRD and MoDeGPT as published, and both by predicted loss.

``text`` is calibrated on Wikipedia, and measured on held-out articles of Wikipedia and on the Brown corpus;
``code`` is calibrated on one half of Python's standard library, and measured on the other half and on
HumanEval's tasks with their solutions. Windows of 512 tokens are spread evenly over each corpus. ``ratio`` is
the share of the parameters in blocks that was removed, ``draw`` that of the calibration text. "then LoRA" is
followed by 30 steps of 4 × 256 tokens, "longer" by 90.

    python scripts/prepare_assets.py .cache/assets --brown --code
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

import lowrank_ft
from benchmarks import language
from benchmarks.language import MLP
from benchmarks.suite import Key, Lab, Measured, Row, Suite
from benchmarks.tables import Cell, Rows, Table, ordered, value
from lowrank_ft import engine
from lowrank_ft.engine.counting import count
from lowrank_ft.modules.layer import layer_of

# For each corpus pair: calibration text, and held-out texts with their numbers of windows.
TEXTS: dict[str, tuple[str, dict[str, int]]] = {
    "text": ("wikipedia/train.jsonl", {"wikipedia": 24, "brown": 12}),
    "code": ("code/train.jsonl", {"python": 24, "humaneval": 24}),
}
PAPER, UNIFORM = {"recipe": "paper"}, {"recipe": "paper", "epsilon": math.inf}
DRAWS, FIVE, THREE, TWO = (0, 1, 2), (0.1, 0.2, 0.3, 0.4, 0.5), (0.2, 0.3, 0.4), (0.2, 0.3)
# For each line of the tables: the method, its options, the ratios, and the one of them with three draws.
LINES: dict[str, tuple[str, dict[str, Any], tuple[float, ...], float]] = {
    "dense": ("", {}, (0.0,), -1),
    "plain SVD": ("lord", {"objective": "weight"}, FIVE, -1),
    "LoRD, uniform (the paper)": ("lord", {"objective": "output", "centered": True}, FIVE, 0.2),
    "LoRD, by probing (no gradients)": ("lord", {"objective": "output", "allocation": "probe"}, TWO, -1),
    "LoRD, by loss": ("lord", {}, FIVE, 0.2),
    "LoRD, by loss, sequential": ("lord", {}, TWO, -1),
    "LoRD, by loss, then LoRA": ("lord", {}, (0.3,), -1),
    "MoDeGPT, the paper": ("modegpt", PAPER, FIVE, 0.3),
    "MoDeGPT, the paper, MLP only": ("modegpt", {**PAPER, "targets": MLP}, THREE, -1),
    "MoDeGPT, uniform": ("modegpt", UNIFORM, FIVE, -1),
    "MoDeGPT, uniform, MLP only": ("modegpt", {**UNIFORM, "targets": MLP}, THREE, -1),
    "MoDeGPT, by loss": ("modegpt", {}, FIVE, 0.3),
    "MoDeGPT, by loss, MLP only": ("modegpt", {"low_rank": False, "targets": MLP}, THREE, -1),
    "MoDeGPT, by loss, no factors": ("modegpt", {"low_rank": False}, (0.3,), -1),
    "MoDeGPT, by loss, leverage scores": ("modegpt", {"selection": "leverage"}, (0.3,), -1),
    "MoDeGPT, by loss, sequential": ("modegpt", {}, (0.3,), -1),
    "MoDeGPT, by loss, then LoRA": ("modegpt", {}, (0.2,), -1),
    "MoDeGPT, by loss, then longer LoRA": ("modegpt", {}, (0.2,), -1),
}
CODE = {
    "dense": (0.0,),
    "LoRD, by loss": (0.02, 0.04, 0.05, 0.06, 0.08, 0.2),
    "LoRD, uniform (the paper)": (0.02,),
}


def jobs(rows: Sequence[Row]) -> Iterable[Key]:
    """Yield all lines at all their ratios and draws."""
    for method, (_, _, ratios, drawn) in LINES.items():
        for ratio in ratios:
            for draw in DRAWS if ratio == drawn else (0,):
                yield {"texts": "text", "method": method, "ratio": ratio, "draw": draw}
    for method, ratios in CODE.items():
        yield from ({"texts": "code", "method": method, "ratio": ratio, "draw": 0} for ratio in ratios)


def measure(job: Key, lab: Lab) -> Measured:
    """Compress as the job says, and measure."""
    name, (method, options, _, _), (training, held_out) = (
        job["method"],
        LINES[job["method"]],
        TEXTS[job["texts"]],
    )
    model, figures, adapters = language.load(lab), {}, 0
    dense, started = count(model), time.perf_counter()
    if method:
        given = language.calibrated(lab, training, job["draw"], sequential=name.endswith("sequential"))
        given = {"calibration": given["calibration"]} if options.get("objective") == "weight" else given
        lowrank_ft.wrap(model, method, ratio=job["ratio"], **options, **given)
    if name.endswith("LoRA"):
        figures["recovery steps"] = 90 if "longer" in name else 30
        lowrank_ft.wrap(model, "lora", rank=16)
        language.recover(model, lab, lab.size(figures["recovery steps"], 2), 1e-3)
        adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds, now = time.perf_counter() - started, count(model)
    yield {}, {
        **({"ranks removed": ranks_removed(model)} if method == "lord" else {}),
        "removed of blocks": 1 - (now.blocks - adapters) / dense.blocks,
        "removed of total": 1 - (now.total - adapters) / dense.total,
        "seconds": seconds, **figures, **language.losses(model, lab, held_out),
    }  # fmt: skip


def ranks_removed(model: nn.Module) -> float:
    """Return the share of the targeted layers' summed full ranks that is gone."""
    changed = [row for stage in engine.stages_of(model) for row in stage["layers changed"]]
    full = [layer_of(model.get_submodule(row["module"])).max_rank for row in changed]
    kept = [most if row["rank"] is None else row["rank"] for row, most in zip(changed, full, strict=True)]
    return 1 - sum(kept) / sum(full)


def rises(corpus: str) -> Cell:
    """Return a cell of the rises of all draws, and the perplexity of the first."""

    def cell(rows: Rows) -> str:
        own = sorted(rows, key=lambda row: int(row["draw"]))
        draws = ", ".join(format(row[f"rise {corpus}"], ".3f") for row in own)
        return f"{draws} ({own[0][f'perplexity {corpus}']:.1f})"

    return cell


def perplexity(corpus: str) -> Cell:
    """Return a cell of the perplexity, and its rise in percent."""
    return lambda rows: (
        f"{rows[0][f'perplexity {corpus}']:.2f}"
        + (f" ({math.expm1(rows[0][f'rise {corpus}']):+.1%})" if rows[0]["ratio"] else "")
    )


def by_ratio(corpus: str) -> Table:
    """Return a table of one line for each method and one column for each ratio."""
    columns = {"": value("method"), "{:.0%}": rises(corpus)}
    ratios, order = ("ratio", FIVE), ordered("method", LINES)
    return Table(("method",), columns, {"texts": ["text"]}, ratios, compressed, order)


def compressed(rows: Rows) -> Rows:
    """Return the rises of all rows but the dense model's."""
    return [row for row in language.against_dense(rows) if row["ratio"]]


CODE_TABLE = Table(
    by=("method", "ratio"),
    columns={
        "": value("method"),
        "blocks removed": value("removed of blocks", ".1%"),
        "ranks removed": ".1%",
        "library, perplexity": perplexity("python"),
        "HumanEval, perplexity": perplexity("humaneval"),
    },
    where={"texts": ["code"]},
    prepare=language.against_dense,
    order=lambda row: (list(CODE).index(row["method"]), row["ratio"]),
)
TABLES = {"wikipedia": by_ratio("wikipedia"), "brown": by_ratio("brown"), "code": CODE_TABLE}
QUICK = {"texts": "text", "method": "LoRD, by loss", "ratio": 0.2, "draw": 0}
SUITE = Suite(jobs, measure, TABLES, QUICK)
