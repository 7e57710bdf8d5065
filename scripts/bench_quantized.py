"""What packed weights cost and save on SmolLM2: bytes, memory, time of a step, time of the program.

``disk``: the whole model under budgets in megabytes; what was asked and what the files take.

``memory``: what a fresh process holds once the model is loaded (its anonymous resident memory less that of
one that imported the same and loaded nothing), beside the bytes of its tensors.

``step``: a LoRA training step of rank 16 on a dense base (ours), on packed bases (ours), and on bitsandbytes'
``Linear4bit`` under PEFT, interleaved, medians of the rounds' ratios to the first, and what the graph keeps.

``token``: a forward of one token, as in generating one after the other, with the adapter on; in eval mode.

``program``: the cost table of 210 matrices × 432 configurations, HiGHS and the Lagrangian on it and the gap
between them; and one decomposition of the model.

    python scripts/bench_quantized.py --results docs/results/bench_quantized.jsonl
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from bench_training import saved_bytes
from tabulate import tabulate
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lowrank_ft
from lowrank_ft import allocation, sites
from lowrank_ft.algorithms.lora import LoRA
from lowrank_ft.algorithms.lq_lora import LQLoRA
from lowrank_ft.algorithms.nf import NF, NFMethod
from lowrank_ft.modules.layer import layer_of

# For each packed base of the step: what wrap() is given.
BASES: dict[str, list[Any]] = {
    "dense": [LoRA(rank=16)],
    "nf4": [NF(), LoRA(rank=16)],
    "nf4, bitsandbytes": [NF(library="bitsandbytes"), LoRA(rank=16)],
    "signed3": [NF(bits=3, codebook="signed"), LoRA(rank=16)],
    "signed2": [NF(bits=2, codebook="signed"), LoRA(rank=16)],
    "int8, bitsandbytes": [NF(bits=8, codebook="int8", library="bitsandbytes"), LoRA(rank=16)],
}


def main() -> None:
    """Run the parts asked for, and print a table for each."""
    parser = common.parser(__doc__)
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for part in args.part or list(PARTS):
        rows = PARTS[part](args)
        print(f"\n{part}\n\n{tabulate(rows, 'keys', 'github', floatfmt='.3f')}", flush=True)
        common.append(args.results, rows, part=part)


def base(args: argparse.Namespace, **options: Any) -> nn.Module:
    """Load the model."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        args.assets / "smollm2", dtype=torch.float32, **options
    )
    return model.eval()


def of_disk(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Budgets in megabytes, and what was written."""
    rows = []
    for codebook, budget in (("nf", 150), ("signed", 160), ("signed", 180), ("nf", 200)):
        model = base(args)
        lowrank_ft.wrap(model, "nf", codebook=codebook, budget=float(budget), budget_of="disk")
        with tempfile.TemporaryDirectory() as scratch:
            lowrank_ft.save(model, Path(scratch) / "m")
            files = (Path(scratch) / "m").glob("*.safetensors")
            written = sum(file.stat().st_size for file in files) / 1e6
        share = {"under by": f"{1 - written / budget:.3%}"}
        rows.append({"codebook": codebook, "asked (MB)": budget, "written (MB)": written, **share})
    return rows


def of_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Resident memory of fresh processes."""
    rows = []
    empty = resident("", args)
    for name, stages in BASES.items():
        model = lowrank_ft.wrap(base(args), stages)
        if name == "dense":
            lowrank_ft.unload(model)
        with tempfile.TemporaryDirectory() as scratch:
            lowrank_ft.save(model, Path(scratch) / "m")
            held = resident(str(Path(scratch) / "m"), args)
        held_tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
        tensors = sum(t.numel() * t.element_size() for t in held_tensors) / 1e6
        rows.append({"base": name, "tensors (MB)": tensors, "resident (MB)": held - empty})
    return rows


def resident(directory: str, args: argparse.Namespace) -> float:
    """Return the resident megabytes of a process that loads a directory, off the file's pages."""
    code = (
        "import sys, torch, lowrank_ft\n"
        "from transformers import AutoModelForCausalLM\n"
        "from transformers.models.llama import modeling_llama\n"
        "if sys.argv[1]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "    for t in (*model.parameters(), *model.buffers()):\n"
        "        t.data = t.data.clone()\n"
        "    import gc; gc.collect()\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "print(next(int(line.split()[1]) for line in lines if line.startswith('RssAnon')) / 1e3)\n"
    )
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", code, directory]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def of_step(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A training step on each base."""
    models = {name: lowrank_ft.wrap(base(args), stages) for name, stages in BASES.items()}
    models["PEFT on Linear4bit"] = peft_on_bitsandbytes(args)
    ids = torch.randint(0, 4000, (2, 256), generator=torch.Generator().manual_seed(0))
    for model in models.values():
        model.train()

    def step(model: nn.Module) -> None:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    times = common.interleaved({name: partial(step, m) for name, m in models.items()}, args.rounds)
    rows = []
    for name, model in models.items():
        loss = model(input_ids=ids, labels=ids).loss
        rows.append(
            {
                "base": name,
                "step ÷ dense": common.ratio(times, name, "dense"),
                "graph (MB)": saved_bytes(loss, model) / 1e6,
            }
        )
        del loss
    return rows


def of_token(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A forward of one token on each base."""
    models = {name: lowrank_ft.wrap(base(args), stages).eval() for name, stages in BASES.items()}
    models["PEFT on Linear4bit"] = peft_on_bitsandbytes(args).eval()
    ids = torch.tensor([[1]])

    def forward(model: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(4):
                model(input_ids=ids)

    times = common.interleaved({name: partial(forward, m) for name, m in models.items()}, args.rounds)
    return [{"base": name, "token ÷ dense": common.ratio(times, name, "dense")} for name in models]


def peft_on_bitsandbytes(args: argparse.Namespace) -> nn.Module:
    """PEFT's LoRA on bitsandbytes' layers, as its users make it."""
    from peft import LoraConfig, get_peft_model

    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = base(args, quantization_config=options)
    return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))  # type: ignore[no-any-return]


def of_program(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table, the solvers, and one decomposition."""
    model, rows = base(args), []
    chosen = sites.select(model, "all-linear", (), None)
    method = NFMethod(NF(budget=3.0, grid="paper"))

    def timed(what: str, run: Callable[[], Any], **more: Any) -> Any:
        started = time.perf_counter()
        found = run()
        rows.append({"what": what, "seconds": time.perf_counter() - started, **more})
        return found

    table = timed("table, 210 × 432", lambda: method.table(chosen, {}))
    weights = sum(layer_of(site.modules[0]).matrix().numel() for site in chosen)
    for bits in (2.5, 3.0, 4.0):
        budget = int(bits * weights / 8)
        best = timed(f"HiGHS, {bits} bits", partial(allocation.solve, table, budget))
        near = timed(f"Lagrangian, {bits} bits", partial(allocation.allocate, table, budget))
        optimum = sum(option.loss for option in best.values())
        rows[-1]["above the optimum"] = f"{sum(o.loss for o in near.values()) / optimum - 1:.4%}"
    config = LQLoRA(bits=3, rank=8, objective="weight", rounding="nearest")
    timed("one decomposition, no data, 3 bits, rank 8", lambda: lowrank_ft.wrap(model, config))
    return rows


PARTS = {
    "disk": of_disk,
    "memory": of_memory,
    "step": of_step,
    "token": of_token,
    "program": of_program,
}


if __name__ == "__main__":
    main()
