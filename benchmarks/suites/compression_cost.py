"""What compressing SmolLM2 costs in time and memory, and what a compressed model gains in speed.

``passes``: the pass that gathers every layer's input moments, and the backward pass for output gradients,
each over a plain forward of the same tokens with its head. ``memory``: peak memory of the first pass, block
by block, against the same statistics of all layers at once; each in a process of its own, above a plain
forward's. ``speed``: a forward of 512 tokens with 30% of the block parameters removed by LoRD, over dense.

``stages``: those of one MoDeGPT at 30% on 32 × 512 tokens, as shares of a plain forward of these:
statistics, gradients on 8 sequences, and for each kind of module its options (every width's predicted loss),
the choice among them, and the values of what was chosen.
``tokens``: prefill of 512 tokens and greedy decoding of 48, dense over compressed; above 1 is
faster.

Timings are interleaved; medians of the rounds' ratios.
"""

from __future__ import annotations

import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ft
from benchmarks import language
from benchmarks.language import MLP, forward
from benchmarks.measuring import apart, interleaved, resident, timed
from benchmarks.suite import Lab, Measured, Row, of_parts
from benchmarks.tables import Columns, Table, value
from lowrank_ft.algorithms.modegpt import MoDeGPT, MoDeGPTMethod
from lowrank_ft.anatomy import sites
from lowrank_ft.calibration import batches as batching
from lowrank_ft.calibration import collect, stream
from lowrank_ft.calibration.batches import Calibration
from lowrank_ft.calibration.store import Store, StoredStatistics
from lowrank_ft.engine.counting import count

SEQUENCES, SAMPLES, DECODED = 16, 32, 48
Batches = list[dict[str, Tensor]]
MODELS: dict[str, dict[str, Any]] = {
    "MLP only": {"low_rank": False, "targets": MLP},
    "by loss (default)": {},
    "by loss, no factors": {"low_rank": False},
    "the paper": {"recipe": "paper"},
}


def gatherer(model: nn.Module, batches: Batches, *, by_block: bool = True) -> Callable[[str], None]:
    """Return what gathers all layers' statistics of the inputs or of the gradients, and forgets them."""
    layers = {site.names[0]: site.modules[0] for site in sites.select(model)}
    chain = stream.find_chain(model, batches[0]) if by_block else None

    def gather(what: str) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            if what == "gradients":
                collect.gradients(model, chain, layers, batches, Store(Path(scratch)), None)
            else:
                collect.inputs(model, chain, layers, batches, Store(Path(scratch)))

    return gather


def passes(lab: Lab) -> Measured:
    """Time statistics and gradients against a plain forward; a backward pass is long, and sees few."""
    model, batches = language.load(lab), language.sequences(lab, lab.size(SEQUENCES, 4))
    passes = {"statistics pass": ("inputs", batches, 3), "output gradients": ("gradients", batches[:1], 1)}
    for name, (what, data, rounds) in passes.items():
        steps = {"plain": partial(forward, model, data), what: partial(gatherer(model, data), what)}
        ratio = interleaved(steps, lab.size(rounds, 1)).ratio(what, "plain")
        yield {"what": f"{name} / plain forward with its head"}, {"ratio": ratio}


def memory(lab: Lab) -> Measured:
    """Compare peak memory, each way in its own process."""
    blocks, whole = (apart(peak, lab, by_block) / 1e6 for by_block in (True, False))
    what = "peak memory above a plain forward's, block by block / all layers at once"
    yield {"what": what}, {"ratio": blocks / whole, "blocks (MB)": blocks, "whole (MB)": whole}


def peak(lab: Lab, by_block: bool) -> int:
    """Return how much the peak of this process rises while statistics are gathered, in bytes."""
    model, batches = language.load(lab), language.sequences(lab, lab.size(SEQUENCES, 4))
    forward(model, batches[:1])  # what a forward takes is in both
    before = resident("VmHWM")
    gatherer(model, batches, by_block=by_block)("inputs")
    return resident("VmHWM") - before


def speed(lab: Lab) -> Measured:
    """Time a forward of the factored model against dense."""
    dense, batches = language.load(lab), language.sequences(lab, 1)
    factored = lowrank_ft.wrap(copy.deepcopy(dense), "lord", ratio=0.3, **language.calibrated(lab))
    models = {"dense": dense, "factored": factored}
    steps = {name: partial(forward, model, batches) for name, model in models.items()}
    ratio = interleaved(steps, lab.size(13, 1)).ratio("factored", "dense")
    yield {"what": "forward, 30% of blocks removed by LoRD / dense"}, {"ratio": ratio}


