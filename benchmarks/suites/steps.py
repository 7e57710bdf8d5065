"""What an adapter and a packed base cost in training and in generating, on SmolLM2, against PEFT's.

``float32``, ``bfloat16``: a LoRA training step of 2 × 256 tokens, ours, PEFT's, and the floor: the frozen
model with gradients for its inputs alone, which any adapter must pay. *Saved* is what the graph behind the
loss keeps for backward, parameters and buffers left out. ``step``: the same step on a dense base (ours), on
packed bases (ours), and PEFT's on bitsandbytes' ``Linear4bit``; ``token``: a forward of one token, in eval
mode. Interleaved, medians of the rounds' ratios.

``disk``: the whole model under budgets in megabytes, and what the files take. ``memory``: what a fresh
process holds once the model is loaded (its resident memory less that of one that loaded nothing), beside
the bytes of the model's tensors. ``program``: the cost table of 210 matrices × 432 configurations, HiGHS
and the Lagrangian on it and the gap between them; and one decomposition of the model.
"""

from __future__ import annotations

import gc
import importlib
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowrank_ft
from benchmarks import language
from benchmarks.contestants import ours
from benchmarks.measuring import apart, interleaved, resident, saved_bytes, timed
from benchmarks.peers import peft_adapters as peft
from benchmarks.suite import Lab, Measured, Parts, Row, of_parts
from benchmarks.tables import Columns, Table, value
from lowrank_ft import NF, LoRA, LQLoRA
from lowrank_ft.algorithms.nf import NFMethod
from lowrank_ft.anatomy import sites
from lowrank_ft.engine.offers import offers
from lowrank_ft.modules.layer import layer_of
from lowrank_ft.solve import allocation

RANK, SHAPE = 16, (2, 256)
# What the model is stored as, under the adapter.
BASES: dict[str, list[Any]] = {
    "dense": [],
    "nf4": [NF()],
    "nf4, bitsandbytes": [NF(library="bitsandbytes")],
    "signed3": [NF(bits=3, codebook="signed")],
    "signed2": [NF(bits=2, codebook="signed")],
    "int8, bitsandbytes": [NF(bits=8, codebook="int8", library="bitsandbytes")],
}
BUDGETS = (("nf", 150), ("signed", 160), ("signed", 180), ("nf", 200))  # megabytes
Step = tuple[nn.Module, Callable[[], Tensor]]  # a model, and what runs its forward and returns the loss


def tokens(lab: Lab, vocabulary: int) -> Tensor:
    """Return random tokens."""
    shape, generator = (SHAPE[0], lab.size(SHAPE[1], 16)), torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, shape, generator=generator).to(lab.device)


