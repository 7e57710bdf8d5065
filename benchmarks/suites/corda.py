"""CorDA here against PEFT's, on SmolLM2 and on one wide layer.

``model``: both start from the same 32 × 512 tokens at rank 16 on all linear layers, in both modes, each in a
process of its own. The first start gathers statistics and keeps them for the second; *solve* is a start that
has them, *statistics* what the first took above that, over a plain forward of the same batches with its head.
PEFT runs one sequence at a time. Peak memory is that of the first start above a plain forward's. *Energy* is
the share of the text's energy that the start holds, ``‖B₀A₀ C‖² / ‖W C‖²``, mean over layers.

``layer``: the solve of one layer of 4096 × 4096 with a moment whose eigenvalues fall as ``1/i``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import lowrank_ft
from benchmarks import language
from benchmarks.measuring import apart, interleaved, resident, timed
from benchmarks.peers import peft_corda
from benchmarks.suite import Lab, Measured, of_parts
from benchmarks.tables import Columns, Table, value
from lowrank_ft import engine, solve
from lowrank_ft.anatomy import sites
from lowrank_ft.calibration.store import Store
from lowrank_ft.modules.layer import layer_of

SEQUENCES, RANK, WIDE, MODES = 32, 16, 4096, ("instruction", "knowledge")
Starts = dict[str, tuple[Tensor, Tensor]]  # each layer's B and A


class CorDA(Protocol):
    """One model on which starts are found; ``batch_size`` sequences run at a time."""

    batch_size: int

    def __init__(self, model: nn.Module, batches: list[dict[str, Tensor]], rank: int) -> None: ...

    def start(self, mode: str) -> Starts:
        """Put the adapter on, and return its start; the first call gathers the statistics."""

    def undo(self) -> None:
        """Take the adapter off again."""


class OurCorDA:
    """CorDA of this package."""

    batch_size = 4

    def __init__(self, model: nn.Module, batches: list[dict[str, Tensor]], rank: int) -> None:
        self._model, self._batches, self._rank = model, batches, rank
        self._cache = tempfile.TemporaryDirectory()

    def start(self, mode: str) -> Starts:
        """Wrap the model, and return each layer's start."""
        settings = {"cache": self._cache.name}
        wrap = partial(lowrank_ft.wrap, self._model, "corda", data=self._batches, calibration=settings)
        wrap(mode=mode, rank=self._rank)
        deltas: dict[str, Any] = {
            name: host.deltas["default"] for name, host in engine.hosts(self._model).items()
        }
        return {name: (d.B.detach() * d.node.scale, d.A.detach()) for name, d in deltas.items()}

    def undo(self) -> None:
        """Unload."""
        lowrank_ft.unload(self._model)


CONTESTANTS: dict[str, type[CorDA]] = {"ours": OurCorDA, "PEFT": peft_corda.PeftCorDA}


def of_model(lab: Lab) -> Measured:
    """Compare the two on the whole model."""
    figures = {name: apart(measured, lab, name) for name in CONTESTANTS}
    for what in figures["ours"]:
        ours, peft = figures["ours"][what], figures["PEFT"][what]
        yield {"what": what}, {"ours": ours, "PEFT": peft, "ours / PEFT": ours / peft if peft else None}


def measured(lab: Lab, name: str) -> dict[str, float]:
    """Return what one of the two takes, and how good its starts are."""
    count, kind = lab.size(SEQUENCES, 2), CONTESTANTS[name]
    model, large = language.load(lab), language.sequences(lab, count)
    language.forward(model, large[:1])
    plain, _ = timed(partial(language.forward, model, large))
    before = resident("VmHWM")
    contestant = kind(model, language.sequences(lab, count, kind.batch_size), RANK)
    first, _ = timed(lambda: contestant.start(MODES[0]))
    peak = (resident("VmHWM") - before) / 1e6
    seconds, starts = {}, {}
    for mode in MODES:
        contestant.undo()
        seconds[mode], starts[mode] = timed(partial(contestant.start, mode))
    energies = energies_of(starts, lab, large)
    return {
        "statistics / plain forward with its head": (first - seconds[MODES[0]]) / plain,
        **{f"solve, {mode} (s)": seconds[mode] for mode in MODES},
        "peak memory above a plain forward's (MB)": peak,
        **{f"energy of the start, {mode} (%)": energies[mode] for mode in MODES},
    }


def energies_of(starts: dict[str, Starts], lab: Lab, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return each start's energy in percent, mean over layers, under the exact moments of the inputs."""
    model = language.load(lab)
    energies = dict.fromkeys(starts, 0.0)
    with tempfile.TemporaryDirectory() as cache:
        lowrank_ft.wrap(model, "corda", rank=1, data=batches, calibration={"cache": cache})
        lowrank_ft.unload(model)
        (moments,) = Path(cache).glob("inputs-*")
        store, layers = Store(moments), sites.select(model)
        for site in layers:
            C = store.read(site.names[0])["C"]
            W = layer_of(site.modules[0]).matrix().detach().double()
            for mode, start in starts.items():
                B, A = (factor.double() for factor in start[site.names[0]])
                share = (B @ (A @ C)).square().sum() / (W @ C).square().sum()
                energies[mode] += 100 * float(share) / len(layers)
    return energies


def of_layer(lab: Lab) -> Measured:
    """Compare the solves of one wide layer; interleaved, medians."""
    size, generator = lab.size(WIDE, 256), torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator) / size**0.5
    mix, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
    C = (mix / torch.arange(1, size + 1)) @ mix.T
    steps: dict[str, Callable[[], object]] = {"PEFT": partial(peft_corda.solve, weight, C)}
    for mode in MODES:
        last, exact = mode == "knowledge", C.double()
        steps[mode] = partial(solve.output_directions, weight, exact, RANK, squared=True, last=last)
    times = interleaved(steps, lab.size(3, 1))
    for mode in MODES:
        figures = {"ours": times.median(mode), "PEFT": times.median("PEFT")}
        figures["ours / PEFT"] = times.ratio(mode, "PEFT")
        yield {"what": f"one layer of {WIDE} × {WIDE}, {mode} (s)"}, figures


COLUMNS: Columns = {"": value("what"), **dict.fromkeys(("ours", "PEFT", "ours / PEFT"), ".4g")}
SUITE = of_parts({"model": of_model, "layer": of_layer}, {"costs": Table(("what",), COLUMNS)}, quick="layer")
