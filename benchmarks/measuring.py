"""Time, memory, and runs in a process of their own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def timed(step: Callable[[], T]) -> tuple[float, T]:
    """Return how many seconds a step took, and what it gave."""
    started = time.perf_counter()
    result = step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


@dataclass(frozen=True)
class Times:
    """Seconds of each contestant, one for each round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median over the rounds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """Return the median of the rounds' ratios, so that a slow spell of the machine cancels."""
        rounds = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(own / other for own, other in rounds)


def interleaved(steps: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> Times:
    """Time each step once a round, after a few rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + warm_up):
        for name, step in steps.items():
            taken, _ = timed(step)
            if number >= warm_up:
                seconds[name].append(taken)
    return Times(seconds)


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a fresh process with as many threads, so that its memory is its own."""
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        return pool.submit(function, *arguments).result()


def resident(what: str = "VmRSS") -> int:
    """Return the bytes of this process that are in memory: now (``VmRSS``) or at most so far (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def forget_peak() -> None:
    """Let the peak of resident memory start again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def saved_bytes(loss: Tensor, model: nn.Module) -> int:
    """Return the bytes that the graph behind ``loss`` keeps for backward and the model does not own.

    They are found by walking the graph. Counting with saved-tensor hooks gives the same for the floor and
    PEFT, but under hooks ours keeps the SwiGLU product, which it otherwise multiplies again.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _saved_tensors(loss)}
    return sum(size for pointer, size in kept.items() if pointer not in own)


def _saved_tensors(loss: Tensor) -> Iterator[Tensor]:
    """Yield every tensor that a node of the graph keeps."""
    stack: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in (*kept, *getattr(node, "saved_tensors", ())):
            yield from (
                v for v in (value if isinstance(value, (list, tuple)) else [value]) if torch.is_tensor(v)
            )
        stack += [parent for parent, _ in node.next_functions]