class Stages:
    """Seconds by stage; a stage that runs several times is summed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def time(self, stage: str, step: Callable[[], Any]) -> Any:
        """Run a step of a stage, and return what it gives."""
        seconds, result = timed(step)
        self.seconds[stage] += seconds
        return result


def stages(lab: Lab) -> Measured:
    """Time each stage of one compression."""
    model, samples = language.load(lab), lab.size(SAMPLES, 4)
    settings = Calibration(samples=samples, gradient_samples=samples // 4)
    method = MoDeGPTMethod(MoDeGPT(ratio=0.3, calibration=settings))
    chosen = method.sites(model, sites.select(model))
    layers = {name: module for site in chosen for name, module in site.layers.items()}
    texts = language.texts(lab, language.WIKIPEDIA)
    batches = batching.prepare(texts, language.tokenizer_of(lab), settings)
    few, chain = batching.take(batches, settings.gradient_samples), stream.find_chain(model, batches[0])
    stage = Stages()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        inputs, gradients, probes = (
            Store(Path(scratch) / name) for name in ("inputs", "gradients", "probes")
        )
        statistics = StoredStatistics(inputs, gradients, probes)
        stage.time("plain forward", partial(forward, model, batches))
        stage.time("statistics pass", lambda: collect.inputs(model, chain, layers, batches, inputs))
        what = f"gradients ({settings.gradient_samples} sequences)"
        stage.time(what, lambda: collect.gradients(model, chain, layers, few, gradients, None))
        options = {}
        for site in chosen:  # what the engine does, with its handles kept in memory
            work = partial(method.options, site, statistics)
            options[site.name] = stage.time(f"options: {site.role}", work)
        shares = stage.time("choose", partial(method.choose, chosen, options, count(model)))
        for site, share in zip(chosen, shares, strict=True):
            modules = dict(zip(site.names, site.modules, strict=True))
            new = {name: node.build(modules[name]) for name, node in method.structure(site, share).items()}
            what = f"values: {site.role}, {'resized' if share.rank else 'factored'}"
            if new:
                stage.time(what, partial(method.values, site, new, statistics, share.handle))
    for what, seconds in stage.seconds.items():
        yield {"stage": what}, {"share": seconds / stage.seconds["plain forward"]}


def tokens(lab: Lab) -> Measured:
    """Time prefill and decoding of compressed models against dense."""
    models: dict[str, Any] = {"dense": language.load(lab)}
    for name in list(MODELS)[: lab.size(len(MODELS), 1)]:
        dense = copy.deepcopy(models["dense"])
        models[name] = lowrank_ft.wrap(
            dense, "modegpt", ratio=0.3, **MODELS[name], **language.calibrated(lab)
        )
    ids = language.sequences(lab, 1)[0]["input_ids"]
    outputs: dict[str, Any] = {}

    def prefill(name: str) -> None:
        with torch.no_grad():
            outputs[name] = models[name](input_ids=ids, use_cache=True, logits_to_keep=1)

    def decode(name: str) -> None:
        with torch.no_grad():
            for _ in range(DECODED):
                token, past = outputs[name].logits[:, -1:].argmax(-1), outputs[name].past_key_values
                outputs[name] = models[name](input_ids=token, past_key_values=past, use_cache=True)

    phases = {"prefill": prefill, "decode": decode}
    steps = {f"{phase} {name}": partial(run, name) for name in models for phase, run in phases.items()}
    times = interleaved(steps, lab.size(5, 1))
    for name, model in models.items():
        gains = {phase: times.ratio(f"{phase} dense", f"{phase} {name}") for phase in phases}
        yield {"model": name}, {"of blocks": count(model).blocks / count(models["dense"]).blocks, **gains}


def megabytes(row: Row) -> str | None:
    """Say how many megabytes each way took, in the row that measures them."""
    whole = row.get("whole (MB)")
    return None if whole is None else f"{row['blocks (MB)']:.0f} MB / {whole:.0f} MB"


CALIBRATION = Table(
    by=("what",),
    columns={"": value("what"), "ratio": ".3f", "absolute": value(megabytes)},
    where={"part": ["passes", "memory", "speed"]},
)
SHARES = Table(("stage",), {"stage": "", "share of a forward": value("share", ".3f")}, {"part": ["stages"]})
GAINS: Columns = {"": value("model"), "of blocks": ".1%", "prefill": ".2f", "decode": ".2f"}
TABLES = {
    "calibration": CALIBRATION,
    "stages": SHARES,
    "tokens": Table(("model",), GAINS, {"part": ["tokens"]}),
}
PARTS = {"passes": passes, "memory": memory, "speed": speed, "stages": stages, "tokens": tokens}
SUITE = of_parts(PARTS, TABLES, quick="tokens")
