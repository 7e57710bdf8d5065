"""What fine-tuning SmolLM2 on code forgets of Wikipedia: full fine-tuning, LoRA, PiSSA, CorDA in both modes.

The base is SmolLM2 after 96 steps on Wikipedia's training articles (merged LoRA, made once and cached): as it
comes, an instruct model from four bits, any text at all improves it on Wikipedia at first. It learns Python
(half of the standard library; the other half is held out), and must keep Wikipedia (held-out articles); Brown
is text that nothing saw. CorDA-K calibrates on Wikipedia's training articles, CorDA-I on the code. All
adapters: rank 16 on every linear layer, scale 1, the same steps of 4 × 256 tokens, AdamW, a warm-up and no
decay after it, so that a point on the way is what a shorter run would have ended with; weights in float32,
products in bfloat16. Losses are in nats per token; *learnt* is how much the loss on code fell.

    python scripts/prepare_assets.py .cache/assets --brown --code
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowrank_ft
from benchmarks import language
from benchmarks.contestants import Contestant, Ours, ours, sweep, trained_numbers
from benchmarks.suite import Key, Lab, Measured, Row, Suite
from benchmarks.tables import Plot, Score, Table, at_best_rate, count, mean, value
from benchmarks.training import constant, descend, drawn, trainable

RANK, STEPS, BATCH, PREPARATION, POINTS = 16, 48, 4, 96, (12, 24, 48)
CORPORA = {"python": 8, "wikipedia": 12, "brown": 4}
TEXTS = {"CorDA-K": "wikipedia/train.jsonl", "CorDA-I": "code/train.jsonl"}  # what CorDA is calibrated on
RATES = (1e-4, 3e-4, 1e-3)


def full(model: nn.Module, seed: int) -> nn.Module:
    """Train everything."""
    return model


CONTESTANTS = {
    "full": Contestant(full, (3e-5, 1e-4)),
    "LoRA": Contestant(ours("lora", rank=RANK), RATES, seeds=3),
    "PiSSA": Contestant(ours("lora", rank=RANK, init="pissa"), RATES, seeds=3),
    "CorDA-K": Contestant(ours("corda", rank=RANK, mode="knowledge"), RATES, seeds=3),
    "CorDA-I": Contestant(ours("corda", rank=RANK, mode="instruction"), RATES, seeds=3),
}


def final_loss(row: Row) -> float:
    """Return the loss on code after the last step, which chooses the rate."""
    return float(row["loss python"]) if row["steps"] == STEPS else float("inf")


def jobs(rows: Sequence[Row]) -> Iterator[Key]:
    """Yield every method at its rates, then at the best of them with two more seeds."""
    return sweep(CONTESTANTS, rows, final_loss, {})


def measure(job: Key, lab: Lab) -> Measured:
    """Train a fresh copy of the base, and measure it at every point."""
    model, wrap = base(lab), CONTESTANTS[job["method"]].wrap
    before, points = measured(model, lab), (2,) if lab.quick else POINTS
    if isinstance(wrap, Ours) and job["method"] in TEXTS:
        given = language.calibrated(lab, TEXTS[job["method"]])
        given["calibration"]["samples"] = lab.size(64, 4)
        wrap = replace(wrap, options={**wrap.options, **given})
    wrap(model, job["seed"])
    trained = trained_numbers(model)
    seconds, started = 0.0, time.perf_counter()
    for step in fit(
        model, lab, "code/train.jsonl", job["rate"], job["seed"], points[-1], warm_up=STEPS // 12
    ):
        if step in points:
            seconds += time.perf_counter() - started
            yield (
                {"steps": step},
                {**measured(model, lab), "before": before, "trained": trained, "seconds": seconds},
            )
            started = time.perf_counter()


def base(lab: Lab) -> nn.Module:
    """Return the base, which the first run makes."""
    directory = lab.cache / ("forgetting-quick" if lab.quick else "forgetting")
    if not directory.exists():
        model = ours("lora", rank=RANK)(language.load(lab), seed=0)
        steps = lab.size(PREPARATION, 2)
        for _ in fit(model, lab, language.WIKIPEDIA, 1e-3, 0, steps, warm_up=max(1, steps // 12)):
            pass
        merged: Any = lowrank_ft.merge(model, reversible=False)
        merged.save_pretrained(directory)
    again: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return again


def fit(
    model: nn.Module, lab: Lab, path: str, rate: float, seed: int, steps: int, warm_up: int
) -> Iterator[int]:
    """Train on a text; yield the number of steps after each."""
    rows = language.windows(lab, path, length=256)

    def loss_of(part: Tensor) -> Tensor:
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            return language.loss_of(model, rows[part])

    losses = (partial(loss_of, part) for part in drawn(len(rows), BATCH, steps, seed))
    return descend(trainable(model, rate), losses, constant(warm_up), clip=1.0)


def measured(model: nn.Module, lab: Lab) -> dict[str, float]:
    """Return the loss on each corpus."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        return language.losses(model, lab, CORPORA)


def rise(corpus: str, sign: float = 1.0) -> Score:
    """Return how much a loss rose, or fell."""
    name = f"loss {corpus}"
    return lambda row: sign * float(row[name] - row["before"][name])


GAINS = {"learnt (code)": mean(rise("python", -1.0)), "forgot (Wikipedia)": mean(rise("wikipedia"))}
ALL = Table(
    by=("method", "rate"),
    columns={
        "method": "",
        "learning rate": value("rate", "g"),
        "seeds": count("seed"),
        **GAINS,
        "forgot (Brown)": mean(rise("brown")),
    },
    where={"steps": [STEPS]},
    order=lambda row: (list(CONTESTANTS).index(row["method"]), row["rate"]),
)
BEST = replace(
    ALL, by=("method",), columns={"method": "", **GAINS}, prepare=at_best_rate(final_loss, "method")
)
PLOT = Plot(
    file="forgetting.png",
    x=rise("python", -1.0),
    y=rise("wikipedia"),
    label=lambda row: str(row["method"]),
    axes={"xlim": (0, 0.115), "ylim": (-0.005, 0.06),  # what learnt nothing at all is in the table
          "xlabel": "learnt: fall of the loss on code (nats per token)",
          "ylabel": "forgot: rise of the loss on Wikipedia"},
    by=("rate", "seed"),
)  # fmt: skip
SUITE = Suite(jobs, measure, {"all": ALL, "best": BEST}, {"method": "LoRA", "seed": 0, "rate": 3e-4}, PLOT)
