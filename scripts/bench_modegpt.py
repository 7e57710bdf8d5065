"""MoDeGPT on SmolLM2: where compression spends its time, and what the compressed model gains in speed.

* Stages of one compression at 30% of block parameters, 64 × 512 calibration tokens, each as a share of one
  plain forward of those tokens with the head: the statistics pass, gradients on 16 sequences, and, for each
  kind of module, deciding (every width's predicted loss) and solving (the weights).
* Prefill of 1 × 512 tokens and greedy decoding of 48 more with the cache, against dense: interleaved,
  medians of the rounds' ratios, above 1 is faster.

    python scripts/bench_modegpt.py --results docs/results/bench_modegpt.jsonl
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft
from lowrank_ft import sites
from lowrank_ft.algorithms.modegpt import MoDeGPT, MoDeGPTMethod
from lowrank_ft.calibration import batches as batching
from lowrank_ft.calibration import collect, stream
from lowrank_ft.calibration.batches import Calibration
from lowrank_ft.calibration.store import Known, Store
from lowrank_ft.pipeline import count

MLP = ["gate_proj", "up_proj", "down_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "MLP only": {"low_rank": False, "targets": MLP},
    "by loss (default)": {},
    "by loss, no factors": {"low_rank": False},
    "the paper": {"recipe": "paper"},
}


def main() -> None:
    """Measure everything and print two tables."""
    parser = common.parser(__doc__)
    parser.add_argument("--cache", type=Path, default=Path(".cache/calibration"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.assets / "smollm2", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "smollm2")
    lines = (args.assets / "wikipedia/train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    speeds = throughput(model, texts, tokenizer, args)
    times = stages(model, texts, tokenizer, args)
    for rows in (times, speeds):
        print(tabulate(rows, "keys", "github", disable_numparse=True) + "\n")
    setting = {"samples": args.samples, "threads": args.threads, "torch": torch.__version__}
    common.append(args.results, (*times, *speeds), **setting)


def stages(
    model: nn.Module, texts: list[str], tokenizer: Any, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time each stage of one compression."""
    settings = Calibration(samples=args.samples, gradient_samples=args.samples // 4)
    config = MoDeGPT(ratio=0.3, calibration=settings)
    method = MoDeGPTMethod(config)
    chosen = method.sites(model, sites.select(model))
    layers = {name: module for site in chosen for name, module in site.layers.items()}
    batches = batching.prepare(texts, tokenizer, settings)
    few = batching.take(batches, settings.gradient_samples)
    chain = stream.find_chain(model, batches[0])
    seconds: dict[str, float] = defaultdict(float)

    def timed(what: str, step: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = step()
        seconds[what] += time.perf_counter() - started
        return found

    def plain() -> None:
        for batch in batches:
            model(**batch, use_cache=False)

    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        inputs, gradients, probes = (Store(Path(scratch) / n) for n in ("inputs", "gradients", "probes"))
        known = Known(inputs, gradients, probes)
        timed("plain forward", plain)
        timed("statistics pass", lambda: collect.inputs(model, chain, layers, batches, known.inputs))
        timed(
            f"gradients ({settings.gradient_samples} sequences)",
            lambda: collect.gradients(model, chain, layers, few, known.gradients, None),
        )
        for site in chosen:  # what plan() does, one module at a time
            timed(f"decide: {site.role}", partial(method._options, site, known, 1))
        shares = timed("decide: all again, and allocate", lambda: method.plan(chosen, known, count(model)))
        for site, share in zip(chosen, shares, strict=True):
            modules = dict(zip(site.names, site.modules, strict=True))
            nodes = method.structure(site, share)
            new = {name: node.build(modules[name]) for name, node in nodes.items()}
            if new:
                what = "resized" if share.rank else "factored"
                timed(f"solve: {site.role}, {what}", partial(method.values, site, new, known))
    forward = seconds["plain forward"]
    return [
        {"stage": what, "share of a forward": f"{value / forward:.3f}"} for what, value in seconds.items()
    ]


def throughput(
    model: nn.Module, texts: list[str], tokenizer: Any, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Prefill and decoding of compressed models against dense."""
    models = {"dense": model}
    settings = {"samples": 128, "gradient_samples": 32, "cache": str(args.cache)}
    for name, options in VARIANTS.items():
        models[name] = lowrank_ft.wrap(
            copy.deepcopy(model), "modegpt", ratio=0.3, data=texts, tokenizer=tokenizer,
            calibration=settings, **options,
        )  # fmt: skip
    ids = torch.tensor(tokenizer(texts[0])["input_ids"][:512])[None]
    times: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    for number in range(args.rounds + 1):
        for name, which in models.items():
            prefill, decode = generate(which, ids, 48)
            if number:
                times[name]["prefill"].append(prefill)
                times[name]["decode"].append(decode)
    rows = []
    for name, which in models.items():
        gains = {
            phase: statistics.median(a / b for a, b in zip(times["dense"][phase], mine, strict=True))
            for phase, mine in times[name].items()
        }
        kept = count(which).blocks / count(model).blocks
        rows.append(
            {"model": name, "of blocks": f"{kept:.1%}", **{p: f"{gain:.2f} ×" for p, gain in gains.items()}}
        )
    return rows


def generate(model: Any, ids: Tensor, more: int) -> tuple[float, float]:
    """Return the seconds that reading ``ids`` and writing ``more`` tokens one by one take."""
    with torch.no_grad():
        started = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        read = time.perf_counter()
        for _ in range(more):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return read - started, time.perf_counter() - read


if __name__ == "__main__":
    main()
