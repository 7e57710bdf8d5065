"""CorDA here against PEFT's, on SmolLM2 and on one wide layer.

* Both start from the same 32 × 512 tokens at rank 16 on all linear layers, in both modes. ``statistics`` is
  the pass over the tokens, against a plain forward of the same batches with its head; ``solve`` is all that
  follows, up to a wrapped model. PEFT runs one sequence at a time, since its hook takes no more; it keeps its
  statistics between the modes, as ours are kept.
* Peak memory of statistics and solve above the loaded model, each in a process of its own.
* ``energy`` is the share of the text's energy that the start holds, ``‖B₀A₀ C‖² / ‖W C‖²``, mean over layers,
  with one C for both: the second moment of the inputs.
* One layer of 4096 × 4096 with a moment whose eigenvalues fall as ``1/i``: our solve against PEFT's.

    python scripts/bench_corda.py --results docs/results/bench_corda.jsonl
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import corda as theirs
from peft.tuners.lora.config import CordaConfig
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft
from lowrank_ft import engine, linalg, sites
from lowrank_ft.calibration.store import Store
from lowrank_ft.modules.layer import layer_of

LENGTH, RANK, WIDE = 512, 16, 4096
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODES = {"instruction": "ipm", "knowledge": "kpm"}


def main() -> None:
    """Measure everything and print one table."""
    parser = common.parser(__doc__)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--process", choices=["ours", "peft"], help="(for its own processes)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    if args.process:
        print(json.dumps(OURS_AND_PEFT[args.process](args)))
        return
    found = {name: in_process(name, args) for name in OURS_AND_PEFT}
    rows = [*compared(found["ours"], found["peft"]), *wide()]
    print(tabulate(rows, "keys", "github", disable_numparse=True))
    setting = {"sequences": args.sequences, "threads": args.threads, "torch": torch.__version__}
    common.append(args.results, rows, **setting)


def in_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one of the two in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--process", name, "--assets", str(args.assets)]
    command += ["--sequences", str(args.sequences), "--threads", str(args.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compared(ours: dict[str, Any], peft: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the table of the whole model."""
    rows = [
        {"what": "statistics / plain forward with its head", "ours": ours["statistics"] / ours["forward"],
         "PEFT": peft["statistics"] / peft["forward"]},
    ]  # fmt: skip
    for mode in MODES:
        rows.append({"what": f"solve, {mode} (s)", "ours": ours[mode], "PEFT": peft[mode]})
    rows.append({"what": "peak memory above the model (MB)", "ours": ours["peak"], "PEFT": peft["peak"]})
    for mode in MODES:
        what = f"energy of the start, {mode} (%)"
        rows.append({"what": what, "ours": ours[f"energy {mode}"], "PEFT": peft[f"energy {mode}"]})
    return [
        {"what": r["what"], "ours": f"{r['ours']:.4g}", "PEFT": f"{r['PEFT']:.4g}",
         "ours / PEFT": f"{r['ours'] / r['PEFT']:.4g}"}
        for r in rows
    ]  # fmt: skip


def load(args: argparse.Namespace, size: int) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return the model, and batches of that many sequences of 512 tokens."""
    model = AutoModelForCausalLM.from_pretrained(args.assets / "smollm2", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "smollm2")
    lines = (args.assets / "wikipedia/train.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [token for line in lines[:40] for token in tokenizer(json.loads(line)["text"])["input_ids"]]
    tokens = torch.tensor(ids[: args.sequences * LENGTH]).view(-1, LENGTH)
    return model, [{"input_ids": part} for part in torch.split(tokens, size)]


def forward(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """Run the batches, and nothing else."""
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)


def timed(step: Any) -> tuple[float, Any]:
    """Return how long a step took, and what it gave."""
    started = time.perf_counter()
    result = step()
    return time.perf_counter() - started, result


def peak() -> int:
    """Return the peak memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """Measure this package: statistics as the first wrap's time above the second's, which finds them."""
    model, batches = load(args, 4)
    forward(model, batches[:1])
    plain, _ = timed(lambda: forward(model, batches))
    before = peak()
    found: dict[str, Any] = {"forward": plain}
    with tempfile.TemporaryDirectory() as cache:

        def wrap(mode: str) -> None:
            settings = {"cache": cache}
            lowrank_ft.wrap(model, "corda", mode=mode, rank=RANK, data=batches, calibration=settings)

        whole, _ = timed(lambda: wrap("instruction"))
        starts = {"instruction": ours_of(model)}
        found["peak"] = (peak() - before) / 1e6
        for mode in MODES:
            lowrank_ft.unload(model)
            found[mode], _ = timed(lambda mode=mode: wrap(mode))
            starts[mode] = ours_of(model)
        found["statistics"] = whole - found["instruction"]
        lowrank_ft.unload(model)
        (inputs,) = Path(cache).glob("inputs-*")
        for mode, start in starts.items():
            found[f"energy {mode}"] = energy(model, start, Store(inputs))
    return found


