"""How many parameters a model has, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lowrank_ft.algorithms.base import Counts
from lowrank_ft.anatomy import layouts
from lowrank_ft.engine.state import stock_tensors
from lowrank_ft.modules.quantized import Quantized


def numbers_in(modules: Iterable[nn.Module]) -> int:
    """Return how many parameters modules have; every quantised weight counts as one."""
    return sum(p.numel() for module in modules for p in module.parameters()) + sum(
        part.weights for module in modules for part in module.modules() if isinstance(part, Quantized)
    )


def bytes_of(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of parameters and persistent buffers; tied ones count once."""
    tensors = (t for module in modules for t in module.state_dict().values())
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def count(model: nn.Module) -> Counts:
    """Count a model's parameters: all of them, and those in its blocks (all but embeddings and head).

    Tied weights count once, and every quantised weight counts as one.
    """
    total = {id(p): p.numel() for p in model.parameters()}
    total.update({id(m): m.weights for m in model.modules() if isinstance(m, Quantized)})
    heads = layouts.head_names(model)
    outside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or name in heads:
            outside |= {id(p) for p in module.parameters()}
    tensors = {id(t): t for t in stock_tensors(model).values()}.values()
    return Counts(
        total=sum(total.values()),
        blocks=sum(n for key, n in total.items() if key not in outside),
        tensors=len(tensors),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
    )
