"""Train on several GPUs, or several CPU processes: nothing changes but the launcher.

accelerate launch --num_processes 2 examples/several_processes.py MODEL TEXTS.jsonl outputs/parallel
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft


def main(base: str, texts: str, output: str, steps: int = 10, length: int = 64) -> None:
    """Train, and save from the first process."""
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lowrank_ft.wrap(model, "lora", rank=8)  # before prepare(); every process draws the same start
    lines = [json.loads(line)["text"] for line in Path(texts).read_text(encoding="utf-8").splitlines()]
    tokens = torch.cat([tokenizer(text, return_tensors="pt")["input_ids"][0] for text in lines[:64]])
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    wrapped, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(TensorDataset(rows), batch_size=2)
    )

    losses: list[float] = []
    for _, (ids,) in zip(range(steps), loader, strict=False):  # each process has its share of the rows
        loss = wrapped(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.gather(loss.detach()).mean().item())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        print(f"{accelerator.num_processes} processes: loss {losses[0]:.3f} → {losses[-1]:.3f}")
        lowrank_ft.save(accelerator.unwrap_model(wrapped), output, tokenizer=tokenizer)
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
