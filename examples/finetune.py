"""Fine-tune with LoRA in a loop of your own, save the adapter, and load it onto a fresh base.

python examples/finetune.py MODEL TEXTS.jsonl outputs/finetune
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft


def main(base: str, texts: str, output: str, steps: int = 20, length: int = 128) -> list[float]:
    """Train for some steps, and return the losses."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lowrank_ft.wrap(model, "lora", rank=8)  # freezes the base; the outputs are still bit-identical
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

    lines = Path(texts).read_text(encoding="utf-8").splitlines()
    losses = []
    for step in range(steps):
        ids = tokenizer(json.loads(lines[step % 4])["text"], return_tensors="pt")["input_ids"][:, :length]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")

    lowrank_ft.save(model, output, tokenizer=tokenizer)
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lowrank_ft.load(fresh, output)  # checks that this is the base that the adapter was made for
    with torch.no_grad():
        difference = (fresh.eval()(ids).logits - model.eval()(ids).logits).abs().max()
    print(f"reloaded: logits differ by {difference:.1e}")
    assert difference == 0
    return losses


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
