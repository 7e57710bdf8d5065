"""The demo: fine-tune SmolLM2 on Wikipedia, save, reload, merge, export, and compare every way back.

    make demo

Each step is the command a user would type; what it prints at the end is measured in this run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate

from lowrank_ft.recipes import models

ROOT = Path(__file__).parent.parent
OUT = ROOT / "outputs" / "demo"
BASE = ROOT / ".cache" / "assets" / "smollm2"
HELD_OUT = ROOT / ".cache" / "assets" / "wikipedia" / "heldout.jsonl"


def main() -> None:
    """Run the steps and print the closing table."""
    started = time.perf_counter()
    command("accelerate", "launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no",
            "recipes/finetune.py", "--config", "configs/recipes/demo.yaml")  # fmt: skip
    adapter = OUT / "adapter"
    given = ("--model", str(BASE), "--adapter", str(adapter))
    lowrank("merge", *given, "--output", str(OUT / "merged"))
    lowrank("export", *given, "--output", str(OUT / "peft"), "--format", "peft")
    lowrank("inspect", str(adapter))
    lowrank("evaluate", "--model", str(OUT / "merged"), "--text", str(HELD_OUT), "--window", "256",
            "--stride", "256", "--max_tokens", "4096", "--batch_size", "4")  # fmt: skip

    report = json.loads((OUT / "report.json").read_text())
    before, after = report["before"]["loss"], report["after"]["loss"]
    differences = compare(adapter)
    rows = [
        ("held-out perplexity, before", f"{2.718281828459045**before:.3f}"),
        ("held-out perplexity, after", f"{2.718281828459045**after:.3f}"),
        ("adapter reloaded in a fresh process, logits", f"max |Δ| = {report['reload_difference']:.2e}"),
        ("merged model against adapter, logits", f"max |Δ| = {differences['merged']:.2e}"),
        ("PEFT on our export against adapter, logits", f"max |Δ| = {differences['peft']:.2e}"),
        ("largest logit", f"{differences['scale']:.1f}"),
        ("all of it took", f"{time.perf_counter() - started:.0f} s"),
    ]
    print("\n" + tabulate(rows, ("demo", "measured"), "github", disable_numparse=True))
    if not after < before:
        sys.exit("The held-out loss did not fall.")


def command(program: str, *args: str) -> None:
    """Run a program of this environment and show what it is."""
    print(f"\n$ {program} {' '.join(args)}", flush=True)
    subprocess.run([str(Path(sys.executable).parent / program), *args], check=True, cwd=ROOT)


def lowrank(*args: str) -> None:
    """Run the package's command."""
    command("lowrank-ft", *args)


def compare(adapter: Path) -> dict[str, float]:
    """Return how far the merged model and PEFT's are from the adapter's, in logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    text = json.loads(HELD_OUT.read_text().splitlines()[0])["text"][:1200]
    base, tokenizer = models.load_causal_lm(str(BASE), "float32", "cpu")
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    found = {}
    with torch.no_grad():
        in_peft = PeftModel.from_pretrained(base, str(OUT / "peft")).eval()(input_ids=ids).logits
        ours, _ = models.load_causal_lm(str(BASE), "float32", "cpu", str(adapter))
        logits = ours.eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(OUT / "merged")(input_ids=ids).logits
    found["peft"] = (in_peft - logits).abs().max().item()
    found["merged"] = (merged - logits).abs().max().item()
    found["scale"] = logits.abs().max().item()
    return found


if __name__ == "__main__":
    main()
