"""Time and memory of calibration, and the speed of a factored model.

* Statistics: the pass that gathers every layer's input moments, against a plain forward of the same batches
  with its head, interleaved, medians; the backward pass for output gradients as its own line.
* Peak memory of that pass, block by block, against the same statistics gathered for all layers at once; each
  in a process of its own, above what the loaded model takes.
* Forward of 1 × 512 tokens of the model with 30% of its block parameters removed, against dense,
  interleaved, medians.

    python scripts/bench_calibration.py --results docs/results/bench_calibration.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft
from lowrank_ft import sites
from lowrank_ft.calibration import collect, stream
from lowrank_ft.calibration.store import Store

LENGTH = 512


def main() -> None:
    """Measure everything and print one table."""
    parser = common.parser(__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache/calibration"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--memory-of", choices=["blocks", "whole"], help="(for its own processes)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak(args))
        return
    rows = [*passes(args), *memory(args), *speed(args)]
    print(tabulate(rows, "keys", "github", disable_numparse=True))
    setting = {"sequences": args.sequences, "threads": args.threads, "torch": torch.__version__}
    common.append(args.results, rows, **setting)


def load(args: argparse.Namespace) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Return the model, and batches of 4 × 512 tokens."""
    model = AutoModelForCausalLM.from_pretrained(args.assets / "smollm2", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "smollm2")
    lines = (args.assets / "wikipedia/train.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [token for line in lines[:20] for token in tokenizer(json.loads(line)["text"])["input_ids"]]
    tokens = torch.tensor(ids[: args.sequences * LENGTH]).view(-1, LENGTH)
    return model, [{"input_ids": part} for part in torch.split(tokens, 4)]


def passes(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Statistics and gradients against a plain forward."""
    model, batches = load(args)
    layers = {site.names[0]: site.modules[0] for site in sites.select(model)}
    chain = stream.find_chain(model, batches[0])

    few = batches[:1]  # a backward pass is long

    def plain(data: list[dict[str, Tensor]] = batches) -> None:
        with torch.no_grad():
            for batch in data:
                model(**batch, use_cache=False)

    def inputs() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            collect.inputs(model, chain, layers, batches, Store(Path(scratch)))

    def gradients() -> None:
        with tempfile.TemporaryDirectory() as scratch:
            collect.gradients(model, chain, layers, few, Store(Path(scratch)), None)

    found = common.interleaved({"plain": plain, "inputs": inputs}, args.rounds)
    back = common.interleaved({"plain": lambda: plain(few), "gradients": gradients}, 1)
    return [
        {
            "what": "statistics pass / plain forward with its head",
            "ratio": f"{common.ratio(found, 'inputs', 'plain'):.3f}",
        },
        {
            "what": "output gradients / plain forward with its head",
            "ratio": f"{common.ratio(back, 'gradients', 'plain'):.3f}",
        },
    ]


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory above the loaded model, each way in its own process."""
    found = {}
    for way in ("blocks", "whole"):
        command = [sys.executable, "-W", "ignore", __file__, "--memory-of", way, "--assets", str(args.assets)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[way] = int(done.stdout.split()[-1])
    return [
        {
            "what": "peak memory above a plain forward's, block by block / all layers at once",
            "ratio": f"{found['blocks'] / found['whole']:.3f}",
            "absolute": f"{found['blocks'] / 1e6:.0f} MB / {found['whole'] / 1e6:.0f} MB",
        }
    ]


def peak(args: argparse.Namespace) -> int:
    """Return how much the peak of this process rises while statistics are gathered, in bytes."""
    model, batches = load(args)
    layers = {site.names[0]: site.modules[0] for site in sites.select(model)}
    with torch.no_grad():
        model(**batches[0], use_cache=False)  # what a forward takes is in both
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chain = stream.find_chain(model, batches[0]) if args.memory_of == "blocks" else None
    with tempfile.TemporaryDirectory() as scratch:
        collect.inputs(model, chain, layers, batches, Store(Path(scratch)))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward of the factored model against dense."""
    model, batches = load(args)
    compressed = copy.deepcopy(model)
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "smollm2")
    lines = (args.assets / "wikipedia/train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    settings = {"samples": 128, "gradient_samples": 32, "length": LENGTH, "cache": str(args.cache)}
    lowrank_ft.wrap(compressed, "lord", ratio=0.3, data=texts, tokenizer=tokenizer, calibration=settings)
    ids = batches[0]["input_ids"][:1]

    def run(which: nn.Module) -> Callable[[], None]:
        def forward() -> None:
            with torch.no_grad():
                which(input_ids=ids, use_cache=False)

        return forward

    found = common.interleaved({"dense": run(model), "factored": run(compressed)}, 4 * args.rounds + 1)
    return [
        {
            "what": "forward, 30% of blocks removed / dense",
            "ratio": f"{common.ratio(found, 'factored', 'dense'):.3f}",
        },
    ]


if __name__ == "__main__":
    main()
