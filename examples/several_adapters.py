"""Keep several adapters on one model: train each alone, switch between them, add them up.

To run it (`make assets` provides what the defaults name):

    python examples/several_adapters.py [MODEL OUT]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowrank_ft


def train(model: nn.Module, ids: Tensor, steps: int) -> None:
    """Train the active adapters, and nothing else, on one sequence."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(
    base: str = ".cache/assets/smollm2", output: str = "outputs/adapters", *, steps: int = 10
) -> dict[str, list[float]]:
    """Train two adapters, and return each combination's loss on both sequences."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    sequences = {"up": torch.arange(3, 35)[None], "down": torch.arange(34, 2, -1)[None]}
    for name, ids in sequences.items():
        lowrank_ft.wrap(model, "lora", rank=4, name=name)  # becomes the only active one
        train(model, ids, steps)

    losses = {}
    for active in (["up"], ["down"], ["up", "down"]):
        lowrank_ft.set_adapter(model, active)
        with torch.no_grad():
            losses["+".join(active)] = [model(ids, labels=ids).loss.item() for ids in sequences.values()]
    with lowrank_ft.disable(model), torch.no_grad():
        losses["base"] = [model(ids, labels=ids).loss.item() for ids in sequences.values()]
    for active_names, (up, down) in losses.items():
        print(f"{active_names:>8}: loss going up {up:.3f}, going down {down:.3f}")

    lowrank_ft.save(model, output)  # both of them; name="up" would save one
    fresh = lowrank_ft.load(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), output)
    lowrank_ft.delete_adapter(model, "down")
    lowrank_ft.set_adapter(fresh, "up")
    lowrank_ft.set_adapter(model, "up")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)
    print("reloaded and switched: logits are equal")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
