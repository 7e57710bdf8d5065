"""NOLA's optimiser step against our own LoRA's at the same rank, on SmolLM2, and what its basis costs.

* ``step``: micro-batches forward and backward, AdamW, gradients to zero; interleaved, medians of the ratios.
* ``combine`` and ``project``: what of a step builds all factors, and projects all their gradients; with the
  compiled kernel, and with plain torch where there is none.
* ``peak``: peak memory of three steps above the loaded model, each in a process of its own.
* ``switch``: from one adapter to another whose factors are not built yet, up to a forward's first need.

    python scripts/bench_nola.py --results docs/results/bench_nola.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from tabulate import tabulate
from torch import nn
from transformers import AutoModelForCausalLM

import lowrank_ft
from lowrank_ft import basis, engine
from lowrank_ft.algorithms.nola import NOLADelta
from lowrank_ft.basis import cpu, gpu, philox

METHODS = ("lora", "nola")


def main() -> None:
    """Measure everything and print one table."""
    parser = common.parser(__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--bases", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak-of", choices=METHODS, help="(for its own processes)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak(args))
        return
    rows = [*steps(args), *bases(args), *memory(args)]
    print(tabulate(rows, "keys", "github", disable_numparse=True))
    on_gpu = args.device.startswith("cuda")
    setting = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {args.threads} thread(s)",
        "tokens": f"{args.batch} x {args.length}", "dtype": args.dtype, "rank": args.rank,
        "bases": args.bases, "torch": torch.__version__,
    }  # fmt: skip
    common.append(args.results, rows, **setting)


def wrapped(args: argparse.Namespace, method: str) -> nn.Module:
    """Return SmolLM2 with an adapter, in training mode."""
    dtype = getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(args.assets / "smollm2", dtype=dtype).to(args.device)
    options = {"bases": args.bases} if method == "nola" else {}
    lowrank_ft.wrap(model, method, rank=args.rank, **options)
    return model.train()  # type: ignore[no-any-return]


def stepper(args: argparse.Namespace, model: nn.Module) -> Callable[[], None]:
    """Return what runs one step of the optimiser."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (args.batch, args.length), generator=generator).to(args.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(args: argparse.Namespace, run: Callable[[], Any]) -> float:
    """Return how many seconds it takes."""
    wait(args)
    started = time.perf_counter()
    run()
    wait(args)
    return time.perf_counter() - started


def wait(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def steps(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return the row of the whole step."""
    run = {method: stepper(args, wrapped(args, method)) for method in METHODS}
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(args.rounds + 2):
        for method in METHODS:
            seconds = timed(args, run[method])
            if number >= 2:  # the first rounds warm up
                times[method].append(seconds)
    ratio = statistics.median(a / b for a, b in zip(times["nola"], times["lora"], strict=True))
    lora, nola = (1e3 * statistics.median(times[method]) for method in METHODS)
    return [
        {"what": "step (ms)", "LoRA": f"{lora:.1f}", "NOLA": f"{nola:.1f}", "NOLA / LoRA": f"{ratio:.3f}"}
    ]


def bases(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return what building and projecting cost, and switching."""
    model = wrapped(args, "nola")
    deltas = [host.deltas["default"] for host in engine.hosts(model).values()]
    factors = [f for d in deltas for f in ((d.A, d.coefficients_A), (d.B, d.coefficients_B))]
    entries = sum(c.shape[0] * c.shape[1] * (f.numel() + 1) for c, f in factors)
    gradients = [torch.randn(c.shape, device=args.device) for c, _ in factors]
    whole = [torch.cat([f.new_ones(1), f.detach()]) for _, f in factors]
    fast = "the C kernel" if cpu.available() else "plain torch"
    backends: dict[str, Any] = {fast: basis}
    if args.device.startswith("cuda"):
        backends = {"Triton" if gpu.available() else "plain torch": basis}
    backends.setdefault("plain torch", philox)
    rows = []
    for name, backend in backends.items():
        rounds = 1 if name == "plain torch" else args.rounds

        def combine(backend: Any = backend) -> None:
            for (c, _), f in zip(factors, whole, strict=True):
                backend.combine(c.stream, f, c.shape[0] * c.shape[1], c.scale)

        def project(backend: Any = backend) -> None:
            for (c, f), g in zip(factors, gradients, strict=True):
                backend.project(c.stream, g.flatten(), f.numel() + 1, c.scale)

        for what, run in (("combine", combine), ("project", project)):
            run()
            seconds = statistics.median(timed(args, run) for _ in range(rounds))
            text = f"{1e3 * seconds:.1f} ({entries / seconds / 1e9:.2f} G entries/s)"
            rows.append({"what": f"{what} all bases by {name} (ms)", "NOLA": text})
    return [*rows, switching(args, model)]


def switching(args: argparse.Namespace, model: nn.Module) -> dict[str, str]:
    """Return how long it takes to change adapters."""
    lowrank_ft.wrap(model, "nola", name="other", rank=args.rank, bases=args.bases, seed=1)

    def need(name: str) -> Callable[[], None]:
        def run() -> None:
            lowrank_ft.set_adapter(model, name)
            for host in engine.hosts(model).values():
                delta: NOLADelta = host.deltas[name]
                delta.as_lora()

        return run

    first = timed(args, need("default"))
    need("other")()
    again = timed(args, need("default"))
    return {"what": "switch, first and later (ms)", "NOLA": f"{1e3 * first:.1f}, {1e3 * again:.1f}"}


def memory(args: argparse.Namespace) -> list[dict[str, str]]:
    """Return the row of peak memory."""
    found = {}
    for method in METHODS:
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--peak-of",
            method,
            "--assets",
            str(args.assets),
        ]
        for name in ("rank", "bases", "batch", "length", "dtype", "device", "threads"):
            command += [f"--{name}", str(getattr(args, name))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[method] = int(json.loads(done.stdout.splitlines()[-1])) / 1e6
    lora, nola = found["lora"], found["nola"]
    return [
        {"what": "peak memory above the model (MB)", "LoRA": f"{lora:.0f}", "NOLA": f"{nola:.0f}",
         "NOLA / LoRA": f"{nola / lora:.3f}"}
    ]  # fmt: skip


def peak(args: argparse.Namespace) -> int:
    """Return what three steps take in bytes, above the loaded model."""
    model = wrapped(args, args.peak_of)
    step = stepper(args, model)
    if args.device.startswith("cuda"):
        own = sum(t.nbytes for t in engine.stock_tensors(model).values())
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() - own
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, that of loading, is forgotten
    before = resident("VmRSS")
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Return the resident memory of this process, present or peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


if __name__ == "__main__":
    main()
