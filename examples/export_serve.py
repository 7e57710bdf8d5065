"""Write what serving engines read: a merged stock model, and an adapter for PEFT and vLLM.

To run it (`make assets` provides what the defaults name):

    python examples/export_serve.py [MODEL OUT]

Then one of these, with engines that read standard directories:

    vllm serve outputs/serve/merged
    vllm serve MODEL --enable-lora --lora-modules mine=outputs/serve/peft
    python convert_hf_to_gguf.py outputs/serve/merged     # of llama.cpp
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft

# A process that cannot import lowrank_ft, as a serving engine cannot.
ENGINE = """
import sys, torch
sys.modules["lowrank_ft"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[2])["ids"]).logits.contiguous()}, sys.argv[3])
"""


def main(base: str = ".cache/assets/smollm2", output: str = "outputs/serve") -> float:
    """Export both ways, and return how far a fresh process's logits are from the adapted model's."""
    directory = Path(output)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    lowrank_ft.wrap(model, "lora", rank=8)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.01 * torch.randn_like(parameter))  # in the place of training

    lowrank_ft.export(model, directory / "peft", "peft", tokenizer=tokenizer)
    lowrank_ft.export(model, directory / "merged", "dense", tokenizer=tokenizer)

    # Real text: on arbitrary tokens float32 itself is off by far more, merged or not.
    ids = tokenizer("the cat sat on a mat and saw an old red dog", return_tensors="pt")["input_ids"]
    save_file({"ids": ids}, directory / "ids.safetensors")
    files = [str(directory / name) for name in ("merged", "ids.safetensors", "logits.safetensors")]
    subprocess.run([sys.executable, "-c", ENGINE, *files], check=True)
    with torch.no_grad():
        logits = model(ids).logits
    # Not zero: the merged weight is rounded once, where the adapter's product is rounded apart.
    difference = float((load_file(files[-1])["logits"] - logits).abs().max())
    print(f"served by stock code: logits differ by {difference:.1e}, the largest is {logits.abs().max():.1f}")
    assert difference < 1e-4 * logits.abs().max()
    return difference


if __name__ == "__main__":
    main(*sys.argv[1:])
