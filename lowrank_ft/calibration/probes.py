"""Measure how far a model's output moves when one layer, or one group of layers, is disturbed or replaced.

Only forward passes are needed, and the blocks before the changed one do not run again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_ft.calibration import stream
from lowrank_ft.calibration.batches import Batch, count_tokens, mask_of
from lowrank_ft.calibration.losses import divergence
from lowrank_ft.calibration.store import Store
from lowrank_ft.calibration.stream import Chain

_NOISE = 0.1  # standard deviation of the probe, relative to the output's root mean square

Outputs = Callable[[], Iterator[Any]]  # the model's output on each batch


def sensitivities(
    model: nn.Module,
    chain: Chain | None,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    store: Store,
) -> None:
    """Store each layer's sensitivity: the divergence of the model's output per squared error at the layer's.

    White noise is added to one layer's output at a time, and the divergence of the model's output
    (:func:`~lowrank_ft.calibration.losses.divergence`, in nats per token) is divided by the noise's energy.
    Unlike the loss's own rise the divergence is never negative, needs no labels, and has no first-order part.

    Args:
        model: in eval mode.
        chain: its blocks, or None.
        modules: the layers, by name.
        batches: the data; the model runs all of them once for each layer.
        store: receives the sensitivities; layers that it has already are not probed again.
    """
    missing = {name: module for name, module in modules.items() if name not in store}
    tokens = count_tokens(batches)
    with tqdm(total=len(missing), desc="Probing", unit="layer", leave=False) as progress:
        for block, names, outputs in _by_block(model, chain, list(missing), batches):
            dense = list(outputs())
            tensors = {}
            for name in names:
                moved = _per_energy(missing[name], outputs, dense, batches) / tokens
                tensors[f"{name}|sensitivity"] = torch.tensor(moved, dtype=torch.float64)
                progress.update()
            store.put(f"{block:04d}", tensors, {name: name for name in names})


def divergences(
    model: nn.Module,
    chain: Chain | None,
    changes: Mapping[str, Callable[[], AbstractContextManager[None]]],
    batches: Sequence[Batch],
) -> dict[str, float]:
    """Return how far the model's output moves under each change alone, in nats per token.

    Args:
        model: in eval mode.
        chain: its blocks, or None.
        changes: by the name of the first module that changes, a function that returns a context manager,
            which makes the change on entry and undoes it on exit.
        batches: the data; the model runs all of them once for each change.
    """
    tokens, moved = count_tokens(batches), dict[str, float]()
    with tqdm(total=len(changes), desc="Measuring", unit="site", leave=False) as progress:
        for _, names, outputs in _by_block(model, chain, list(changes), batches):
            dense = list(outputs())
            for name in names:
                with changes[name]():
                    moved[name] = _moved(dense, outputs, batches) / tokens
                progress.update()
    return moved


def _by_block(
    model: nn.Module, chain: Chain | None, names: Sequence[str], batches: Sequence[Batch]
) -> Iterator[tuple[int, list[str], Outputs]]:
    """Yield each block that contains some of the names: its index, these names, and its ``Outputs``.

    ``Outputs`` runs the model from this block on. Names outside all blocks are yielded with the first block.
    """
    if not names:
        return
    groups = stream.by_block(chain, names)
    device = next(model.parameters()).device
    states: list[Any] = [None] * len(batches)

    def outputs(k: int) -> Iterator[Any]:
        for i, batch in enumerate(batches):
            before = stream.onload(states[i], device) if k else None
            yield stream.forward(model, batch) if chain is None else chain.resume(k, batch, before)

    for k in range(1 if chain is None else len(chain)):
        in_block = list(groups.get(None if chain is None else k, ()))
        if chain is not None and k == 0:
            in_block += groups.get(None, ())
        with torch.no_grad():
            if in_block:
                yield k, in_block, partial(outputs, k)
            if chain is not None:
                states = [
                    stream.offload(chain.run(k, batch, stream.onload(states[i], device)), chain.shelf)
                    for i, batch in enumerate(batches)
                ]


def _per_energy(module: nn.Module, outputs: Outputs, dense: Sequence[Any], batches: Sequence[Batch]) -> float:
    """Return the summed divergence per unit of mean squared error at a module's output."""
    generator = torch.Generator().manual_seed(0)
    energies: list[float] = []

    def disturb(m: nn.Module, args: Any, out: Tensor) -> Tensor:
        spread = _NOISE * out.double().square().mean().sqrt()
        noise = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device) * spread
        energies.append(float(noise.square().sum(-1).mean()))
        return out + noise.to(out.dtype)

    with stream.hooks([module.register_forward_hook(disturb)]):
        moved = _moved(dense, outputs, batches)
    energy = sum(energies) / max(len(energies), 1)
    return moved / energy if energy > 0 else 0.0


def _moved(dense: Sequence[Any], outputs: Outputs, batches: Sequence[Batch]) -> float:
    """The divergence between the model's output before the change and now, summed over all positions."""
    return sum(
        divergence(before, after, mask_of(batch))
        for before, after, batch in zip(dense, outputs(), batches, strict=True)
    )
