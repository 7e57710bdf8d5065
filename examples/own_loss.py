"""Compress any module for your own loss and data: here a small network that regresses.

Layers are kept where *this* loss depends on them. The loss is summed over a batch, not averaged.

To run it:

    python examples/own_loss.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ft


def squared_error(model: nn.Module, batch: dict[str, Tensor], output: Tensor) -> Tensor:
    """Return the loss of a batch, from what the model returned for it."""
    return 0.5 * (output - batch["target"]).square().sum()


class Regressor(nn.Module):
    """Two hidden layers. Its forward takes all of a batch, and leaves alone what it does not need."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)
        )

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Return one number for each row."""
        return self.layers(x)  # type: ignore[no-any-return]


def main(steps: int = 300) -> dict[str, float]:
    """Train a network, compress it for its loss and by its weights alone, and return the errors."""
    torch.manual_seed(0)
    model, x = Regressor(), torch.randn(512, 32)
    target = x[:, :4].prod(1, keepdim=True) + x[:, 4:8].sum(1, keepdim=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        torch.autograd.backward(squared_error(model, {"target": target}, model(x)))
        optimizer.step()
        optimizer.zero_grad()

    parts = zip(torch.split(x, 64), torch.split(target, 64), strict=True)
    batches = [{"x": inputs, "target": wanted} for inputs, wanted in parts]
    trained, errors = {k: v.clone() for k, v in model.state_dict().items()}, {}
    contestants: dict[str, dict[str, Any]] = {
        "for the loss": {"data": batches, "loss": squared_error},
        "for the weights": {"objective": "weight"},
    }
    for name, options in contestants.items():
        small = Regressor()
        small.load_state_dict(trained)
        lowrank_ft.wrap(small, "lord", ratio=0.5, ratio_of="targets", align=1, **options)
        with torch.no_grad():
            errors[name] = (small(x) - model(x)).square().mean().item()
        print(f"half of the parameters removed {name}: mean squared change {errors[name]:.4f}")
    return errors


if __name__ == "__main__":
    main()
