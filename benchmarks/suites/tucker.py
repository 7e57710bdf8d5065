"""A Tucker update run as three small products, as a dense ΔW beside the layer, or added to the weight.

One forward and backward of a frozen layer with a trained FLoRA (batch 16; 512 tokens), in each of the three
ways, over that of the layer with nothing on it; interleaved, medians. *plan* is the way that counting
multiplications chooses; the factored way of a linear layer is LoRA's fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import lowrank_ft
from benchmarks.measuring import interleaved
from benchmarks.pictures import channels_last
from benchmarks.suite import Key, Lab, Measured, Suite
from benchmarks.tables import Table
from lowrank_ft import engine
from lowrank_ft.algorithms.flora import FLoRADelta, Work
from lowrank_ft.modules.layer import ConvLayer

RANKS, ROUNDS = (4, 16, 64), 15
WAYS = {"factored": Work(0, 1, 2), "dense": Work(1, 0, 2), "joined": Work(2, 1, 0)}
Case = tuple[Callable[[], nn.Module], tuple[int, ...]]  # builds the layer; the shape of its input


def conv(inputs: int, outputs: int, kernel: int, size: int, *, groups: int = 1, stride: int = 1) -> Case:
    """Return a convolution with its maps padded, and its input of 16 maps of that size."""
    layer = partial(nn.Conv2d, inputs, outputs, kernel, stride, kernel // 2, groups=groups)
    return layer, (16, inputs, size, size)


CASES: dict[str, Case] = {
    "linear 576 → 1536": (lambda: nn.Linear(576, 1536), (512, 576)),
    "1×1, 96 → 576, 12²": conv(96, 576, 1, 12),
    "3×3, 64 → 64, 24²": conv(64, 64, 3, 24),
    "3×3, 256 → 256, 12²": conv(256, 256, 3, 12),
    "3×3, 3 → 32, 96², stride 2": conv(3, 32, 3, 96, stride=2),
    "3×3, 128 → 128, 2 groups": conv(128, 128, 3, 12, groups=2),
    "3×3, 128 → 128, 32 groups": conv(128, 128, 3, 12, groups=32),
    "3×3 depthwise, 576, 6²": conv(576, 576, 3, 6, groups=576),
    "5×5 depthwise, 240, 12²": conv(240, 240, 5, 12, groups=240),
    "7×7 depthwise, 96, 24²": conv(96, 96, 7, 24, groups=96),
    "4×4 transposed, 128 → 64, 12²": (lambda: nn.ConvTranspose2d(128, 64, 4, 2, 1), (16, 128, 12, 12)),
}


class Single(nn.Module):
    """A layer, and nothing around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        out: Tensor = self.layer(x)
        return out


def measure(job: Key, lab: Lab) -> Measured:
    """Yield the times of each way, over those of the layer alone."""
    build, shape = CASES[job["layer"]]
    torch.manual_seed(0)
    alone = channels_last(Single(build()).requires_grad_(False))
    x = torch.randn(shape)
    x = (x.to(memory_format=torch.channels_last) if x.dim() == 4 else x).requires_grad_()
    updated = channels_last(Single(build()))
    lowrank_ft.wrap(updated, "flora", targets="layer", rank=job["rank"])
    delta: Any = engine.hosts(updated)["layer"].deltas["default"]
    with torch.no_grad():
        delta.core.normal_(std=1e-3)

    def step(model: nn.Module, way: str = "") -> None:
        with forced(way, delta):
            x.grad = None
            torch.autograd.backward(model(x).sum())

    steps = {"alone": partial(step, alone), **{way: partial(step, updated, way) for way in WAYS}}
    times = interleaved(steps, lab.size(ROUNDS, 1), warm_up=2)
    yield {}, {**{way: times.ratio(way, "alone") for way in WAYS}, "plan": plan(delta, x)}


def forced(way: str, delta: FLoRADelta) -> AbstractContextManager[Any]:
    """Let the update run in a way; a linear layer's dense way is its matrix."""
    stack = ExitStack()
    if way and isinstance(delta.layer, ConvLayer):
        stack.enter_context(mock.patch.object(Work, "of", return_value=WAYS[way]))
    elif way in ("dense", "joined"):
        stack.enter_context(mock.patch.object(FLoRADelta, "as_lora", return_value=None))
        joins = mock.patch.object(FLoRADelta, "joins_weight", return_value=way == "joined")
        stack.enter_context(joins)
    return stack


def plan(delta: FLoRADelta, x: Tensor) -> str:
    """Return the way that the update takes by itself."""
    if not isinstance(delta.layer, ConvLayer):
        return "fused"
    work = Work.of(delta.layer, delta.node.ranks, x)
    return min(WAYS, key=lambda way: getattr(work, way))


COLUMNS = {"layer": "", "rank": "", **dict.fromkeys(WAYS, ".2f"), "plan": ""}
JOBS = [{"layer": layer, "rank": rank} for layer in CASES for rank in RANKS]
SUITE = Suite(lambda rows: JOBS, measure, {"ways": Table(("layer", "rank"), COLUMNS)}, quick=JOBS[7])
