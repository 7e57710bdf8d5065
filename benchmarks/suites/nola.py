"""NOLA's optimiser step against our own LoRA's at the same rank, on SmolLM2, and what its basis costs.

``step``: forward and backward of 2 × 256 tokens, AdamW, gradients to zero; interleaved, medians. ``bases``:
what of a step builds all factors (combine) and projects all their gradients (project), with the compiled
kernel and with plain torch; and a switch from one adapter to another whose factors are not built yet, up to
a forward's first need. ``peak``: peak memory of three steps above the loaded model, each in a process of
its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import lowrank_ft
from benchmarks import language
from benchmarks.contestants import ours
from benchmarks.measuring import apart, forget_peak, interleaved, resident, timed
from benchmarks.suite import Lab, Measured, Row, of_parts
from benchmarks.tables import Columns, Table, value
from lowrank_ft import basis, engine
from lowrank_ft.basis import cpu, gpu, philox

RANK, BASES, BATCH, LENGTH, ROUNDS = 16, 128, 2, 256, 15
METHODS = {"LoRA": ours("lora", rank=RANK), "NOLA": ours("nola", rank=RANK, bases=BASES)}


def stepper(lab: Lab, method: str) -> Callable[[], None]:
    """Return what runs one step of the optimiser on a fresh model."""
    model = METHODS[method](language.load(lab), seed=0).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (BATCH, lab.size(LENGTH, 16)), generator=generator).to(lab.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        torch.autograd.backward(language.loss_of(model, ids))
        optimizer.step()
        optimizer.zero_grad()

    return step


def of_step(lab: Lab) -> Measured:
    """Compare whole steps."""
    steps = {method: stepper(lab, method) for method in METHODS}
    times = interleaved(steps, lab.size(ROUNDS, 1), warm_up=2)
    medians = {method: 1e3 * times.median(method) for method in METHODS}
    yield {"what": "step (ms)"}, {**medians, "NOLA / LoRA": times.ratio("NOLA", "LoRA")}


def of_bases(lab: Lab) -> Measured:
    """Time building and projecting, and switching."""
    model = METHODS["NOLA"](language.load(lab), seed=0).train()
    deltas = [host.deltas["default"] for host in engine.hosts(model).values()]
    factors: list[Any] = [f for d in deltas for f in ((d.A, d.coefficients_A), (d.B, d.coefficients_B))]
    entries = sum(c.shape[0] * c.shape[1] * (f.numel() + 1) for c, f in factors)
    gradients = [torch.randn(c.shape, device=lab.device) for c, _ in factors]
    whole = [torch.cat([f.new_ones(1), f.detach()]) for _, f in factors]

    def combine(backend: Any) -> None:
        for (c, _), f in zip(factors, whole, strict=True):
            backend.combine(c.stream, f, c.shape[0] * c.shape[1], c.scale)

    def project(backend: Any) -> None:
        for (c, f), g in zip(factors, gradients, strict=True):
            backend.project(c.stream, g.flatten(), f.numel() + 1, c.scale)

    for name, backend in {fastest(lab): basis, "plain torch": philox}.items():
        rounds = 1 if name == "plain torch" else lab.size(ROUNDS, 1)
        for run in (combine, project):
            run(backend)
            seconds = statistics.median(timed(partial(run, backend))[0] for _ in range(rounds))
            figures = {"NOLA": 1e3 * seconds, "G entries/s": entries / seconds / 1e9}
            yield {"what": f"{run.__name__} all bases by {name} (ms)"}, figures
    first, later = switching(model)
    yield {"what": "switch, first and later (ms)"}, {"NOLA": 1e3 * first, "later": 1e3 * later}


def fastest(lab: Lab) -> str:
    """Name the backend that ``basis`` chooses."""
    if lab.device.startswith("cuda"):
        return "Triton" if gpu.available() else "plain torch"
    return "the C kernel" if cpu.available() else "plain torch"


def switching(model: nn.Module) -> tuple[float, float]:
    """Return how many seconds it takes to build an adapter's factors, and to change back to it."""
    lowrank_ft.wrap(model, "nola", name="other", rank=RANK, bases=BASES, seed=1)

    def need(name: str) -> None:
        lowrank_ft.set_adapter(model, name)
        for host in engine.hosts(model).values():
            delta: Any = host.deltas[name]
            delta.as_lora()

    first, _ = timed(lambda: need("default"))
    need("other")
    return first, timed(lambda: need("default"))[0]


def of_peak(lab: Lab) -> Measured:
    """Compare peak memory."""
    lora, nola = (apart(peak, lab, method) / 1e6 for method in METHODS)
    what = {"what": "peak memory above the model (MB)"}
    yield what, {"LoRA": lora, "NOLA": nola, "NOLA / LoRA": nola / lora}


def peak(lab: Lab, method: str) -> int:
    """Return the bytes that three steps take above the loaded model."""
    step = stepper(lab, method)
    on_gpu = lab.device.startswith("cuda")
    forget_peak()  # loading has a peak of its own
    before = torch.cuda.memory_allocated() if on_gpu else resident()
    for _ in range(lab.size(3, 1)):
        step()
    return (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - before


def of_nola(row: Row) -> str:
    """Show NOLA's figure, with what is beside it."""
    if row.get("later") is not None:
        return f"{row['NOLA']:.1f}, {row['later']:.1f}"
    rate = row.get("G entries/s")
    return f"{row['NOLA']:.1f}" + (f" ({rate:.2f} G entries/s)" if rate is not None else "")


COLUMNS: Columns = {"": value("what"), "LoRA": ".1f", "NOLA": value(of_nola), "NOLA / LoRA": ".3f"}
PARTS = {"step": of_step, "bases": of_bases, "peak": of_peak}
SUITE = of_parts(PARTS, {"costs": Table(("what",), COLUMNS)}, quick="bases")