def ours_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each layer's start as two factors."""
    deltas = {name: host.deltas["default"] for name, host in engine.hosts(model).items()}
    return {name: (delta.B.detach() * delta.node.scale, delta.A.detach()) for name, delta in deltas.items()}


def peft(args: argparse.Namespace) -> dict[str, Any]:
    """Measure PEFT: its statistics by its own function, then its solve and its wrap."""
    model, batches = load(args, 1)
    _, large = load(args, 4)
    forward(model, batches[:1])
    plain, _ = timed(lambda: forward(model, large))
    before = peak()
    found: dict[str, Any] = {"forward": plain}
    config = peft_config("ipm")
    for _, module in theirs.target_modules(model, config):
        module.rank = RANK
    found["statistics"], _ = timed(
        lambda: theirs.calib_cov_distribution(model, config, lambda: forward(model, batches), None, None)
    )

    def solve(method: str) -> nn.Module:
        config = peft_config(method)
        for _, module in theirs.target_modules(model, config):
            module.corda_method = method
        theirs.collect_eigens(model, config, False)
        theirs.crop_corda_eigens(model, config)
        wrapped: nn.Module = get_peft_model(model, config)
        return wrapped

    starts = {}
    weights = {name: module.weight.detach().clone() for name, module in theirs.target_modules(model, config)}
    for mode, method in MODES.items():
        found[mode], wrapped = timed(lambda method=method: solve(method))
        if mode == "instruction":
            found["peak"] = (peak() - before) / 1e6
        starts[mode] = peft_of(wrapped)
        model = wrapped.unload()
        for name, weight in weights.items():  # PEFT's start takes the adapter out of the base
            model.get_submodule(name).weight.data.copy_(weight)
    clean, four = load(args, 4)
    with tempfile.TemporaryDirectory() as cache:
        lowrank_ft.wrap(clean, "corda", rank=1, data=four, calibration={"cache": cache})
        lowrank_ft.unload(clean)
        (inputs,) = Path(cache).glob("inputs-*")
        for mode, start in starts.items():
            found[f"energy {mode}"] = energy(clean, start, Store(inputs))
    return found


def peft_config(method: str) -> LoraConfig:
    """Return PEFT's config; it takes no keyword for all linear layers here."""
    return LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS, init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )  # fmt: skip


def peft_of(wrapped: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each layer's start as two factors."""
    found = {}
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            B, A = (part["default"].weight.detach().clone() for part in (module.lora_B, module.lora_A))
            found[name.removeprefix("base_model.model.")] = (B, A)
    return found


def energy(model: nn.Module, starts: dict[str, tuple[Tensor, Tensor]], store: Store) -> float:
    """Return ``‖B₀A₀ C‖² / ‖W C‖²`` in percent, mean over layers."""
    shares = []
    for site in sites.select(model):
        name = site.names[0]
        C = store.read(name)["C"]
        B, A = (t.double() for t in starts[name])
        W = layer_of(site.modules[0]).matrix().detach().double()
        shares.append(float((B @ (A @ C)).square().sum() / (W @ C).square().sum()))
    return 100 * sum(shares) / len(shares)


OURS_AND_PEFT = {"ours": ours, "peft": peft}


def wide() -> list[dict[str, Any]]:
    """Our solve of one wide layer against PEFT's, three times each, interleaved, medians."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(WIDE, WIDE, bias=False)
    layer.weight.data.copy_(torch.randn(WIDE, WIDE, generator=generator) / WIDE**0.5)
    mix, _ = torch.linalg.qr(torch.randn(WIDE, WIDE, generator=generator))
    C = (mix / torch.arange(1, WIDE + 1)) @ mix.T
    layer.register_buffer("covariance_matrix", C)
    weight, exact = layer.weight.detach(), C.double()
    times: dict[str, list[float]] = {mode: [] for mode in (*MODES, "PEFT")}
    for _ in range(3):
        for mode in MODES:
            last = mode == "knowledge"
            run = partial(linalg.output_directions, weight, exact, RANK, squared=True, last=last)
            times[mode].append(timed(run)[0])
        times["PEFT"].append(timed(lambda: theirs.collect_eigens_for_layer(layer, None))[0])
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    return [
        {
            "what": f"one layer of {WIDE} × {WIDE}, {mode} (s)",
            "ours": f"{median[mode]:.4g}",
            "PEFT": f"{median['PEFT']:.4g}",
            "ours / PEFT": f"{median[mode] / median['PEFT']:.4g}",
        }
        for mode in MODES
    ]


if __name__ == "__main__":
    main()
