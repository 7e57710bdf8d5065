"""Tucker compression of a real network: how often the compressed one says what the dense one does.

EfficientNet-Lite0 with its ImageNet head looks at real photos (CIFAR-10's, at 128 × 128 pixels). Of the
parameters of its 49 convolutions 20% or 40% are removed, from the 33 without groups; calibration sees 256
photos and no labels. *Agreement* is the share of 1000 other photos that get the dense network's class of the
1000 of ImageNet; *divergence* is that of its probabilities, in nats. Then a short recovery: in one pass over
2000 photos the compressed convolutions learn the dense network's probabilities; batch norms keep theirs.

    python scripts/prepare_encoders.py .cache/assets --cifar
    python scripts/bench_convolutions.py

Rows that are in the results file are not run again.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import datasets
import numpy as np
import torch
from bench_flora import channels_last
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.functional import interpolate, kl_div
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification
from transformers.utils import logging

import lowrank_ft
from lowrank_ft.manifest import replacements

PIXELS, BATCH = 128, 32
CALIBRATION, RECOVERY, TEST = 256, 2000, 1000
RATE = 1e-4
OPTIONS: dict[str, dict[str, Any]] = {
    "HOSVD of the weights": {"objective": "weight"},
    "Tucker, by output": {"objective": "output"},
    "Tucker, by loss": {"objective": "loss"},
}


@dataclass(frozen=True)
class Answers:
    """Photos ``(n, 3, 128, 128)`` and the dense network's logits on them."""

    pixels: Tensor
    logits: Tensor


def main() -> None:
    """Run what is missing, and print the table."""
    parser = common.parser(__doc__, Path("docs/results/convolutions.jsonl"))
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    dense = loaded(args.assets)
    folder = args.assets / "cifar10"
    pictures = (photos(folder / "train.parquet", RECOVERY), photos(folder / "heldout.parquet", TEST))
    train, test = (Answers(pixels, answers(dense, pixels)) for pixels in pictures)
    for ratio in args.ratios:
        for name, options in OPTIONS.items():
            key = {"method": name, "ratio": ratio}
            if not common.is_done(key, common.read(args.results)):
                row = {**key, **run(options, ratio, train, test, args)}
                common.append(args.results, [row])
                print(row, flush=True)
    print(table(common.read(args.results)))


def loaded(assets: Path) -> nn.Module:
    """Return the network, as it predicts."""
    model = AutoModelForImageClassification.from_pretrained(assets / "efficientnet-lite0")
    return channels_last(model.eval())


def photos(path: Path, number: int) -> Tensor:
    """Read photos, as EfficientNet-Lite takes them."""
    rows = datasets.load_dataset("parquet", data_files=str(path), split=f"train[:{number}]")
    small = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]]))
    pixels = (small.movedim(-1, 1).float() - 127) / 128
    return interpolate(pixels, size=(PIXELS, PIXELS), mode="bicubic").contiguous(
        memory_format=torch.channels_last
    )


def answers(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the logits of all photos."""
    with torch.no_grad():
        parts = [model(pixel_values=part).logits for part in tqdm(torch.split(pixels, 100), leave=False)]
    return torch.cat(parts)


def run(
    options: dict[str, Any], ratio: float, train: Answers, test: Answers, args: argparse.Namespace
) -> dict[str, Any]:
    """Compress, measure, recover, measure."""
    model = loaded(args.assets)
    convolutions = [m for n, m in model.named_modules() if is_convolution(n, m)]
    every = sum(m.weight.numel() for m in convolutions)
    plain = sum(m.weight.numel() for m in convolutions if m.groups == 1)
    data = [{"pixel_values": part} for part in torch.split(train.pixels[:CALIBRATION], BATCH)]
    given: dict[str, Any] = {} if options["objective"] == "weight" else {"data": data}
    start = time.perf_counter()
    lowrank_ft.wrap(
        model,
        "tucker",
        targets="all-conv",
        exclude=["*squeeze_excite*", "*depthwise_conv"],
        ratio=ratio * every / plain,
        ratio_of="targets",
        calibration={"gradient_samples": CALIBRATION},
        **options,
        **given,
    )
    seconds = time.perf_counter() - start
    left = [m for n, m in model.named_modules() if is_convolution(n, m)]
    removed = 1 - sum(m.weight.numel() for m in left) / every
    found = {"removed": removed, "seconds": seconds, "before": compared(model, test)}
    recover(model, train)
    return {**found, "after": compared(model, test)}


def is_convolution(name: str, module: nn.Module) -> bool:
    """Whether a module is one of the network's own convolutions; its gates are the identity."""
    return isinstance(module, nn.Conv2d) and "squeeze_excite" not in name


def compared(model: nn.Module, test: Answers) -> dict[str, float]:
    """Return how often the model says what the dense one does, and how far its probabilities are."""
    logits = answers(model.eval(), test.pixels)
    same = (logits.argmax(1) == test.logits.argmax(1)).float().mean()
    apart = divergence(logits, test.logits)
    return {"agreement": float(same), "divergence": float(apart)}


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean KL divergence from the wanted probabilities."""
    return kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)


def recover(model: nn.Module, train: Answers) -> None:
    """Teach the compressed convolutions the dense network's probabilities; batch norms keep theirs."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    factors = [p for module in replacements(model).values() for p in module.parameters()]
    for parameter in factors:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(factors, weight_decay=0)
    order = torch.randperm(len(train.logits), generator=torch.Generator().manual_seed(0))
    steps = len(order) // BATCH
    for step in tqdm(range(steps), leave=False):
        share = min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * share
        part = order[step * BATCH : (step + 1) * BATCH]
        loss = divergence(model(pixel_values=train.pixels[part]).logits, train.logits[part])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each row."""
    lines = [
        {
            "method": row["method"],
            "of 49 convolutions removed": f"{row['removed']:.1%}",
            **{
                f"{what}{when}": f"{row[step][what]:.3f}"
                for what in ("agreement", "divergence")
                for step, when in (("before", ""), ("after", ", recovered"))
            },
        }
        for row in rows
    ]
    return tabulate(lines, "keys", "github", disable_numparse=True)


if __name__ == "__main__":
    main()
