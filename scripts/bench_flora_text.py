"""FLoRA and LoRA on a language model, at equal numbers: SmolLM2 on E2E.

On a linear layer a Tucker update reaches no more than a LoRA of the smaller of its ranks, and pays for a
core. The task and the training are those of ``scripts/bench_nola_sizes.py``; each method's rate is the best
of those listed by its first seed.

    python scripts/prepare_assets.py .cache/assets --e2e && python scripts/bench_flora_text.py

Rows that are in the results file are not run again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import bench_nola_sizes as e2e
import common
import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft

LORA_R4 = 1_221_120  # numbers of a LoRA of rank 4 on all linear layers
# Rates: the best of a LoRA of rank 4 in scripts/bench_nola_sizes.py.
CONTESTANTS: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {
    "LoRA r=4": ("lora", {"rank": 4}, (1e-2,)),
    "FLoRA": ("flora", {"budget": LORA_R4}, (1e-2,)),
    "FLoRA, paper's start": ("flora", {"budget": LORA_R4, "init": "kaiming-normal"}, (3e-3, 1e-2)),
}
SEEDS = {"LoRA r=4": 2, "FLoRA": 2, "FLoRA, paper's start": 1}


def main() -> None:
    """Run what is missing, and print the table."""
    parser = common.parser(__doc__, Path("docs/results/flora_text.jsonl"))
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, (_, _, rates) in CONTESTANTS.items():
        for seed in range(SEEDS[name]):
            tried = rates if seed == 0 else (best_rate(name, common.read(args.results)),)
            for rate in tried:
                key = {"method": name, "rate": rate, "seed": seed, "steps": args.steps}
                if not common.is_done(key, common.read(args.results)):
                    row = {**key, **run(name, rate, seed, args)}
                    common.append(args.results, [row])
                    print(row, flush=True)
    print(table(common.read(args.results)))


def best_rate(name: str, rows: list[dict[str, Any]]) -> float:
    """Return the rate of the lowest loss with the first seed."""
    first = [row for row in rows if row["method"] == name and row["seed"] == 0]
    return float(min(first, key=lambda row: float(row["loss"]))["rate"])


def run(name: str, rate: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train a fresh model, and measure."""
    method, options, _ = CONTESTANTS[name]
    model = AutoModelForCausalLM.from_pretrained(args.assets / "smollm2", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "smollm2")
    train, held_out = (
        e2e.examples(args.assets / "e2e" / f"{p}.jsonl", tokenizer) for p in ("train", "heldout")
    )
    lowrank_ft.wrap(model, method, seed=seed, **options)
    e2e.fit(model, train, rate, seed, args.steps)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"loss": e2e.loss_of(model, held_out[::2]), "trained": trained}


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each method, at its best rate."""
    lines = []
    for name in CONTESTANTS:
        if not any(row["method"] == name for row in rows):
            continue
        rate = best_rate(name, rows)
        own = [row for row in rows if row["method"] == name and row["rate"] == rate]
        losses = [float(row["loss"]) for row in own]
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        lines.append(
            {
                "method": name,
                "trained": f"{own[0]['trained']:,}",
                "held-out loss": f"{statistics.mean(losses):.3f}{spread}",
                "rate": f"{rate:g}",
                "seeds": len(losses),
            }
        )
    return tabulate(lines, "keys", "github", disable_numparse=True)


if __name__ == "__main__":
    main()
