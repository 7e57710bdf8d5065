"""Encoders in few bits: float weights, unlike SmolLM2's, which were four-bit once.

``features``: MiniLM on film reviews and DINOv2 on pictures of clothes, their linear layers in 3 and 2 bits
(blocks of 64), with factors of rank 8 where a method has them. *relative error* is that of the features, and
*kept* the accuracy of the logistic regression that was fitted on the dense encoder's features.

``finetune``: MiniLM with a new head learns to tell fresh from rotten (an epoch, batches of 32, the same order
for all), its linear layers in 2.5, 3 and 4 bits, scales and factors (rank 4, bfloat16) included, and in full
precision. Rows that are in the results file already are not run again.

    python scripts/prepare_encoders.py .cache/assets
    python scripts/bench_quantization_encoders.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch
from bench_encoders import TASKS, Dense, Task, dense_of, encoded, features, reviews
from bench_quantization import OPTIONS, bits_of, factor_bits
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging

import lowrank_ft
from lowrank_ft import engine, models
from lowrank_ft.algorithms.nf import QuantizeOptions
from lowrank_ft.registry import methods

FEATURE_RANK, RANK = 8, 4
METHODS = (
    "NF, to nearest",
    "signed, to nearest",
    "LQ-LoRA, no data",
    "LQ-LoRA, Fisher",
    "LQ-LoRA, activation",
    "LQ-LoRA, loss",
)


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    part: str
    encoder: str
    method: str
    bits: float
    seed: int = 0


def rows() -> Iterator[Row]:
    """All rows."""
    for encoder in TASKS:
        for bits in (3, 2):
            for method in METHODS:
                yield Row("features", encoder, method, bits)
    yield Row("finetune", "minilm", "full precision", 32)
    for budget in (3.0, 2.5, 4.0):
        for method in ("LQ-LoRA, loss", "QLoRA, program", "LQ-LoRA, Fisher"):
            yield Row("finetune", "minilm", method, budget)


def main() -> None:
    """Run what is missing and print the tables."""
    parser = common.parser(__doc__, Path("docs/results/quantization_encoders.jsonl"))
    parser.add_argument("--part", choices=["features", "finetune"], help="one of them only")
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()  # loading without the pooler is meant
    dense: dict[str, tuple[Task, Dense]] = {}
    for row in rows():
        wanted = args.part in (None, row.part)
        if not wanted or common.is_done(asdict(row), common.read(args.results)):
            continue
        if row.part == "features":
            if row.encoder not in dense:
                task = TASKS[row.encoder](args.assets)
                dense[row.encoder] = task, dense_of(task)
            found = of_features(row, *dense[row.encoder])
        else:
            found = of_training(row, args)
        common.append(args.results, [{**asdict(row), **found}])
        print({**asdict(row), **found}, flush=True)
    print(table(common.read(args.results)))


def of_features(row: Row, task: Task, dense: Dense) -> dict[str, Any]:
    """Quantise an encoder, and say what is left of its features."""
    model, options = task.load(), dict(OPTIONS[row.method], bits=int(row.bits))
    options.pop("grid", None)
    if options["method"] == "lq_lora":
        options.update(rank=FEATURE_RANK, factors="bfloat16")
    seconds = quantise(model, options, task.calibration)
    test = features(model, task, task.test)
    return {
        **bits_of(model),
        "seconds": seconds,
        "relative error": ((test - dense.test).norm() / dense.test.norm()).item(),
        "kept": float(dense.probe.score(test.numpy(), task.test.labels)),
        "dense": float(dense.probe.score(dense.test.numpy(), task.test.labels)),
    }


def of_training(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Quantise MiniLM with a new head, train it, and return its accuracy on held-out reviews."""
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "minilm")
    train, test = (reviews(args.assets / f"rotten-tomatoes/{name}.jsonl") for name in ("train", "heldout"))
    torch.manual_seed(row.seed)  # of the new head
    model = models.load_classifier(
        str(args.assets / "minilm"), "float32", ["rotten", "fresh"], tokenizer.pad_token_id
    ).eval()
    seconds = 0.0
    if row.method != "full precision":
        options = dict(OPTIONS[row.method], budget=row.bits)
        if options["method"] == "lq_lora":
            options.update(rank=RANK, factors="bfloat16", modules_to_save=("classifier",))
        else:
            options["budget"] -= factor_bits(model, RANK)
        calibration = labelled((train[i : i + 16] for i in range(0, 256, 16)), tokenizer)
        seconds = quantise(model, options, calibration)
    if not engine.hosts(model):
        lowrank_ft.wrap(model, "lora", rank=RANK, modules_to_save=("classifier",))
    lowrank_ft.cast_adapters(model, "float32")
    before = accuracy(model, test, tokenizer)
    fit(model, train, tokenizer, args.epochs)
    lowrank_ft.cast_adapters(model, "bfloat16")
    return {
        **bits_of(model),
        "seconds": seconds,
        "epochs": args.epochs,
        "untrained": before,
        "accuracy": accuracy(model, test, tokenizer),
    }


