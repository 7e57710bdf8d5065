"""Compress a model by what its layers do to the loss, then recover what was lost with a LoRA.

python examples/compress_recover.py MODEL TEXTS.jsonl outputs/smaller
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft


def main(base: str, texts: str, output: str, steps: int = 20, length: int = 128) -> dict[str, float]:
    """Compress, recover, save; return the losses on the first text."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lines = [json.loads(line)["text"] for line in Path(texts).read_text(encoding="utf-8").splitlines()]
    batches = [tokenizer(text, return_tensors="pt")["input_ids"][:, :length] for text in lines[:8]]

    def loss() -> float:
        with torch.no_grad():
            each = [model.eval()(input_ids=ids, labels=ids).loss for ids in batches]
        return float(torch.stack(each).mean())

    losses, before = {"dense": loss()}, model.num_parameters()
    # Ratios are of the parameters in blocks. A cache directory makes a second ratio nearly free.
    settings = {"samples": 32, "gradient_samples": 8, "length": length}
    lowrank_ft.wrap(model, "modegpt", ratio=0.2, data=lines, tokenizer=tokenizer, calibration=settings)
    losses["compressed"] = loss()
    print(f"{before:,} parameters before, {model.num_parameters():,} after")

    lowrank_ft.wrap(model, "lora", rank=8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        ids = batches[step % len(batches)]
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses["recovered"] = loss()
    print(", ".join(f"{name} {value:.3f}" for name, value in losses.items()))

    lowrank_ft.merge(model, reversible=False)  # the adapter goes into the factors and the narrower layers
    model.save_pretrained(output)  # after `import lowrank_ft`, plain from_pretrained loads it
    return losses


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
