"""The training loop of all suites: AdamW without weight decay, a schedule, and batches in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

Schedule = Callable[[Optimizer], LRScheduler]
Groups = list[tuple[list[nn.Parameter], float]]  # parameters, and the learning rate of each group


def cosine(steps: int, warm_up: int = 10) -> Schedule:
    """Return a schedule: a short warm-up, and a cosine to zero."""

    def share(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return partial(LambdaLR, lr_lambda=share)


def constant(warm_up: int) -> Schedule:
    """Return a schedule: a warm-up, and no decay after it."""
    return partial(LambdaLR, lr_lambda=lambda step: min(1.0, (step + 1) / warm_up))


def one_cycle(steps: int, rate: float) -> Schedule:
    """Return torch's schedule of one cycle up to a rate, a tenth of it to warm up."""
    return partial(OneCycleLR, max_lr=rate, total_steps=steps, pct_start=0.1)


def drawn(count: int, size: int, steps: int, seed: int = 0) -> list[Tensor]:
    """Return the indices of so many batches: epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * size // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    return list(torch.split(order[: steps * size], size))


def trainable(model: nn.Module, rate: float) -> Groups:
    """Return one group: all that trains."""
    return [([p for p in model.parameters() if p.requires_grad], rate)]


def descend(
    groups: Groups, losses: Iterable[Callable[[], Tensor]], schedule: Schedule, clip: float = 0.0
) -> Iterator[int]:
    """Make a step for each loss, its gradients clipped to a norm; yield the number of steps after each."""
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for p, rate in groups], weight_decay=0.0)
    scheduler = schedule(optimizer)
    for number, loss in enumerate(losses, 1):
        torch.autograd.backward(loss())
        if clip:
            nn.utils.clip_grad_norm_([p for parameters, _ in groups for p in parameters], clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        yield number


def train(
    groups: Groups, losses: Iterable[Callable[[], Tensor]], schedule: Schedule, clip: float = 0.0
) -> None:
    """Make all steps."""
    for _ in descend(groups, losses, schedule, clip):
        pass