def timed_steps(contest: Mapping[str, Step], reference: str, rounds: int) -> Measured:
    """Yield each contestant's step time and saved bytes, over those of one of them."""
    saved = {name: saved_bytes(loss(), model) / 1e6 for name, (model, loss) in contest.items()}

    def step(model: nn.Module, loss: Callable[[], Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss())

    times = interleaved({name: partial(step, *pair) for name, pair in contest.items()}, rounds, warm_up=2)
    for name in contest:
        of_time = {"median ms": 1e3 * times.median(name), f"time / {reference}": times.ratio(name, reference)}
        yield (
            {"step": name},
            {**of_time, "saved MB": saved[name], f"saved / {reference}": saved[name] / saved[reference]},
        )


def of_training(dtype: str, lab: Lab) -> Measured:
    """Compare a training step with the floor and PEFT's."""

    def base() -> nn.Module:
        return language.load(lab, getattr(torch, dtype)).requires_grad_(False).train()

    floor: Any = base()
    ids = tokens(lab, floor.config.vocab_size)

    def floor_loss() -> Tensor:
        inputs = floor.get_input_embeddings()(ids).detach().requires_grad_(True)
        loss: Tensor = floor(inputs_embeds=inputs, labels=ids).loss
        return loss

    adapted = {
        "lowrank_ft": ours("lora", rank=RANK, alpha=2 * RANK)(base(), seed=0),
        "PEFT": peft.lora(RANK, 2 * RANK)(base(), seed=0).train(),
    }
    losses = {name: (model, partial(language.loss_of, model, ids)) for name, model in adapted.items()}
    yield from timed_steps({"floor": (floor, floor_loss), **losses}, "floor", lab.size(21, 1))


def on_bases(lab: Lab) -> dict[str, nn.Module]:
    """Return the model on each base with a LoRA, and PEFT's on bitsandbytes' layers."""
    names = list(BASES)[: lab.size(len(BASES), 2)]
    models = {name: lowrank_ft.wrap(language.load(lab), [*BASES[name], LoRA(rank=RANK)]) for name in names}
    return {**models, "PEFT on Linear4bit": peft.lora_on_linear4bit(lab)}


def of_step(lab: Lab) -> Measured:
    """Compare a training step on each base."""
    ids = tokens(lab, 4000)
    contest = {name: (m.train(), partial(language.loss_of, m, ids)) for name, m in on_bases(lab).items()}
    yield from timed_steps(contest, "dense", lab.size(9, 1))


def of_token(lab: Lab) -> Measured:
    """Compare a forward of one token, as in generating one after the other, on each base."""
    models, batches = (
        {name: model.eval() for name, model in on_bases(lab).items()},
        [{"input_ids": torch.tensor([[1]])}],
    )
    steps = {name: partial(language.forward, model, batches * 4) for name, model in models.items()}
    times = interleaved(steps, lab.size(9, 1))
    for name in models:
        yield {"step": name}, {"token / dense": times.ratio(name, "dense")}


def of_disk(lab: Lab) -> Measured:
    """Ask for budgets in megabytes, and measure what is written."""
    for codebook, budget in BUDGETS[: lab.size(len(BUDGETS), 1)]:
        model = lowrank_ft.wrap(
            language.load(lab), "nf", codebook=codebook, budget=float(budget), budget_of="disk"
        )
        with tempfile.TemporaryDirectory() as scratch:
            lowrank_ft.save(model, Path(scratch) / "m")
            written = sum(file.stat().st_size for file in (Path(scratch) / "m").glob("*.safetensors")) / 1e6
        yield {"codebook": codebook, "asked (MB)": budget}, {"written (MB)": written}


def of_memory(lab: Lab) -> Measured:
    """Measure what fresh processes hold."""
    empty = apart(held_by, "")
    for name, stages in list(BASES.items())[: lab.size(len(BASES), 2)]:
        model = language.load(lab)
        lowrank_ft.wrap(model, [*stages, LoRA(rank=RANK)])
        if name == "dense":
            lowrank_ft.unload(model)
        with tempfile.TemporaryDirectory() as scratch:
            lowrank_ft.save(model, Path(scratch) / "m")
            held = (apart(held_by, str(Path(scratch) / "m")) - empty) / 1e6
        every = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        yield {"step": name}, {"tensors (MB)": sum(t.nbytes for t in every) / 1e6, "resident (MB)": held}


def held_by(directory: str) -> int:
    """Return the anonymous resident bytes of this process, a model loaded and copied off its file's pages."""
    importlib.import_module("transformers.models.llama.modeling_llama")  # its imports are in both
    if directory:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        gc.collect()
    return resident("RssAnon")


def of_program(lab: Lab) -> Measured:
    """Time the table, the solvers, and one decomposition."""
    model = language.load(lab)
    chosen = sites.select(model, "all-linear", (), None)[: lab.size(1000, 2)]
    seconds, table = timed(lambda: offers(NFMethod(NF(budget=3.0, grid="paper")), chosen, {}))
    yield {"what": "table, 210 × 432"}, {"seconds": seconds}
    weights = sum(layer_of(site.modules[0]).matrix().numel() for site in chosen)
    for bits in (2.5, 3.0, 4.0):
        budget = int(bits * weights / 8)
        seconds, best = timed(partial(allocation.solve, table, budget))
        yield {"what": f"HiGHS, {bits} bits"}, {"seconds": seconds}
        seconds, near = timed(partial(allocation.allocate, table, budget))
        above = (
            sum(option.loss for option in near.values()) / sum(option.loss for option in best.values()) - 1
        )
        yield {"what": f"Lagrangian, {bits} bits"}, {"seconds": seconds, "above the optimum": above}
    config = LQLoRA(bits=3, rank=8, objective="weight", rounding="nearest")
    seconds, _ = timed(lambda: lowrank_ft.wrap(model, config))
    yield {"what": "one decomposition, no data, 3 bits, rank 8"}, {"seconds": seconds}


def activations(row: Row) -> str:
    """Say how many megabytes were saved for backward, and how many times the floor's that is."""
    share = "" if row["step"] == "floor" else f" ({row['saved / floor']:.3f} ×)"
    return f"{row['saved MB']:.0f} MB{share}"


def under(row: Row) -> float:
    """Return how far under its budget a file is."""
    return 1 - float(row["written (MB)"]) / float(row["asked (MB)"])


DTYPES, BASE = ("float32", "bfloat16"), {"base": value("step")}
TIMES: Columns = {"{} time / floor": value("time / floor", ".3f"), "{} saved activations": value(activations)}
SIZES: Columns = {"codebook": "", "asked (MB)": "", "written (MB)": ".3f", "under by": value(under, ".3%")}
STEP: Columns = {"step / dense": value("time / dense", ".3f"), "graph (MB)": value("saved MB", ".0f")}
SECONDS: Columns = {"": value("what"), "seconds": ".3g", "above the optimum": ".4%"}
TABLES = {
    "training": Table(("step",), {"": value("step"), **TIMES}, {"part": DTYPES}, across=("part", DTYPES)),
    "disk": Table(("codebook", "asked (MB)"), SIZES, {"part": ["disk"]}),
    "memory": Table(("step",), {**BASE, "tensors (MB)": ".1f", "resident (MB)": ".1f"}, {"part": ["memory"]}),
    "steps": Table(("step",), {**BASE, **STEP, "token / dense": ".3f"}, {"part": ["step", "token"]}),
    "program": Table(("what",), SECONDS, {"part": ["program"]}),
}
PARTS: Parts = {
    **{dtype: partial(of_training, dtype) for dtype in DTYPES},
    "disk": of_disk,
    "memory": of_memory,
    "step": of_step,
    "token": of_token,
    "program": of_program,
}
SUITE = of_parts(PARTS, TABLES, quick="float32")
