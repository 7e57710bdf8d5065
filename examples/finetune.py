"""Fine-tune with LoRA in a loop of your own, save the adapter, and load it onto a fresh base.

To run it (`make assets` provides what the defaults name):

    python examples/finetune.py [MODEL TEXTS.jsonl OUT]
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
    output: str = "outputs/finetune",
    *,
    steps: int = 20,
    length: int = 128,
) -> dict[str, float]:
    """Train on one text a step, and return the held-out loss before and after."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lowrank_ft.wrap(model, "lora", rank=8)  # freezes the base; the outputs are still bit-identical
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    lines = [json.loads(line)["text"] for line in Path(texts).read_text(encoding="utf-8").splitlines()]
    batches = [tokenizer(text, return_tensors="pt")["input_ids"][:, :length] for text in lines[: steps + 8]]
    training, held_out = batches[:-8], batches[-8:]  # the last eight texts are never trained on

    def loss() -> float:
        with torch.no_grad():
            each = [model.eval()(input_ids=ids, labels=ids).loss for ids in held_out]
        return float(torch.stack(each).mean())

    losses = {"before": loss()}
    for ids in training:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses["after"] = loss()
    print(f"held-out loss {losses['before']:.3f} → {losses['after']:.3f}")

    lowrank_ft.save(model, output, tokenizer=tokenizer)
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lowrank_ft.load(fresh, output)  # checks that this is the base that the adapter was made for
    with torch.no_grad():
        difference = (fresh.eval()(held_out[0]).logits - model.eval()(held_out[0]).logits).abs().max()
    print(f"reloaded: logits differ by {difference:.1e}")
    assert difference == 0
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
