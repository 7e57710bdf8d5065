"""NOLA's claim on pictures: at a LoRA's size or half of it, as good from a few examples.

DINOv2 ViT-S with a new head learns Fashion-MNIST from 5 or 10 pictures of each class (98 × 98 pixels),
adapters on all linear layers, and is tested on 1000 pictures. The learning rate of an adapter is the best of
those listed on 300 other pictures, by the first draw of the examples; the head's is the same for all. *Head*
trains nothing else.

    python scripts/prepare_encoders.py .cache/assets && python scripts/bench_fewshot.py

Rows that are in the results file are not run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_encoders
import common
import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification
from transformers.utils import logging

import lowrank_ft

CLASSES, BATCH, STEPS, HEAD_RATE = 10, 10, 100, 1e-2
SEEDS = {5: 3, 10: 1}
VALIDATION, TEST, POOL = 300, 1000, 5000  # pictures to choose the rate by; to test on; to draw examples from


@dataclass(frozen=True)
class Contestant:
    """A method, its options, and the rates to try."""

    method: str | None
    options: dict[str, Any]
    rates: tuple[float, ...]


# On DINOv2 ViT-S a LoRA of rank 1 on all linear layers has 82,944 numbers: 576 for each factor of 72 layers.
CONTESTANTS = {
    "head": Contestant(None, {}, (0.0,)),
    "LoRA r=1": Contestant("lora", {"rank": 1}, (1e-3, 3e-3, 1e-2)),
    "LoRA r=4": Contestant("lora", {"rank": 4}, (1e-3, 3e-3, 1e-2)),
    "NOLA, LoRA r=1's size": Contestant("nola", {"rank": 4, "bases": 576}, (3e-3, 1e-2, 3e-2)),
    "NOLA, half of it": Contestant("nola", {"rank": 4, "bases": 288}, (3e-3, 1e-2, 3e-2)),
}


@dataclass(frozen=True)
class Pictures:
    """Pixels and classes."""

    pixels: Tensor
    classes: Tensor


def main() -> None:
    """Run what is missing and print the table."""
    parser = common.parser(__doc__, Path("docs/results/fewshot.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()  # a new head is meant
    pool = pictures(args, "train", POOL + VALIDATION)
    drawn_from = Pictures(pool.pixels[:POOL], pool.classes[:POOL])
    held_out = {
        "validation": Pictures(pool.pixels[POOL:], pool.classes[POOL:]),
        "test": pictures(args, "t10k", TEST),
    }
    for shots, seeds in SEEDS.items():
        for seed in range(seeds):
            for name, contestant in CONTESTANTS.items():
                rates = contestant.rates
                if seed > 0:
                    rates = (best_rate(name, shots, common.read(args.results)),)
                for rate in rates:
                    key = {"method": name, "shots": shots, "seed": seed, "rate": rate}
                    if not common.is_done(key, common.read(args.results)):
                        row = {**key, **run(contestant, rate, shots, seed, drawn_from, held_out, args)}
                        common.append(args.results, [row])
                        print(row, flush=True)
    print(table(common.read(args.results)))


def pictures(args: argparse.Namespace, name: str, number: int) -> Pictures:
    """Read the first pictures of a file, whose order is random."""
    split = bench_encoders.pictures(args.assets / "fashion-mnist", name, number)
    pixels = torch.cat([batch["pixel_values"] for batch in split.batches])
    return Pictures(pixels, torch.tensor(split.labels))


def best_rate(name: str, shots: int, rows: list[dict[str, Any]]) -> float:
    """Return the rate that was best on the validation pictures, by the first draw."""
    first = [r for r in rows if r["method"] == name and r["shots"] == shots and r["seed"] == 0]
    return float(max(first, key=lambda row: float(row["validation"]))["rate"])


def run(
    contestant: Contestant,
    rate: float,
    shots: int,
    seed: int,
    drawn_from: Pictures,
    held_out: dict[str, Pictures],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Train on a draw of examples, and measure."""
    torch.manual_seed(seed)  # the new head's start
    model = AutoModelForImageClassification.from_pretrained(args.assets / "dinov2", num_labels=CLASSES)
    head = sum(p.numel() for p in model.classifier.parameters())
    if contestant.method is None:
        model.requires_grad_(False)
        model.classifier.requires_grad_(True)
    else:
        options: dict[str, Any] = {"modules_to_save": ["classifier"], "exclude": "classifier", "seed": seed}
        lowrank_ft.wrap(model, contestant.method, **options, **contestant.options)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) - head
    fit(model, examples(drawn_from, shots, seed), rate, seed)
    return {"trained": trained, **{name: accuracy(model, part) for name, part in held_out.items()}}


def examples(pool: Pictures, shots: int, seed: int) -> Pictures:
    """Draw as many pictures of each class."""
    order = torch.randperm(len(pool.classes), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[pool.classes[order] == c][:shots] for c in range(CLASSES)])
    return Pictures(pool.pixels[chosen], pool.classes[chosen])


def fit(model: nn.Module, rows: Pictures, rate: float, seed: int) -> None:
    """Train under bf16 autocast: AdamW, a short warm-up, then a cosine to zero."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    rates = (HEAD_RATE, rate)
    groups = [[p for n, p in trained if ("classifier" in n) is is_head] for is_head in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": lr} for group, lr in zip(groups, rates, strict=True) if group],
        weight_decay=0,
    )
    generator = torch.Generator().manual_seed(seed)
    count = len(rows.classes)
    epochs = -(-STEPS * BATCH // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    model.eval()  # the same features as at the end: no dropped paths
    for step in tqdm(range(STEPS), leave=False):
        share = min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group, lr in zip(optimizer.param_groups, rates, strict=False):
            group["lr"] = lr * share
        part = order[step * BATCH : (step + 1) * BATCH]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pixel_values=rows.pixels[part], labels=rows.classes[part]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def accuracy(model: nn.Module, rows: Pictures) -> float:
    """Return the share of pictures put into their class."""
    right = 0
    parts = (torch.split(tensor, 100) for tensor in (rows.pixels, rows.classes))
    for pixels, classes in zip(*parts, strict=True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            right += int((model(pixel_values=pixels).logits.argmax(1) == classes).sum())
    return right / len(rows.classes)


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each method: mean and standard deviation over draws."""
    lines = []
    for name in CONTESTANTS:
        line: dict[str, Any] = {"method": name, "trained": ""}
        for shots in SEEDS:
            rate = best_rate(name, shots, rows)
            own = [r for r in rows if r["method"] == name and r["shots"] == shots and r["rate"] == rate]
            found = [float(r["test"]) for r in own]
            line["trained"] = f"{own[0]['trained']:,}" if own else ""
            spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
            line[f"{shots} shots"] = f"{statistics.mean(found):.3f}{spread}" if found else ""
            line[f"rate, {shots} shots"] = f"{rate:g}" if rate else ""
        lines.append(line)
    return tabulate(lines, "keys", "github", disable_numparse=True)


if __name__ == "__main__":
    main()
