"""QLoRA: store the base in 4 bits, train a LoRA on it, and fold both into a stock model.

To run it (`make assets` provides what the defaults name):

    python examples/qlora.py [MODEL TEXTS.jsonl OUT]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft


def main(
    base: str = ".cache/assets/smollm2",
    texts: str = ".cache/assets/wikipedia/train.jsonl",
    output: str = "outputs/qlora",
    *,
    steps: int = 20,
    length: int = 128,
) -> dict[str, float]:
    """Train on a base in 4 bits, and return the held-out loss at each stage."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lines = [json.loads(line)["text"] for line in Path(texts).read_text(encoding="utf-8").splitlines()]
    batches = [tokenizer(text, return_tensors="pt")["input_ids"][:, :length] for text in lines[: steps + 8]]
    training, held_out = batches[:-8], batches[-8:]  # the last eight texts are never trained on

    def loss() -> float:
        with torch.no_grad():
            each = [model.eval()(input_ids=ids, labels=ids).loss for ids in held_out]
        return float(torch.stack(each).mean())

    losses, dense = {"dense": loss()}, model.get_memory_footprint()
    # A list of configs is applied in order. lowrank_ft.LQLoRA(bits=3) alone would correct the rounding too.
    lowrank_ft.wrap(model, [lowrank_ft.NF(bits=4), lowrank_ft.LoRA(rank=8)])
    print(f"{dense / 1e6:.2f} MB dense, {model.get_memory_footprint() / 1e6:.2f} MB now")

    losses["in 4 bits"] = loss()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for ids in training:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses["trained"] = loss()
    print("held-out loss: " + ", ".join(f"{stage} {value:.3f}" for stage, value in losses.items()))

    model.save_pretrained(output)  # the packed base and the adapter; plain from_pretrained reads both
    fresh = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(held_out[0]).logits, model.eval()(held_out[0]).logits)
    print("reloaded: logits are equal")
    lowrank_ft.export(model, f"{output}-dense", "dense")  # stock weights, which every engine reads
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
