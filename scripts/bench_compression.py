"""Perplexity of compressed SmolLM2: plain SVD, LoRD and MoDeGPT as published, and both by predicted loss.

The suite ``text`` is calibrated on Wikipedia, and measured on held-out articles of Wikipedia and on the Brown
corpus; ``code`` is calibrated on one half of Python's standard library, and measured on the other half and on
HumanEval's tasks with their canonical solutions. Windows of 512 tokens, whose first token is not scored, are
spread evenly over each corpus. ``ratio`` is the share of the parameters in blocks that was removed. Rows that
are in the results file already are not run again.

    python scripts/prepare_assets.py .cache/assets --brown --code
    python scripts/bench_compression.py
    python scripts/bench_compression.py --suite code
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft
from lowrank_ft import data, engine, evaluation
from lowrank_ft.modules.layer import layer_of
from lowrank_ft.pipeline import count

LENGTH = 512
# For each suite: calibration text, and held-out text by name with its number of windows.
SUITES: dict[str, tuple[str, dict[str, tuple[str, int]]]] = {
    "text": (
        "wikipedia/train.jsonl",
        {"wikipedia": ("wikipedia/heldout.jsonl", 24), "brown": ("brown/heldout.jsonl", 12)},
    ),
    "code": (
        "code/train.jsonl",
        {"python": ("code/heldout.jsonl", 24), "humaneval": ("code/humaneval.jsonl", 24)},
    ),
}
MLP = ["gate_proj", "up_proj", "down_proj"]
# For each line of the table: the method and its options; what it is followed by is in its name.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain SVD": {"method": "lord", "objective": "weight"},
    "LoRD, uniform (the paper)": {"method": "lord", "objective": "output", "centered": True},
    "LoRD, by probing (no gradients)": {"method": "lord", "objective": "output", "allocation": "probe"},
    "LoRD, by loss": {"method": "lord"},
    "LoRD, by loss, sequential": {"method": "lord"},
    "LoRD, by loss, then LoRA": {"method": "lord"},
    "MoDeGPT, the paper": {"method": "modegpt", "recipe": "paper"},
    "MoDeGPT, the paper, MLP only": {"method": "modegpt", "recipe": "paper", "targets": MLP},
    "MoDeGPT, uniform": {"method": "modegpt", "recipe": "paper", "epsilon": math.inf},
    "MoDeGPT, uniform, MLP only": {
        "method": "modegpt",
        "recipe": "paper",
        "epsilon": math.inf,
        "targets": MLP,
    },
    "MoDeGPT, by loss": {"method": "modegpt"},
    "MoDeGPT, by loss, MLP only": {"method": "modegpt", "low_rank": False, "targets": MLP},
    "MoDeGPT, by loss, no factors": {"method": "modegpt", "low_rank": False},
    "MoDeGPT, by loss, leverage scores": {"method": "modegpt", "selection": "leverage"},
    "MoDeGPT, by loss, sequential": {"method": "modegpt"},
    "MoDeGPT, by loss, then LoRA": {"method": "modegpt"},
    "MoDeGPT, by loss, then longer LoRA": {"method": "modegpt"},
}
# Steps of 4 × 256 tokens that recover what was lost.
RECOVERY = {
    "LoRD, by loss, then LoRA": 30,
    "MoDeGPT, by loss, then LoRA": 30,
    "MoDeGPT, by loss, then longer LoRA": 90,
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    ratio: float
    draw: int = 0


def rows(suite: str) -> Iterator[Row]:
    """All rows of a suite, the most telling first."""
    by_loss, paper, probe = "LoRD, by loss", "LoRD, uniform (the paper)", "LoRD, by probing (no gradients)"
    yield Row("dense", 0.0)
    if suite == "code":
        for ratio in (0.04, 0.05, 0.08, 0.02, 0.06, 0.2):
            yield Row(by_loss, ratio)
        yield Row(paper, 0.02)
        return
    ours, published = "MoDeGPT, by loss", "MoDeGPT, the paper"
    for ratio in (0.2, 0.3, 0.1, 0.4, 0.5):
        yield Row(by_loss, ratio)
        yield Row(paper, ratio)
        yield Row(ours, ratio)
        yield Row(published, ratio)
        yield Row("MoDeGPT, uniform", ratio)
    yield Row(f"{ours}, then LoRA", 0.2)
    yield Row(f"{ours}, then longer LoRA", 0.2)
    for ratio in (0.3, 0.2, 0.4):
        yield Row(f"{published}, MLP only", ratio)
        yield Row("MoDeGPT, uniform, MLP only", ratio)
        yield Row(f"{ours}, MLP only", ratio)
    for draw in (1, 2):
        yield Row(ours, 0.3, draw)
        yield Row(published, 0.3, draw)
    yield Row(f"{ours}, no factors", 0.3)
    yield Row(f"{ours}, leverage scores", 0.3)
    yield Row(f"{ours}, sequential", 0.3)
    for ratio in (0.2, 0.3):
        yield Row(f"{by_loss}, sequential", ratio)
    for draw in (1, 2):
        yield Row(by_loss, 0.2, draw)
        yield Row(paper, 0.2, draw)
    yield Row(f"{by_loss}, then LoRA", 0.3)
    for ratio in (0.2, 0.3):
        yield Row(probe, ratio)
    for ratio in (0.2, 0.1, 0.3, 0.4, 0.5):
        yield Row("plain SVD", ratio)


def main() -> None:
    """Run what is missing and print the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache/calibration"))
    parser.add_argument("--suite", choices=list(SUITES), default="text")
    parser.add_argument("--only", help="run only the rows whose method begins so")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--gradient-samples", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "smollm2")
    training, held_out = SUITES[args.suite]
    corpora = {
        name: windows(texts(args.assets / path), tokenizer, count) for name, (path, count) in held_out.items()
    }
    args.results = args.results or Path(f"docs/results/compression_smollm2_{args.suite}.jsonl")
    done = common.read(args.results)
    for row in rows(args.suite):
        key = {**asdict(row), "samples": args.samples}
        if not row.method.startswith(args.only or ""):
            continue
        if common.is_done(key, done):
            continue
        done.append({**key, **measure(row, args, tokenizer, texts(args.assets / training), corpora)})
        common.append(args.results, done[-1:])
        print(done[-1], flush=True)
    print(table(done))
    for name in corpora:
        print(f"\n{name}: rise over dense in nats (perplexity)\n\n{by_ratio(done, name)}")


