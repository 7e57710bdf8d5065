"""A Tucker update run as three small products, as a dense ΔW beside the layer, or added to the weight.

One forward and backward of a frozen layer with a trained FLoRA, in each of the three ways, over that of the
layer with nothing on it; ways take turns, medians. *plan* is the way that counting multiplications chooses.

    python scripts/bench_tucker.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import common
import torch
from bench_flora import channels_last
from tabulate import tabulate
from torch import Tensor, nn
from tqdm.auto import tqdm

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.algorithms.flora import FLoRADelta, Work
from lowrank_ft.modules.layer import ConvLayer

WAYS = {"factored": Work(0, 1, 2), "dense": Work(1, 0, 2), "joined": Work(2, 1, 0)}


@dataclass(frozen=True)
class Case:
    """A layer, and the shape of its input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


CASES = {
    "linear 576 → 1536": Case(lambda: nn.Linear(576, 1536), (512, 576)),
    "1×1, 96 → 576, 12²": Case(lambda: nn.Conv2d(96, 576, 1), (16, 96, 12, 12)),
    "3×3, 64 → 64, 24²": Case(lambda: nn.Conv2d(64, 64, 3, padding=1), (16, 64, 24, 24)),
    "3×3, 256 → 256, 12²": Case(lambda: nn.Conv2d(256, 256, 3, padding=1), (16, 256, 12, 12)),
    "3×3, 3 → 32, 96², stride 2": Case(lambda: nn.Conv2d(3, 32, 3, 2, 1), (16, 3, 96, 96)),
    "3×3, 128 → 128, 2 groups": Case(lambda: nn.Conv2d(128, 128, 3, padding=1, groups=2), (16, 128, 12, 12)),
    "3×3, 128 → 128, 32 groups": Case(
        lambda: nn.Conv2d(128, 128, 3, padding=1, groups=32), (16, 128, 12, 12)
    ),
    "3×3 depthwise, 576, 6²": Case(lambda: nn.Conv2d(576, 576, 3, padding=1, groups=576), (16, 576, 6, 6)),
    "5×5 depthwise, 240, 12²": Case(lambda: nn.Conv2d(240, 240, 5, padding=2, groups=240), (16, 240, 12, 12)),
    "7×7 depthwise, 96, 24²": Case(lambda: nn.Conv2d(96, 96, 7, padding=3, groups=96), (16, 96, 24, 24)),
    "4×4 transposed, 128 → 64, 12²": Case(lambda: nn.ConvTranspose2d(128, 64, 4, 2, 1), (16, 128, 12, 12)),
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


def main() -> None:
    """Measure, and print the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(name, rank, args) for name in tqdm(CASES) for rank in args.ranks]
    common.append(args.results, rows)
    shown = [{k: f"{v:.2f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    print(tabulate(shown, "keys", "github", disable_numparse=True))
    conv = [row for row in rows if row["plan"] != "fused"]
    agrees = sum(row[row["plan"]] <= 1.05 * min(row[way] for way in WAYS) for row in conv)
    print(f"The plan is within 5% of the fastest way in {agrees} of {len(conv)} convolutions.")


def measure(name: str, rank: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return one layer's times by way, over those of the layer alone."""
    case = CASES[name]
    torch.manual_seed(0)
    model = channels_last(Single(case.build()).requires_grad_(False))
    x = torch.randn(case.shape)
    x = (x.to(memory_format=torch.channels_last) if x.dim() == 4 else x).requires_grad_()
    with_update = channels_last(Single(case.build()))
    lowrank_ft.wrap(with_update, "flora", targets="layer", rank=rank)
    delta = engine.hosts(with_update)["layer"].deltas["default"]
    with torch.no_grad():
        delta.core.normal_(std=1e-3)
    runs = {"alone": partial(step, model, x)}
    runs.update({way: partial(step_by, work, with_update, x, delta) for way, work in WAYS.items()})
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(args.rounds + 2):
        for way, run in runs.items():
            times[way].append(run())
    base = times["alone"][2:]
    ratios = {w: statistics.median(t / b for t, b in zip(times[w][2:], base, strict=True)) for w in WAYS}
    return {"layer": name, "rank": rank, **ratios, "plan": plan(delta, x)}


def step(model: nn.Module, x: Tensor) -> float:
    """Return the seconds of a forward and a backward."""
    x.grad = None
    start = time.perf_counter()
    loss: Tensor = model(x).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return time.perf_counter() - start


def step_by(work: Work, model: nn.Module, x: Tensor, delta: FLoRADelta) -> float:
    """Run a step in the way that is least by ``work``; a linear layer's dense way is its matrix."""
    if isinstance(delta.layer, ConvLayer):
        with mock.patch.object(Work, "of", return_value=work):
            return step(model, x)
    if work == WAYS["factored"]:
        return step(model, x)
    joined = work == WAYS["joined"]
    with (
        mock.patch.object(FLoRADelta, "as_lora", return_value=None),
        mock.patch.object(FLoRADelta, "joins_weight", return_value=joined),
    ):
        return step(model, x)


def plan(delta: FLoRADelta, x: Tensor) -> str:
    """Return the way that the update would run by itself."""
    if not isinstance(delta.layer, ConvLayer):
        return "fused"
    work = Work.of(delta.layer, delta.node.ranks, x)
    return min(WAYS, key=lambda way: getattr(work, way))


if __name__ == "__main__":
    main()
