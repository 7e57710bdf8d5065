"""Perplexity of SmolLM2 in few bits: to nearest, QLoRA with the program, LoftQ, LQ-LoRA's objectives.

Bits are those of each targeted weight with scales, padding, codebooks *and factors* of rank 8 (in
bfloat16); the papers leave factors out, so both are shown. ``budget`` is what a row may take; rows with
``bits`` store every matrix alike. Every method sees the same 128 × 512 tokens of Wikipedia; perplexities
are of held-out windows of 512 tokens. Rows with ``steps`` are measured after that fine-tuning on the same
text, 4 × 256 tokens a step.

    python scripts/prepare_assets.py .cache/assets --brown
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import lowrank_ft
from benchmarks import language
from benchmarks.quantizers import bits_of, factor_bits, quantise
from benchmarks.suite import Key, Lab, Measured, Row, Suite
from benchmarks.tables import Cell, Plot, Table, value
from lowrank_ft import engine

RANK, CORPORA = 8, {"wikipedia": 16, "brown": 8}
OURS, FISHER, ACTIVATION = "LQ-LoRA, loss", "LQ-LoRA, Fisher", "LQ-LoRA, activation"
QLORA, NO_DATA, CHOSEN = "QLoRA, program", "LQ-LoRA, no data", f"{OURS}, ranks chosen"
NEAREST, NF, SIGNED = f"{OURS}, to nearest", "NF, to nearest", "signed, to nearest"
MAIN = (OURS, FISHER, ACTIVATION)
# Methods, and what they are asked for: budget, bits, draws of the calibration text, steps.
ROWS: list[tuple[tuple[str, ...], float | None, int | None, tuple[int, ...], int]] = [
    (("dense",), None, None, (0,), 0),
    ((*MAIN, QLORA, NO_DATA, NEAREST, CHOSEN), 3.0, None, (0,), 0),
    ((NF, SIGNED), None, 3, (0,), 0),
    ((*MAIN, NO_DATA, "LoftQ's turns", NF, NEAREST), None, 2, (0,), 0),
    *(((*MAIN, CHOSEN), budget, None, (0,), 0) for budget in (2.75, 3.5, 4.0)),
    ((NF,), None, 3, (0,), 30),  # plain QLoRA
    *(((*MAIN, QLORA, CHOSEN), budget, None, (0,), 30) for budget in (3.0, 2.75)),
    (MAIN, 3.0, None, (1, 2), 0),
]


def jobs(rows: Sequence[Row]) -> Iterator[Key]:
    """Yield all rows."""
    for methods, budget, bits, draws, steps in ROWS:
        for method in methods:
            for draw in draws:
                yield {"method": method, "budget": budget, "bits": bits, "draw": draw, "steps": steps}


def measure(job: Key, lab: Lab) -> Measured:
    """Quantise as the job says, train where it says so, and measure."""
    model = language.load(lab)
    if job["method"] != "dense":
        given = language.calibrated(lab, draw=job["draw"])
        quantise(model, job["method"], given, rank=RANK, bits=job["bits"], budget=job["budget"])
    if job["steps"]:
        if not engine.hosts(model):
            lowrank_ft.wrap(model, "lora", rank=RANK)
        lowrank_ft.cast_adapters(model, "float32")
        language.recover(model, lab, lab.size(job["steps"], 2), 5e-4)
        lowrank_ft.cast_adapters(model, "bfloat16")
    bits = bits_of(model)
    if job["method"] == QLORA and not job["steps"]:
        bits["stored bits"] += factor_bits(model, RANK)  # of the LoRA that it is for
    yield {}, {**bits, **language.losses(model, lab, CORPORA)}


def perplexity(corpus: str) -> Cell:
    """Return a cell of the perplexity, and the rise of the loss over dense in nats."""
    return lambda rows: f"{rows[0][f'perplexity {corpus}']:.2f} ({rows[0][f'rise {corpus}']:+.3f})"


ALL = Table(
    by=("method", "budget", "bits", "steps", "draw"),
    columns={
        "method": "",
        "asked": value(lambda row: row["budget"] and f"{row['budget']} bits"),
        "bits": value("stored bits", ".3f"),
        "without factors": ".3f",
        "steps": value(lambda row: row["steps"] or None),
        "draw": "",
        **{corpus: perplexity(corpus) for corpus in CORPORA},
    },
    prepare=language.against_dense,
    order=lambda row: (row["steps"], row["budget"] or row["bits"] or 0, row["method"], row["draw"]),
)
SUMMARY = Table(
    by=("budget", "steps"),
    columns={
        "bits a weight": value(lambda row: f"{row['budget']}" + ", after 30 steps" * bool(row["steps"])),
        "{}": value("perplexity wikipedia", ".3g"),
    },
    where={"draw": [0]},
    across=("method", (QLORA, FISHER, OURS, CHOSEN)),
    prepare=lambda rows: [row for row in language.against_dense(rows) if row["budget"]],
    order=lambda row: (-row["budget"], row["steps"]),
)
PLOT = Plot(
    file="quantization.png",
    x=lambda row: float(row["stored bits"]),
    y=lambda row: math.exp(row["loss wikipedia"]),
    label=lambda row: row["method"] + (f", {row['steps']} steps" if row["steps"] else ""),
    axes={"xlabel": "bits per weight, scales and factors included", "ylabel": "perplexity, Wikipedia",
          "yscale": "log"},
    style=lambda row: "^--" if row["steps"] else "o-",
    prepare=lambda rows: [row for row in rows if row["stored bits"] < 32 and not row["draw"]
                          and row["loss wikipedia"] < math.log(200)],
)  # fmt: skip
QUICK = {"method": OURS, "budget": 3.0, "bits": None, "draw": 0, "steps": 0}
SUITE = Suite(jobs, measure, {"all": ALL, "summary": SUMMARY}, QUICK, PLOT)