def measure(
    row: Row, args: argparse.Namespace, tokenizer: Any, training: list[str], corpora: dict[str, Tensor]
) -> dict[str, Any]:
    """Compress as the row says, and measure."""
    model = AutoModelForCausalLM.from_pretrained(args.assets / "smollm2", dtype=torch.float32)
    dense = count(model)
    started = time.perf_counter()
    if row.method != "dense":
        options = OPTIONS[row.method]
        settings = {
            "samples": args.samples,
            "gradient_samples": args.gradient_samples,
            "length": LENGTH,
            "seed": row.draw,
            "sequential": row.method.endswith("sequential"),
            "cache": str(args.cache),
        }
        looks = {} if options.get("objective") == "weight" else {"data": training, "tokenizer": tokenizer}
        lowrank_ft.wrap(model, ratio=row.ratio, calibration=settings, **options, **looks)
        if row.method in RECOVERY:
            recover(model, windows(training, tokenizer, 10**6, 256), RECOVERY[row.method])
    seconds = time.perf_counter() - started
    now = count(model)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    adapters = sum(trained) if row.method in RECOVERY else 0
    figures: dict[str, Any] = {
        **({"ranks removed": ranks_removed(model)} if "LoRD" in row.method else {}),
        "removed of blocks": 1 - (now.blocks - adapters) / dense.blocks,
        "removed of total": 1 - (now.total - adapters) / dense.total,
        "seconds": round(seconds, 1),
    }
    if row.method in RECOVERY:
        figures["recovery steps"] = RECOVERY[row.method]
    for name, tokens in corpora.items():
        figures[f"loss {name}"] = evaluation.window_loss(model, tokens, name)
    return figures


def ranks_removed(model: nn.Module) -> float:
    """Return the share of the targeted layers' summed full ranks that is gone (LoRD: one layer a row)."""
    layers = [row for stage in engine.stages_of(model) for row in stage["layers changed"]]
    full = kept = 0
    for row in layers:
        layer = layer_of(model.get_submodule(row["module"]))
        full += layer.max_rank
        kept += layer.max_rank if row["rank"] is None else row["rank"]
    return 1 - kept / full if full else 0.0


def recover(model: nn.Module, tokens: Tensor, steps: int) -> None:
    """Train a LoRA on the compressed model for a few steps of 4 × 256 tokens."""
    lowrank_ft.wrap(model, "lora", rank=16)
    model.train()
    common.train(model, common.drawn(tokens, steps), 1e-3)
    model.eval()


def texts(path: Path) -> list[str]:
    """Return the texts of a JSON-lines file."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def windows(documents: list[str], tokenizer: Any, count: int, length: int = LENGTH) -> Tensor:
    """Return ``count`` windows spread evenly over documents laid end to end, ``(count, length)``."""
    return evaluation.spread_windows(data.text_ids(documents, tokenizer), length, count)


def table(done: list[dict[str, Any]]) -> str:
    """One line for each method and draw: perplexities, and the rise over dense in nats."""
    dense = next(row for row in done if row["method"] == "dense")
    lines = []
    for row in sorted(done, key=lambda r: (r["ratio"], r["method"], r["draw"])):
        line = {"method": row["method"], "removed of blocks": f"{row['removed of blocks']:.1%}"}
        line["removed of total"] = f"{row['removed of total']:.1%}"
        line["ranks removed"] = f"{row['ranks removed']:.1%}" if "ranks removed" in row else ""
        line["draw"] = row["draw"]
        for name in (key.removeprefix("loss ") for key in row if key.startswith("loss ")):
            rise = row[f"loss {name}"] - dense[f"loss {name}"]
            line[f"{name} perplexity"] = f"{math.exp(row[f'loss {name}']):.2f} ({math.expm1(rise):+.1%})"
            line[f"{name} rise (nats)"] = f"{rise:.3f}"
        lines.append(line)
    return tabulate(lines, "keys", "github", disable_numparse=True)


def by_ratio(done: list[dict[str, Any]], name: str) -> str:
    """One line for each method, one column for each ratio: the README's form. Draws in a row."""
    dense = next(row for row in done if row["method"] == "dense")[f"loss {name}"]
    ratios = sorted({row["ratio"] for row in done} - {0.0})
    lines = []
    for method in OPTIONS:
        mine = sorted((row for row in done if row["method"] == method), key=lambda row: row["draw"])
        if not mine:
            continue
        line = {"": method}
        for ratio in ratios:
            losses = [row[f"loss {name}"] for row in mine if row["ratio"] == ratio]
            rises = ", ".join(f"{loss - dense:.3f}" for loss in losses)
            line[f"{ratio:.0%}"] = f"{rises} ({math.exp(losses[0]):.1f})" if losses else ""
        lines.append(line)
    return tabulate(lines, "keys", "github", disable_numparse=True)


if __name__ == "__main__":
    main()
