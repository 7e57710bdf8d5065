"""FLoRA on convolutions: what a Tucker update of a real network's convolutions buys, at equal numbers.

EfficientNet-Lite0 with a new head learns Fashion-MNIST (96 × 96 pixels) from 2000 pictures in 3 epochs, and
is tested on 2000 others. Each adapter has at most as many numbers as a LoRA of rank 4 on the 33 convolutions
without groups, the head's left out. PEFT's LoRA cannot act on the 16 depthwise ones, so that *33 layers* says
what a method does without them. Batch norms keep their statistics in all runs. Each method's rate is the best
of those listed on 500 further pictures, by its first seed. *Head* trains nothing else; *full* everything.

    python scripts/prepare_encoders.py .cache/assets
    python scripts/bench_flora.py --part 0/2 & python scripts/bench_flora.py --part 1/2; wait
    python scripts/bench_flora.py --cost      # step time and memory, on a quiet machine

Rows that are in the results file are not run again.
"""

from __future__ import annotations

import argparse
import gzip
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import common
import numpy as np
import torch
from bench_training import saved_bytes
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification
from transformers.utils import logging

import lowrank_ft

PIXELS, CLASSES, BATCH, EPOCHS = 96, 10, 32, 3
TRAIN, VALIDATION, TEST = 2000, 500, 2000
RATES = (3e-3, 1e-2)
GATES = "*squeeze_excite*"  # they are the identity: EfficientNet-Lite has none
Wrap = Callable[[nn.Module, int], nn.Module]


@dataclass(frozen=True)
class Contestant:
    """A method, the rates to try, and for how many seeds it runs."""

    wrap: Wrap
    rates: tuple[float, ...] = RATES
    seeds: int = 1


@dataclass(frozen=True)
class Pictures:
    """Pixels ``(n, 3, 96, 96)`` and classes."""

    pixels: Tensor
    classes: Tensor


def ours(method: str, **options: Any) -> Wrap:
    """One of ours, by default on all convolutions."""

    def wrap(model: nn.Module, seed: int) -> nn.Module:
        where = {"targets": "all-conv", "exclude": [GATES], "modules_to_save": ["classifier"], **options}
        return lowrank_ft.wrap(model, method, seed=seed, **where)

    return wrap


def theirs(config: type[Any], **options: Any) -> Wrap:
    """PEFT's, on the convolutions without groups."""

    def wrap(model: nn.Module, seed: int) -> nn.Module:
        found = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
        targets = [name for name in found if "squeeze_excite" not in name]
        torch.manual_seed(seed)
        where = {"target_modules": targets, "modules_to_save": ["classifier"]}
        return get_peft_model(model, config(**where, **options))  # type: ignore[no-any-return]

    return wrap


def head(model: nn.Module, seed: int) -> nn.Module:
    """Train the new head alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    return model


def full(model: nn.Module, seed: int) -> nn.Module:
    """Train everything."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("squeeze_excite" not in name)
    return model


BUDGET = 91_372  # a LoRA of rank 4 on the 33 convolutions without groups: the largest rank that PEFT's can be
PAPER = "kaiming-normal"  # with the core at zero
UNGROUPED = [GATES, "*depthwise_conv"]
CONTESTANTS = {
    "FLoRA": Contestant(ours("flora", budget=BUDGET), seeds=3),
    "LoRA": Contestant(ours("lora", rank=3, rank_pattern={"*depthwise_conv": 2}), seeds=3),
    "FLoRA, paper's start": Contestant(ours("flora", budget=BUDGET, init=PAPER), seeds=3),
    "FLoRA, the paper": Contestant(
        ours("flora", budget=BUDGET, init=PAPER, rank_kernel=3, full_modes="factor")
    ),
    "FLoRA, paper's start, scale 4": Contestant(ours("flora", budget=BUDGET, init=PAPER, scale=4.0)),
    "FLoRA, HOSVD factors": Contestant(ours("flora", budget=BUDGET, init="hosvd")),
    "FLoRA, 33 layers": Contestant(ours("flora", budget=BUDGET, exclude=UNGROUPED)),
    "LoRA, 33 layers": Contestant(ours("lora", rank=4, exclude=UNGROUPED)),
    "LoRA (PEFT), 33 layers": Contestant(theirs(LoraConfig, r=4, lora_alpha=4)),
    "LoHa (PEFT), 33 layers": Contestant(theirs(LoHaConfig, r=2, alpha=2)),
    "LoKr (PEFT), 33 layers": Contestant(theirs(LoKrConfig, r=16, alpha=16, decompose_factor=4)),
    "head": Contestant(head),
    "full": Contestant(full, rates=(3e-4, 1e-3)),
}


def main() -> None:
    """Run what is missing, and print the table."""
    parser = common.parser(__doc__, Path("docs/results/flora.jsonl"))
    parser.add_argument("--part", default="0/1", help="which share of the runs to do, such as 0/2")
    parser.add_argument("--cost", action="store_true", help="measure step time and memory, and train nothing")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each method that are timed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()  # a new head is meant
    if args.cost:
        common.append(args.results, costs(args))
    else:
        run_missing(args)
    print(table(common.read(args.results)))


