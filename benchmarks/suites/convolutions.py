"""Tucker compression of a real network: how often the compressed one says what the dense one does.

EfficientNet-Lite0 with its ImageNet head looks at real photos (CIFAR-10's, at 128 × 128 pixels). Of the
parameters of its 49 convolutions 20% or 40% are removed, from the 33 without groups; calibration sees 256
photos and no labels. *Agreement* is the share of 1000 other photos that get the dense network's class of the
1000 of ImageNet; *divergence* is that of its probabilities, in nats. Then a short recovery: in one pass over
2000 photos the compressed convolutions learn the dense network's probabilities; batch norms keep theirs.

    python scripts/prepare_encoders.py .cache/assets --cifar
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, kl_div
from transformers import AutoModelForImageClassification

import lowrank_ft
from benchmarks.measuring import timed
from benchmarks.pictures import channels_last
from benchmarks.suite import Key, Lab, Measured, Suite
from benchmarks.tables import Columns, Table, value
from benchmarks.training import cosine, drawn, train, trainable
from lowrank_ft.structure.manifest import replacements

BATCH, CALIBRATION, RATE = 32, 256, 1e-4
PHOTOS = {"train": 2000, "heldout": 1000}
OBJECTIVES = {"HOSVD of the weights": "weight", "Tucker, by output": "output", "Tucker, by loss": "loss"}
COVERED = {"targets": "all-conv", "exclude": ["*squeeze_excite*", "*depthwise_conv"], "ratio_of": "targets"}


def load(lab: Lab) -> nn.Module:
    """Return the network, as it predicts."""
    model = AutoModelForImageClassification.from_pretrained(lab.assets / "efficientnet-lite0")
    return channels_last(model.eval())


@cache
def photos(lab: Lab, part: str) -> tuple[Tensor, Tensor]:
    """Return photos as EfficientNet-Lite takes them, and the dense network's logits on them."""
    number, path = lab.size(PHOTOS[part], BATCH), lab.assets / f"cifar10/{part}.parquet"
    rows = datasets.load_dataset("parquet", data_files=str(path), split=f"train[:{number}]")
    small = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]]))
    large = interpolate((small.movedim(-1, 1).float() - 127) / 128, size=(128, 128), mode="bicubic")
    pixels = large.contiguous(memory_format=torch.channels_last)
    return pixels, answers(load(lab), pixels)


def answers(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the logits of all photos."""
    with torch.no_grad():
        return torch.cat([model(pixel_values=part).logits for part in torch.split(pixels, 100)])


def measure(job: Key, lab: Lab) -> Measured:
    """Compress, measure, recover, measure."""
    model, (pixels, logits) = load(lab), photos(lab, "train")
    every, plain = weights_of(model), weights_of(model, groups=1)
    options: dict[str, Any] = {**COVERED, "objective": OBJECTIVES[job["method"]]}
    options["calibration"] = {"gradient_samples": CALIBRATION}
    if options["objective"] != "weight":
        options["data"] = [{"pixel_values": part} for part in torch.split(pixels[:CALIBRATION], BATCH)]
    wrap = partial(lowrank_ft.wrap, model, "tucker", ratio=job["ratio"] * every / plain, **options)
    seconds, _ = timed(wrap)
    removed, before = 1 - weights_of(model) / every, compared(model, lab)
    model.requires_grad_(False)
    for module in replacements(model).values():
        module.requires_grad_(True)

    def loss_of(part: Tensor) -> Tensor:
        return divergence(model(pixel_values=pixels[part]).logits, logits[part])

    steps = len(logits) // BATCH
    losses = (partial(loss_of, part) for part in drawn(len(logits), BATCH, steps))
    train(trainable(model, RATE), losses, cosine(steps, warm_up=5))
    after = {f"{what}, recovered": figure for what, figure in compared(model, lab).items()}
    yield {}, {"removed": removed, "seconds": seconds, **before, **after}


def weights_of(model: nn.Module, groups: int = 0) -> int:
    """Return the numbers in the network's own convolutions, or those with so many groups; its gates are 1."""
    named = [
        (n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and "squeeze_excite" not in n
    ]
    return sum(m.weight.numel() for _, m in named if groups in (0, m.groups))


def compared(model: nn.Module, lab: Lab) -> dict[str, float]:
    """Return how often the model says what the dense one does, and how far its probabilities are."""
    pixels, dense = photos(lab, "heldout")
    logits = answers(model.eval(), pixels)
    same = (logits.argmax(1) == dense.argmax(1)).float().mean()
    return {"agreement": float(same), "divergence": float(divergence(logits, dense))}


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean KL divergence from the wanted probabilities."""
    return kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)


FIGURES = ("agreement", "agreement, recovered", "divergence", "divergence, recovered")
COLUMNS: Columns = {
    "method": "",
    "of 49 convolutions removed": value("removed", ".1%"),
    **dict.fromkeys(FIGURES, ".3f"),
}
JOBS = [{"method": method, "ratio": ratio} for ratio in (0.2, 0.4) for method in OBJECTIVES]
SUITE = Suite(lambda rows: JOBS, measure, {"agreement": Table(("method", "ratio"), COLUMNS)}, quick=JOBS[2])
