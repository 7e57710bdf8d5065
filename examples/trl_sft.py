"""Train with TRL's SFTTrainer: a wrapped model is a model like any other, and needs one callback.

pip install 'lowrank_ft[trl]'
python examples/trl_sft.py MODEL TEXTS.jsonl outputs/sft
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lowrank_ft


def main(base: str, texts: str, output: str, steps: int = 10, length: int = 128) -> float:
    """Train, and return the last loss that the trainer logged."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lowrank_ft.wrap(model, "lora", rank=8)
    lines = Path(texts).read_text(encoding="utf-8").splitlines()[:64]
    arguments = SFTConfig(
        output_dir=output, max_steps=steps, max_length=length, per_device_train_batch_size=2,
        learning_rate=2e-3, logging_steps=1, save_steps=steps, report_to="none",
        use_cpu=not torch.accelerator.is_available(), bf16=False, gradient_checkpointing=None,
    )  # fmt: skip
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_list([{"text": json.loads(line)["text"]} for line in lines]),
        processing_class=tokenizer,
        callbacks=[lowrank_ft.AdapterCheckpoint()],  # checkpoints hold the adapters alone, and resume exactly
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}")

    adapter = Path(output) / f"checkpoint-{steps}" / "adapter"  # what lowrank_ft.load reads
    fresh = lowrank_ft.load(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    ids = tokenizer(json.loads(lines[0])["text"], return_tensors="pt")["input_ids"][:, :length]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)
    return float(losses[-1])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3])
