"""QLoRA: store the base in 4 bits, train a LoRA on it, and fold both into a stock model.

python examples/qlora.py MODEL TEXTS.jsonl outputs/qlora
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft


def main(base: str, texts: str, output: str, steps: int = 20, length: int = 128) -> list[float]:
    """Train on a base in 4 bits, and return the losses."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    dense = model.get_memory_footprint()
    # A list of configs is applied in order. lowrank_ft.LQLoRA(bits=3) alone would correct the rounding too.
    lowrank_ft.wrap(model, [lowrank_ft.NF(bits=4), lowrank_ft.LoRA(rank=8)])
    print(f"{dense / 1e6:.1f} MB dense, {model.get_memory_footprint() / 1e6:.1f} MB now")

    lines = Path(texts).read_text(encoding="utf-8").splitlines()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for step in range(steps):
        ids = tokenizer(json.loads(lines[step % 4])["text"], return_tensors="pt")["input_ids"][:, :length]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")

    model.save_pretrained(output)  # the packed base and the adapter; plain from_pretrained reads both
    fresh = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)
    lowrank_ft.export(model, f"{output}-dense", "dense")  # stock weights, which every engine reads
    return losses


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
