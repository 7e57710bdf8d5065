"""Pictures of clothes (Fashion-MNIST) and what classifiers of them share."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks.suite import Lab

CLASSES = 10


@dataclass(frozen=True)
class Pictures:
    """Pixels ``(n, 3, height, width)`` and classes."""

    pixels: Tensor
    classes: Tensor

    def __getitem__(self, part: slice | Tensor) -> Pictures:
        return Pictures(self.pixels[part], self.classes[part])

    def __len__(self) -> int:
        return len(self.classes)


def clothes(lab: Lab, name: str, number: int, prepared: Callable[[Tensor], Tensor]) -> Pictures:
    """Read the first pictures of a file, whose order is random.

    Args:
        lab: where the assets are.
        name: ``train`` or ``t10k``.
        number: how many.
        prepared: turns grey pictures ``(n, 1, 28, 28)`` from 0 … 255 into what a network takes.
    """
    folder = lab.assets / "fashion-mnist"
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        raw = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)[:number]
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)[:number]
    return Pictures(prepared(torch.from_numpy(raw.copy()).float()), torch.from_numpy(labels.copy()).long())


def enlarged(grey: Tensor, size: int) -> Tensor:
    """Turn grey pictures into ones of three channels and ``size`` pixels a side."""
    return interpolate(grey, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)


def as_dinov2(grey: Tensor) -> Tensor:
    """Return 98 × 98 pixels, normalised as DINOv2 was trained; it interpolates its positions itself."""
    mean, deviation = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    return (enlarged(grey / 255, 98) - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)


def channels_last(model: nn.Module) -> nn.Module:
    """Lay the weights of convolutions out as a CPU reads them fastest."""
    return cast(nn.Module, cast(Any, model).to(memory_format=torch.channels_last))
