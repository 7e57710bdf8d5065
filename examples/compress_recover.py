"""Compress a model by what its layers do to the loss, then recover what was lost with a LoRA.

To run it (`make assets` provides what the defaults name):

    python examples/compress_recover.py [MODEL TEXTS.jsonl OUT]
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
    output: str = "outputs/smaller",
    *,
    steps: int = 20,
    length: int = 128,
) -> dict[str, float]:
    """Compress, recover, save; return the held-out loss at each stage."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lines = [json.loads(line)["text"] for line in Path(texts).read_text(encoding="utf-8").splitlines()]
    batches = [tokenizer(text, return_tensors="pt")["input_ids"][:, :length] for text in lines]
    training, held_out = batches[:-8], batches[-8:]  # neither calibration nor training sees the last eight

    def loss() -> float:
        with torch.no_grad():
            each = [model.eval()(input_ids=ids, labels=ids).loss for ids in held_out]
        return float(torch.stack(each).mean())

    losses, before = {"dense": loss()}, model.num_parameters()
    # Ratios are of the parameters in blocks. A cache directory makes a second ratio nearly free.
    settings = {"samples": 32, "gradient_samples": 8, "length": length}
    lowrank_ft.wrap(model, "modegpt", ratio=0.2, data=lines[:-8], tokenizer=tokenizer, calibration=settings)
    losses["compressed"] = loss()
    print(f"{before:,} parameters before, {model.num_parameters():,} after")

    lowrank_ft.wrap(model, "lora", rank=8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for ids in training[:steps]:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    losses["recovered"] = loss()
    print("held-out loss: " + ", ".join(f"{stage} {value:.3f}" for stage, value in losses.items()))

    lowrank_ft.merge(model, reversible=False)  # the adapter goes into the factors and the narrower layers
    model.save_pretrained(output)  # after `import lowrank_ft`, plain from_pretrained loads it
    fresh = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(held_out[0]).logits, model.eval()(held_out[0]).logits)
    print("reloaded: logits are equal")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
