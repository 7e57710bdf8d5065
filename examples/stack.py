"""Stack three methods: factor the layers, store the factors in few bits, adapt what is stored.

To run it (`make assets` provides what the defaults name):

    python examples/stack.py [MODEL TEXTS.jsonl OUT]
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
    output: str = "outputs/stack",
    *,
    steps: int = 20,
    length: int = 128,
) -> dict[str, tuple[int, float]]:
    """Stack, train, save, reload; return the bytes and the held-out loss after each stage."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lines = [json.loads(line)["text"] for line in Path(texts).read_text(encoding="utf-8").splitlines()]
    batches = [tokenizer(text, return_tensors="pt")["input_ids"][:, :length] for text in lines]
    training, held_out = batches[:-8], batches[-8:]  # neither calibration nor training sees the last eight
    stages: dict[str, tuple[int, float]] = {}

    def measure(stage: str) -> None:
        with torch.no_grad():
            losses = [model.eval()(input_ids=ids, labels=ids).loss.item() for ids in held_out]
        stages[stage] = model.get_memory_footprint(), sum(losses) / len(losses)
        print(f"{stage}: {stages[stage][0] / 1e6:.2f} MB, held-out loss {stages[stage][1]:.3f}")

    measure("dense")
    looks = {"samples": 32, "length": length}
    lowrank_ft.wrap(model, "lord", ratio=0.2, data=lines[:-8], tokenizer=tokenizer, calibration=looks)
    measure("factored")
    lowrank_ft.wrap(model, "nf", bits=4)  # each factor is stored on its own
    measure("in 4 bits")
    lowrank_ft.wrap(model, "lora", rank=4)  # trains as on any model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for ids in training[:steps]:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    measure("adapted")

    model.save_pretrained(output)
    fresh = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(held_out[0]).logits, model.eval()(held_out[0]).logits)
    print("reloaded: logits are equal")
    return stages


if __name__ == "__main__":
    main(*sys.argv[1:])
