"""Train with TRL's SFTTrainer: a wrapped model is a model like any other, and needs one callback.

To run it (`make assets` provides what the defaults name):

    pip install 'lowrank_ft[trl]'
    python examples/trl_sft.py [MODEL TEXTS.jsonl OUT]
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


def main(
    base: str = ".cache/assets/smollm2",
    texts: str = ".cache/assets/wikipedia/train.jsonl",
    output: str = "outputs/sft",
    *,
    steps: int = 10,
    length: int = 128,
) -> dict[str, float]:
    """Train, and return the held-out loss before and after."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lowrank_ft.wrap(model, "lora", rank=8)
    lines = Path(texts).read_text(encoding="utf-8").splitlines()
    rows = Dataset.from_list([{"text": json.loads(line)["text"]} for line in lines])
    arguments = SFTConfig(
        output_dir=output, max_steps=steps, max_length=length, per_device_train_batch_size=2,
        learning_rate=1e-3, logging_steps=5, save_steps=steps, report_to="none",
        use_cpu=not torch.accelerator.is_available(), bf16=False, gradient_checkpointing=None,
    )  # fmt: skip
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=rows.select(range(len(rows) - 8)),
        eval_dataset=rows.select(range(len(rows) - 8, len(rows))),
        processing_class=tokenizer,
        callbacks=[lowrank_ft.AdapterCheckpoint()],  # checkpoints hold the adapters alone, and resume exactly
    )
    losses = {"before": trainer.evaluate()["eval_loss"]}
    trainer.train()
    losses["after"] = trainer.evaluate()["eval_loss"]
    print(f"held-out loss {losses['before']:.3f} → {losses['after']:.3f}")

    adapter = Path(output) / f"checkpoint-{steps}" / "adapter"  # what lowrank_ft.load reads
    fresh = lowrank_ft.load(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    ids = tokenizer(json.loads(lines[0])["text"], return_tensors="pt")["input_ids"][:, :length]
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)
    print("reloaded: logits are equal")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
