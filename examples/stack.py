"""Stack three methods: factor the layers, store the factors in few bits, adapt what is stored.

python examples/stack.py MODEL TEXTS.jsonl outputs/stack
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft


def main(base: str, texts: str, output: str, length: int = 128) -> dict[str, int]:
    """Stack, save, reload; return the bytes after each stage."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lines = [json.loads(line)["text"] for line in Path(texts).read_text(encoding="utf-8").splitlines()]
    looks = {"data": lines, "tokenizer": tokenizer, "calibration": {"samples": 32, "length": length}}

    sizes = {"dense": model.get_memory_footprint()}
    lowrank_ft.wrap(model, "lord", ratio=0.2, **looks)
    sizes["factored"] = model.get_memory_footprint()
    lowrank_ft.wrap(model, "nf", bits=4)  # each factor is stored on its own
    sizes["in 4 bits"] = model.get_memory_footprint()
    lowrank_ft.wrap(model, "lora", rank=4)  # trains as on any model
    for stage, size in sizes.items():
        print(f"{stage}: {size / 1e6:.2f} MB")

    model.save_pretrained(output)
    fresh = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    ids = tokenizer(lines[0], return_tensors="pt")["input_ids"][:, :length]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)
    print(lowrank_ft.report(fresh))
    return sizes


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