def quantise(model: nn.Module, options: dict[str, Any], data: list[dict[str, Tensor]]) -> float:
    """Put a method on a model; return the seconds it took."""
    method = options.pop("method")
    config = methods[method].Config(**options)
    assert isinstance(config, QuantizeOptions)
    started = time.perf_counter()
    lowrank_ft.wrap(model, config, data=data if config.needs() else None)
    return round(time.perf_counter() - started, 1)


def fit(model: nn.Module, rows: list[dict[str, Any]], tokenizer: Any, epochs: int, batch: int = 32) -> None:
    """Train what trains: one cycle of AdamW, peak 1e-3."""
    generator = torch.Generator().manual_seed(0)
    orders = (torch.randperm(len(rows), generator=generator).tolist() for _ in range(epochs))
    chosen = [
        [rows[k] for k in order[i : i + batch]]
        for order in orders
        for i in range(0, len(rows) - batch + 1, batch)
    ]
    model.eval()  # without dropout: an epoch is short
    common.train(model, labelled(chosen, tokenizer), 1e-3)


def labelled(chunks: Iterable[list[dict[str, Any]]], tokenizer: Any) -> list[dict[str, Tensor]]:
    """Return a batch of each chunk of reviews, with its labels."""
    return [
        {
            **encoded([r["text"] for r in rows], tokenizer),
            "labels": torch.tensor([r["label"] for r in rows]),
        }
        for rows in chunks
    ]


def accuracy(model: nn.Module, rows: list[dict[str, Any]], tokenizer: Any) -> float:
    """Return the share of reviews that are told right."""
    ordered, right = sorted(rows, key=lambda r: len(r["text"])), 0
    with torch.no_grad():
        for i in range(0, len(ordered), 64):
            chunk = ordered[i : i + 64]
            logits = model(**encoded([r["text"] for r in chunk], tokenizer)).logits
            right += int((logits.argmax(-1) == torch.tensor([r["label"] for r in chunk])).sum())
    return right / len(ordered)


def table(done: list[dict[str, Any]]) -> str:
    """Both tables."""
    parts = []
    for part, columns in (("features", ("relative error", "kept")), ("finetune", ("untrained", "accuracy"))):
        lines = [
            {
                "encoder": r["encoder"],
                "method": r["method"],
                "asked": f"{r['bits']:g}",
                "bits": f"{r['stored bits']:.3f}",
                **{column: f"{r[column]:.4f}" for column in columns},
                "seconds": r["seconds"],
            }
            for r in sorted(done, key=lambda r: (r["part"], r["encoder"], -r["bits"]))
            if r["part"] == part
        ]
        parts.append(tabulate(lines, "keys", "github", disable_numparse=True))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
