"""What fine-tuning on code forgets of Wikipedia: full fine-tuning, LoRA, PiSSA, and CorDA in both modes.

The base is SmolLM2 after 96 steps on Wikipedia's training articles (merged LoRA, made once and cached): as
it comes, an instruct model from four bits, any text at all improves it on Wikipedia at first. It learns
Python (half of the standard library; held-out windows from the other half), and must keep Wikipedia (held-out
articles); Brown is text that nothing saw. CorDA-K calibrates on Wikipedia's training articles, CorDA-I on the
code. All adapters: rank 16 on every linear layer, scale 1, the same steps of 4 × 256 tokens, AdamW, a warm-up
over a twelfth of the steps and no decay after it, so that a point on the way is what a shorter run would have
ended with; weights in float32, products in bfloat16. Losses are in nats per token, rises against the base;
learnt is how much the loss on code fell.

Every method runs at two or three learning rates with one seed (seeds set the order of the data, and LoRA's
start), and with two more seeds at the rate at which it learnt most. Rows that are in the results file are not
run again; several processes can share the work.

    python scripts/bench_forgetting.py --prepare
    python scripts/bench_forgetting.py --part 0/2 & python scripts/bench_forgetting.py --part 1/2; wait
    python scripts/bench_forgetting.py --plot docs/forgetting.png
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch
from tabulate import tabulate
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft
from lowrank_ft import data as texts
from lowrank_ft import evaluation

METHODS: dict[str, dict[str, Any] | None] = {
    "full": None,
    "LoRA": {"method": "lora"},
    "PiSSA": {"method": "lora", "init": "pissa"},
    "CorDA-K": {"method": "corda", "mode": "knowledge", "text": "wikipedia"},
    "CorDA-I": {"method": "corda", "mode": "instruction", "text": "code"},
}
FULL_RATES, RATES = (3e-5, 1e-4), (1e-4, 3e-4, 1e-3)
SEEDS = 3
RANK, STEPS, BATCH, LENGTH = 16, 48, 4, 256
PREPARATION = 96  # steps on Wikipedia, at a rate of 1e-3
POINTS = (12, 24, 48)  # steps after which everything is measured
WINDOWS = {"code": 8, "wikipedia": 12, "brown": 4}
WINDOW = 512


@dataclass(frozen=True)
class Row:
    """One run at one point.

    Attributes:
        method: a key of ``METHODS``.
        rate: learning rate.
        seed: of the data's order.
        steps: so many were made.
        losses: held-out loss by corpus.
        before: the same before training.
        trained: numbers that train.
        seconds: of the steps so far, without measuring.
    """

    method: str
    rate: float
    seed: int
    steps: int
    losses: dict[str, float]
    before: dict[str, float]
    trained: int
    seconds: float


def main() -> None:
    """Run what is missing, and print the table."""
    parser = common.parser(__doc__, Path("docs/results/forgetting.jsonl"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/calibration"))
    parser.add_argument("--base", type=Path, default=Path(".cache/forgetting/base"))
    parser.add_argument("--prepare", action="store_true", help="make the base, and run nothing")
    parser.add_argument("--part", default="0/1", help="which share of the runs to do, such as 0/2")
    parser.add_argument("--plot", type=Path, help="write the plot here, and run nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.prepare:
        prepare(args)
        return
    if args.plot is None:
        part, parts = (int(n) for n in args.part.split("/"))
        first = [(m, rate, 0) for i in range(len(RATES)) for m in METHODS for rate in rates_of(m)[i : i + 1]]
        for run in first[part::parts]:
            ensure(run, args)
        while len(known := read(args.results)) < len(first) * len(POINTS):
            time.sleep(5)  # the other processes' share decides which rates go on
        more = [(m, best_rate(known, m), s) for m in METHODS if m != "full" for s in range(1, SEEDS)]
        for run in more[part::parts]:
            ensure(run, args)
    rows = read(args.results)
    print(table(rows))
    if args.plot is not None:
        plot(rows, args.plot)


def rates_of(method: str) -> tuple[float, ...]:
    """Return the learning rates that a method is tried at."""
    return FULL_RATES if method == "full" else RATES


def read(path: Path) -> list[Row]:
    """Return the rows that are there."""
    return [Row(**row) for row in common.read(path)]


def best_rate(rows: list[Row], method: str) -> float:
    """Return the rate at which a method has the lowest loss on code at the end, with the first seed."""
    ends = [r for r in rows if r.method == method and r.seed == 0 and r.steps == STEPS]
    return min(ends, key=lambda row: row.losses["code"]).rate


def ensure(run: tuple[str, float, int], args: argparse.Namespace) -> None:
    """Train once, unless that was done, and append its points."""
    method, rate, seed = run
    done = [r for r in read(args.results) if (r.method, r.rate, r.seed) == run]
    if len(done) == len(POINTS):
        return
    found = list(train(method, rate, seed, args))
    common.append(args.results, [asdict(row) for row in found])
    print(found[-1], flush=True)


def train(method: str, rate: float, seed: int, args: argparse.Namespace) -> Iterator[Row]:
    """Train a fresh model, and measure it at every point."""
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    held_out = {
        name: evaluation.spread_windows(ids(args, f"{name}/heldout.jsonl", tokenizer), WINDOW, count)
        for name, count in WINDOWS.items()
    }
    before = measure(model, held_out)
    adapt(model, method, seed, tokenizer, args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = ids(args, "code/train.jsonl", tokenizer)
    for step, seconds in steps(model, text, rate, seed, STEPS):
        if step in POINTS:
            yield Row(method, rate, seed, step, measure(model, held_out), before, trained, seconds)


def prepare(args: argparse.Namespace) -> None:
    """Make the base: SmolLM2, trained on Wikipedia."""
    model = AutoModelForCausalLM.from_pretrained(args.assets / "smollm2", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "smollm2")
    lowrank_ft.wrap(model, "lora", rank=RANK)
    for _ in steps(model, ids(args, "wikipedia/train.jsonl", tokenizer), 1e-3, 0, PREPARATION):
        pass
    lowrank_ft.merge(model, reversible=False)
    model.save_pretrained(args.base)
    tokenizer.save_pretrained(args.base)


def steps(model: nn.Module, text: Tensor, rate: float, seed: int, count: int) -> Iterator[tuple[int, float]]:
    """Train; after each step yield its number, and the seconds that all of them took so far."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    blocks = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    seconds, warmup = 0.0, count // 12
    for step in tqdm(range(1, count + 1), desc=f"{rate:g} #{seed}", leave=False):
        started = time.perf_counter()
        model.train()
        batch = blocks[order[(step - 1) * BATCH : step * BATCH]]
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / warmup)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - started
        yield step, seconds


