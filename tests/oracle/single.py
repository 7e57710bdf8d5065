"""A model of one layer, in float64, which the oracles wrap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft import engine
from tests.oracle.moments import randn


class Single(nn.Module):
    """A layer, and nothing around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def linear(out: int = 7, into: int = 11) -> Single:
    model = Single(nn.Linear(into, out, dtype=torch.float64))
    with torch.no_grad():
        model.layer.weight.copy_(randn(out, into, seed=3))
    return model.eval()


def delta_of(model: nn.Module, layer: str = "layer") -> Any:
    return engine.hosts(model)[layer].deltas["default"]