def run_missing(args: argparse.Namespace) -> None:
    """Train this part's contestants: every rate with the first seed, the best with the others."""
    pool = pictures(args.assets, "train", TRAIN + VALIDATION)
    train = Pictures(pool.pixels[:TRAIN], pool.classes[:TRAIN])
    validation = Pictures(pool.pixels[TRAIN:], pool.classes[TRAIN:])
    held_out = {"validation": validation, "test": pictures(args.assets, "t10k", TEST)}
    part, parts = (int(n) for n in args.part.split("/"))
    for name, contestant in list(CONTESTANTS.items())[part::parts]:
        for seed in range(contestant.seeds):
            rates = contestant.rates if seed == 0 else (best_rate(name, common.read(args.results)),)
            for rate in rates:
                key = {"method": name, "seed": seed, "rate": rate}
                if not common.is_done(key, common.read(args.results)):
                    row = {**key, **run(contestant, rate, seed, train, held_out, args)}
                    common.append(args.results, [row])
                    print(row, flush=True)


def best_rate(name: str, rows: list[dict[str, Any]]) -> float:
    """Return the rate that was best on the validation pictures, by the first seed."""
    first = [r for r in rows if r["method"] == name and r.get("seed") == 0]
    return float(max(first, key=lambda row: float(row["validation"]))["rate"])


def pictures(assets: Path, name: str, number: int) -> Pictures:
    """Read the first pictures of an IDX file, whose order is random, as EfficientNet-Lite takes them."""
    folder = assets / "fashion-mnist"
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        raw = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)[:number]
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        classes = np.frombuffer(file.read(), np.uint8, offset=8)[:number]
    grey = (torch.from_numpy(raw.copy()).float() - 127) / 128
    large = nn.functional.interpolate(grey, size=(PIXELS, PIXELS), mode="bilinear").expand(-1, 3, -1, -1)
    return Pictures(large, torch.from_numpy(classes.copy()).long())


def loaded(contestant: Contestant, seed: int, assets: Path) -> nn.Module:
    """Return the network with a new head and the method on it, in the memory layout that is fast on a CPU.

    In evaluation mode even in training: no dropped paths, and batch norms keep their statistics.
    """
    torch.manual_seed(seed)  # the new head's start
    path = assets / "efficientnet-lite0"
    model = AutoModelForImageClassification.from_pretrained(
        path, num_labels=CLASSES, ignore_mismatched_sizes=True
    )
    return channels_last(contestant.wrap(channels_last(model), seed).eval())


def channels_last(model: nn.Module) -> nn.Module:
    """Lay the weights of convolutions out as a CPU reads them fastest."""
    return cast(Any, model).to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def trained_numbers(model: nn.Module) -> int:
    """Return how many numbers are trained, the head's left out."""
    named = model.named_parameters()
    return sum(p.numel() for n, p in named if p.requires_grad and "classifier" not in n)


def run(
    contestant: Contestant,
    rate: float,
    seed: int,
    train: Pictures,
    held_out: dict[str, Pictures],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Train and measure."""
    model = loaded(contestant, seed, args.assets)
    start = time.perf_counter()
    fit(model, train, rate, seed)
    seconds = time.perf_counter() - start
    measured = {name: accuracy(model, part) for name, part in held_out.items()}
    return {"trained": trained_numbers(model), "seconds": seconds, **measured}


def fit(model: nn.Module, rows: Pictures, rate: float, seed: int) -> None:
    """Train: AdamW, a short warm-up, then a cosine to zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    count = len(rows.classes)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(EPOCHS)])
    steps = len(order) // BATCH
    for step in tqdm(range(steps), leave=False):
        share = min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * share
        part = order[step * BATCH : (step + 1) * BATCH]
        loss_of(model, rows.pixels[part], rows.classes[part]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def loss_of(model: nn.Module, pixels: Tensor, classes: Tensor) -> Tensor:
    """Return the mean loss of a batch."""
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    return nn.functional.cross_entropy(model(pixel_values=pixels).logits, classes)


def accuracy(model: nn.Module, rows: Pictures) -> float:
    """Return the share of pictures put into their class."""
    right = 0
    parts = (torch.split(tensor, 100) for tensor in (rows.pixels, rows.classes))
    for pixels, classes in zip(*parts, strict=True):
        with torch.no_grad():
            right += int((model(pixel_values=pixels).logits.argmax(1) == classes).sum())
    return right / len(rows.classes)


def costs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return each method's step time and what backward keeps, beside the head's; methods take turns."""
    models = {name: loaded(contestant, 0, args.assets) for name, contestant in CONTESTANTS.items()}
    pixels, classes = torch.randn(BATCH, 3, PIXELS, PIXELS), torch.zeros(BATCH, dtype=torch.long)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(args.rounds + 2)):
        for name, model in models.items():
            start = time.perf_counter()
            loss_of(model, pixels, classes).backward()  # type: ignore[no-untyped-call]
            times[name].append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
    full_time = times["full"][2:]
    return [
        {
            "method": name,
            "step / full": statistics.median(t / f for t, f in zip(times[name][2:], full_time, strict=True)),
            "saved MB": saved_bytes(loss_of(model, pixels, classes), model) / 1e6,
        }
        for name, model in models.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each method: mean and standard deviation over seeds."""
    lines = []
    for name in CONTESTANTS:
        own = [r for r in rows if r["method"] == name and "test" in r]
        if not own:
            continue
        rate = best_rate(name, rows)
        best = [r for r in own if r["rate"] == rate]
        found = [float(r["test"]) for r in best]
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        cost = next((r for r in reversed(rows) if r["method"] == name and "saved MB" in r), None)
        lines.append(
            {
                "method": name,
                "trained": f"{best[0]['trained']:,}",
                "accuracy": f"{statistics.mean(found):.3f}{spread}",
                "rate": f"{rate:g}",
                "seeds": len(found),
                "step / full": f"{cost['step / full']:.2f}" if cost else "",
                "kept for backward (MB)": f"{cost['saved MB']:.0f}" if cost else "",
            }
        )
    return tabulate(lines, "keys", "github", disable_numparse=True)


if __name__ == "__main__":
    main()
