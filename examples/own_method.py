"""Write an adapter of your own: one file gives it every verb, every checkpoint format and the command line.

This one trains a factor for each output of a layer (IA³, Liu et al. 2022, arXiv 2205.05638).

To run it (`make assets` provides what the defaults name):

    python examples/own_method.py [MODEL OUT]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowrank_ft
from lowrank_ft.algorithms.base import AdapterConfig, Family, Method, Share
from lowrank_ft.anatomy.sites import Site
from lowrank_ft.modules.delta import Delta, DeltaNode
from lowrank_ft.modules.layer import Layer
from lowrank_ft.structure.registry import register_method, register_node


@dataclass(frozen=True)
class Gain(AdapterConfig):
    """Gain: one trained factor for each output."""


@register_node
@dataclass(frozen=True)
class GainNode(DeltaNode):
    """What reaches the checkpoint's JSON: enough to build the module without values."""

    kind: ClassVar[str] = "gain"

    def delta(self, layer: Layer) -> Delta:
        """Build the module for a layer."""
        return GainDelta(self, layer)


class GainDelta(Delta):
    """``ΔW = diag(gain) W``."""

    def __init__(self, node: GainNode, layer: Layer) -> None:
        super().__init__(node, layer)
        self.gain_of_outputs = self.new_parameter(layer.out_features)

    def weight(self) -> Tensor:
        """Return the update, ``(out, in)``."""
        return self.gain_of_outputs[:, None] * self.layer.matrix().to(self.gain_of_outputs.dtype)


@register_method
class GainMethod(Method[Gain]):
    """Which structure, which values. The engine does the rest."""

    name, family, Config = "gain", Family.ADAPTER, Gain

    def structure(self, site: Site, share: Share) -> Mapping[str, GainNode]:
        """Say what is put on the layers of a site."""
        return {name: GainNode() for name in site.names}

    def values(self, site: Site, new: Mapping[str, Any], statistics: Any, handle: Any = None) -> None:
        """Start at the base model."""
        for delta in new.values():
            torch.nn.init.zeros_(delta.gain_of_outputs)


def main(base: str = ".cache/assets/smollm2", output: str = "outputs/own", *, steps: int = 10) -> list[float]:
    """Wrap, train, save, reload, merge; return the loss of each step."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    lowrank_ft.wrap(model, "gain", targets=["q_proj", "v_proj"])
    assert torch.equal(model(ids).logits, before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss of one sequence {losses[0]:.3f} → {losses[-1]:.3f}")
    lowrank_ft.save(model, output)
    fresh = lowrank_ft.load(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), output)
    assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)
    print(lowrank_ft.report(fresh))
    lowrank_ft.merge(fresh)  # a stock model again
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
