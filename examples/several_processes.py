"""Train on several GPUs, or several CPU processes: nothing changes but the launcher.

To run it (`make assets` provides what the defaults name):

    accelerate launch --num_processes 2 examples/several_processes.py [MODEL TEXTS.jsonl OUT]
    accelerate launch --multi_gpu --num_processes 2 examples/several_processes.py    # without any GPU

Without a GPU, accelerate starts one process, whatever the number, unless `--multi_gpu` makes it use torchrun.
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


def main(
    base: str = ".cache/assets/smollm2",
    texts: str = ".cache/assets/wikipedia/train.jsonl",
    output: str = "outputs/parallel",
    *,
    steps: int = 10,
    length: int = 64,
) -> None:
    """Train, and save from the first process."""
    # Processes without a GPU find each other only if they are told that the CPU is wanted.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lowrank_ft.wrap(model, "lora", rank=8)  # before prepare(); every process draws the same start
    lines = [json.loads(line)["text"] for line in Path(texts).read_text(encoding="utf-8").splitlines()]
    tokens = torch.cat([tokenizer(text, return_tensors="pt")["input_ids"][0] for text in lines[:64]])
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    training, held_out = TensorDataset(rows[:-4]), rows[-4:].to(accelerator.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(training, batch_size=2))

    def loss() -> float:
        with torch.no_grad():
            return float(wrapped.eval()(input_ids=held_out, labels=held_out).loss)

    before = loss()
    for _, (ids,) in zip(range(steps), loader, strict=False):  # each process has its share of the rows
        accelerator.backward(wrapped.train()(input_ids=ids, labels=ids).loss)  # averages the gradients
        optimizer.step()
        optimizer.zero_grad()
    after = accelerator.gather(torch.tensor([loss()], device=accelerator.device))
    assert (after == after[0]).all()  # the adapters are the same in every process
    if accelerator.is_main_process:
        print(f"{accelerator.num_processes} processes: held-out loss {before:.3f} → {after[0]:.3f}")
        lowrank_ft.save(accelerator.unwrap_model(wrapped), output, tokenizer=tokenizer)
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