def adapt(model: nn.Module, method: str, seed: int, tokenizer: Any, args: argparse.Namespace) -> None:
    """Put the method on the model; full fine-tuning trains everything."""
    options = dict(METHODS[method] or {})
    if not options:
        return
    name, text = options.pop("method"), options.pop("text", None)
    if text is None:
        lowrank_ft.wrap(model, name, rank=RANK, seed=seed, **options)
        return
    rows = texts.read(str(args.assets / text / "train.jsonl"), None, "train")
    settings = {"samples": 64, "length": WINDOW, "cache": str(args.cache)}
    looks = {"data": rows["text"][:], "tokenizer": tokenizer, "calibration": settings}
    lowrank_ft.wrap(model, name, rank=RANK, **options, **looks)


def ids(args: argparse.Namespace, path: str, tokenizer: Any) -> Tensor:
    """Return a corpus as one row of tokens."""
    return texts.text_ids(texts.read(str(args.assets / path), None, "train")["text"], tokenizer)


def measure(model: nn.Module, held_out: dict[str, Tensor]) -> dict[str, float]:
    """Return the loss on each corpus."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        return {name: evaluation.window_loss(model, windows, name) for name, windows in held_out.items()}


# Reporting --------------------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Return one line for each method and rate: what it learnt and what it forgot after the last step."""
    lines = []
    for method in METHODS:
        for rate in rates_of(method):
            ends = [r for r in rows if (r.method, r.rate, r.steps) == (method, rate, STEPS)]
            if ends:
                lines.append(
                    {
                        "method": method,
                        "rate": f"{rate:g}",
                        "seeds": len(ends),
                        "trained": f"{ends[0].trained:,}",
                        "learnt (code)": spread([-rise(r, "code") for r in ends]),
                        "forgot (Wikipedia)": spread([rise(r, "wikipedia") for r in ends]),
                        "forgot (Brown)": spread([rise(r, "brown") for r in ends]),
                    }
                )
    return tabulate(lines, "keys", "github", disable_numparse=True)


def rise(row: Row, corpus: str) -> float:
    """Return how much a loss rose."""
    return row.losses[corpus] - row.before[corpus]


def spread(values: list[float]) -> str:
    """Return the mean, and the standard deviation over seeds where there are several."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def plot(rows: list[Row], path: Path) -> None:
    """Draw forgetting against learning: a line for each run, through its points."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for color, method in enumerate(METHODS):
        runs = sorted({(r.rate, r.seed) for r in rows if r.method == method})
        for number, (rate, seed) in enumerate(runs):
            run = [r for r in rows if (r.method, r.rate, r.seed) == (method, rate, seed)]
            run.sort(key=lambda row: row.steps)
            learnt, forgot = [-rise(r, "code") for r in run], [rise(r, "wikipedia") for r in run]
            label = None if number else method
            axes.plot(learnt, forgot, "o-", color=f"C{color}", ms=3, lw=1, label=label)
    axes.set_xlim(0, 0.115)  # what learnt nothing at all is in the table
    axes.set_ylim(-0.005, 0.06)
    axes.set_xlabel("learnt: fall of the loss on code (nats per token)")
    axes.set_ylabel("forgot: rise of the loss on Wikipedia")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
