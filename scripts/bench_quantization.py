"""Perplexity of SmolLM2 in few bits: to nearest, QLoRA with the program, LoftQ, LQ-LoRA's objectives.

Bits are those of each targeted weight with scales, padding, codebooks *and factors* (in bfloat16); the papers
leave factors out, so both are printed. ``budget`` is what a row may take; rows without one store every matrix
alike. Every method sees the same calibration text; perplexities are of held-out windows of 512 tokens, whose
first token is not scored. After ``steps`` of fine-tuning on the calibration text (4 × 256 tokens each, the
same order) they are measured again. Rows that are in the results file are not run again.

    python scripts/prepare_assets.py .cache/assets --brown
    python scripts/bench_quantization.py --plot docs/quantization.png
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch
from bench_compression import LENGTH, texts, windows
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft
from lowrank_ft import engine, evaluation, layouts
from lowrank_ft.algorithms.lora import LoRADelta
from lowrank_ft.calibration.batches import Calibration
from lowrank_ft.modules.quantized import Quantized
from lowrank_ft.registry import methods

RANK = 8  # of every row's factors, so that they cost the same
HIGHEST = 200  # perplexity that the plot still shows
WEIGHTS = 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)  # targeted ones of SmolLM2-135M
RESULTS = Path("docs/results/quantization_smollm2.jsonl")
PAPER = {"codebook": "nf", "rounding": "nearest", "mode": "paper", "grid": "paper", "iterations": 10}
# For each line of the table: the method and its options. "factors" leaves room for a LoRA of that rank.
OPTIONS: dict[str, dict[str, Any]] = {
    "NF, to nearest": {"method": "nf"},
    "signed, to nearest": {"method": "nf", "codebook": "signed"},
    "QLoRA, program": {"method": "nf", "grid": "paper"},
    # PEFT's own LoftQ needs CUDA, and knows 4 and 8 bits; these are its turns.
    "LoftQ's turns": {"method": "lq_lora", "objective": "weight", "codebook": "nf", "rounding": "nearest"},
    "LQ-LoRA, no data": {"method": "lq_lora", "objective": "weight", **PAPER},
    "LQ-LoRA, Fisher": {"method": "lq_lora", "objective": "fisher", **PAPER},
    "LQ-LoRA, activation": {"method": "lq_lora", "objective": "activation", "rounding": "nearest"},
    "LQ-LoRA, loss": {"method": "lq_lora"},
    "LQ-LoRA, loss, to nearest": {"method": "lq_lora", "rounding": "nearest"},
    "LQ-LoRA, loss, ranks chosen": {"method": "lq_lora", "ranks": (1, 2, 4, 8, 16, 32)},
}


@dataclass(frozen=True)
class Row:
    """One line of the table: a budget with factors, or the bits of every code."""

    method: str
    budget: float | None = None
    bits: int | None = None
    draw: int = 0
    steps: int = 0


def rows() -> Iterator[Row]:
    """All rows, the most telling first."""
    ours, fisher = "LQ-LoRA, loss", "LQ-LoRA, Fisher"
    activation, qlora = "LQ-LoRA, activation", "QLoRA, program"
    yield Row("dense")
    for method in (ours, fisher, activation, qlora, "LQ-LoRA, no data", f"{ours}, to nearest"):
        yield Row(method, budget=3.0)
    yield Row(f"{ours}, ranks chosen", budget=3.0)
    for method in ("NF, to nearest", "signed, to nearest"):
        yield Row(method, bits=3)
    for method in (ours, fisher, activation, "LQ-LoRA, no data", "LoftQ's turns", "NF, to nearest"):
        yield Row(method, bits=2)
    yield Row(f"{ours}, to nearest", bits=2)
    for budget in (2.75, 3.5, 4.0):
        for method in (ours, fisher, activation):
            yield Row(method, budget=budget)
    yield Row("NF, to nearest", bits=3, steps=30)  # plain QLoRA
    for budget in (3.0, 2.75):
        for method in (ours, qlora, fisher, activation):
            yield Row(method, budget=budget, steps=30)
        yield Row(f"{ours}, ranks chosen", budget=budget, steps=30)
    for budget in (2.75, 3.5, 4.0):
        yield Row(f"{ours}, ranks chosen", budget=budget)
    for draw in (1, 2):
        for method in (ours, activation, fisher):
            yield Row(method, budget=3.0, draw=draw)


def main() -> None:
    """Run what is missing and print the table."""
    parser = common.parser(__doc__, RESULTS)
    parser.add_argument("--cache", type=Path, default=Path(".cache/calibration"))
    parser.add_argument("--only", help="run only the rows whose method begins so")
    parser.add_argument("--steps", type=int, help="run only the rows of so many steps")
    parser.add_argument("--draw", type=int, help="run only the rows of this draw")
    parser.add_argument("--plot", type=Path, help="draw perplexity against bits into this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "smollm2")
    training = texts(args.assets / "wikipedia/train.jsonl")
    corpora = {
        "wikipedia": windows(texts(args.assets / "wikipedia/heldout.jsonl"), tokenizer, 16),
        "brown": windows(texts(args.assets / "brown/heldout.jsonl"), tokenizer, 8),
    }
    wanted = [row for row in rows() if row.method.startswith(args.only or "")]
    wanted = [row for row in wanted if args.steps in (None, row.steps) and args.draw in (None, row.draw)]
    for row in wanted:
        if not common.is_done(asdict(row), common.read(args.results)):  # another process may have come first
            found = {**asdict(row), **measure(row, args, tokenizer, training, corpora)}
            common.append(args.results, [found])
            print(found, flush=True)
    done = common.read(args.results)
    print(table(done))
    if args.plot is not None:
        plot(done, args.plot)


def measure(
    row: Row, args: argparse.Namespace, tokenizer: Any, training: list[str], corpora: dict[str, Tensor]
) -> dict[str, Any]:
    """Quantise as the row says, train where it says so, and measure."""
    model = AutoModelForCausalLM.from_pretrained(args.assets / "smollm2", dtype=torch.float32).eval()
    if row.method != "dense":
        quantise(model, row, args, tokenizer, training)
    figures: dict[str, Any] = dict(bits_of(model))
    if row.steps:
        if not engine.hosts(model):
            lowrank_ft.wrap(model, "lora", rank=RANK)
        lowrank_ft.cast_adapters(model, "float32")
        model.train()
        common.train(model, common.drawn(windows(training, tokenizer, 10**6, 256), row.steps), 5e-4)
        model.eval()
        lowrank_ft.cast_adapters(model, "bfloat16")
        figures.update(bits_of(model))
    elif row.method == "QLoRA, program":
        figures["stored bits"] += factor_bits(model)  # of the LoRA that it is for
    for name, tokens in corpora.items():
        figures[f"loss {name}"] = evaluation.window_loss(model, tokens, name)
    return figures


def quantise(
    model: nn.Module, row: Row, args: argparse.Namespace, tokenizer: Any, training: list[str]
) -> None:
    """Put the row's method on the model."""
    options = dict(OPTIONS[row.method])
    method = options.pop("method")
    if method == "lq_lora":
        options.update({"factors": "bfloat16"}, **({} if "ranks" in options else {"rank": RANK}))
    if row.bits is not None:
        options.update(bits=row.bits)
        options.pop("grid", None)
    else:
        budget = row.budget
        if row.method == "QLoRA, program" and budget is not None:
            budget -= factor_bits(model)
        options.update(budget=budget)
    settings = Calibration(
        samples=128, gradient_samples=32, length=LENGTH, seed=row.draw, cache=str(args.cache)
    )
    config = methods[method].Config(**{**options, "calibration": settings})
    looks = {} if engine.calibration_of(config) is None else {"data": training, "tokenizer": tokenizer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lowrank_ft.wrap(model, config, **looks)


def targeted(model: nn.Module) -> list[nn.Linear | Quantized]:
    """The linear layers in blocks, as they stand."""
    heads = layouts.head_names(model)
    layers = [m for n, m in model.named_modules() if not any(n.startswith(head) for head in heads)]
    return [m for m in layers if isinstance(m, (nn.Linear, Quantized))]


def factor_bits(model: nn.Module, rank: int = RANK) -> float:
    """Bits for each targeted weight that factors of a rank take in bfloat16."""
    sizes = [(m.out_features, m.in_features) for m in targeted(model)]
    return sum(16 * rank * (o + i) for o, i in sizes) / sum(o * i for o, i in sizes)


def bits_of(model: nn.Module) -> dict[str, float]:
    """Bits for each targeted weight: with factors in bfloat16, and without."""
    layers = targeted(model)
    weights = sum(m.out_features * m.in_features for m in layers)
    stored = sum(m.stored_bytes for m in layers if isinstance(m, Quantized))
    factors = sum(p.numel() for m in model.modules() if isinstance(m, LoRADelta) for p in m.parameters())
    if not stored:
        return {"stored bits": 32.0, "without factors": 32.0}
    return {"stored bits": (8 * stored + 16 * factors) / weights, "without factors": 8 * stored / weights}


def table(done: list[dict[str, Any]]) -> str:
    """One line for each row: bits, perplexities, and the rise over dense in nats."""
    dense = next(row for row in done if row["method"] == "dense")
    lines = []
    for row in sorted(
        done, key=lambda r: (r["steps"], r["budget"] or r["bits"] or 0, r["method"], r["draw"])
    ):
        line = {
            "method": row["method"],
            "asked": f"{row['budget']} bits" if row["budget"] else "",
            "bits": f"{row['stored bits']:.3f}",
            "without factors": f"{row['without factors']:.3f}",
            "steps": row["steps"] or "",
            "draw": row["draw"],
        }
        for name in ("wikipedia", "brown"):
            rise = row[f"loss {name}"] - dense[f"loss {name}"]
            line[name] = f"{math.exp(row[f'loss {name}']):.2f} ({rise:+.3f})"
        lines.append(line)
    return tabulate(lines, "keys", "github", disable_numparse=True)


def plot(done: list[dict[str, Any]], path: Path) -> None:
    """Draw perplexity on Wikipedia against bits (and bytes) with factors, one line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(figsize=(7, 4.5))
    dense = next(row for row in done if row["method"] == "dense")
    for steps, style in ((0, "o-"), (30, "^--")):
        for number, method in enumerate(OPTIONS):
            mine = [r for r in done if r["method"] == method and r["steps"] == steps and not r["draw"]]
            points = sorted((r["stored bits"], math.exp(r["loss wikipedia"])) for r in mine)
            if points and points[-1][1] < HIGHEST:
                label = method if not steps else f"{method}, {steps} steps"
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label, ms=5, lw=1)
    axes.axhline(math.exp(dense["loss wikipedia"]), color="black", linestyle=":", linewidth=1, label="dense")
    axes.set(
        xlabel="bits per weight, scales and factors included", ylabel="perplexity, Wikipedia", yscale="log"
    )
    axes.set_ylim(0.9 * math.exp(dense["loss wikipedia"]), HIGHEST)
    axes.set_yticks([20, 30, 40, 60, 100, 200])
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    per_bit = WEIGHTS / 8e6
    top = axes.secondary_xaxis("top", functions=(lambda bits: bits * per_bit, lambda mb: mb / per_bit))
    top.set_xlabel("MB of the linear layers in blocks")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
