"""Quantised contestants: to nearest, QLoRA with the program, LoftQ's turns, and LQ-LoRA's objectives."""

from __future__ import annotations

from typing import Any

from torch import nn

import lowrank_ft
from lowrank_ft.algorithms.lora import LoRADelta
from lowrank_ft.anatomy import layouts
from lowrank_ft.modules.quantized import Quantized

PAPER = {"codebook": "nf", "rounding": "nearest", "mode": "paper", "grid": "paper", "iterations": 10}
# For each line of the tables: the method and its options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "NF, to nearest": ("nf", {}),
    "signed, to nearest": ("nf", {"codebook": "signed"}),
    "QLoRA, program": ("nf", {"grid": "paper"}),  # leaves room in the budget for a LoRA
    # PEFT's own LoftQ needs CUDA, and knows 4 and 8 bits; these are its turns.
    "LoftQ's turns": ("lq_lora", {"objective": "weight", "codebook": "nf", "rounding": "nearest"}),
    "LQ-LoRA, no data": ("lq_lora", {"objective": "weight", **PAPER}),
    "LQ-LoRA, Fisher": ("lq_lora", {"objective": "fisher", **PAPER}),
    "LQ-LoRA, activation": ("lq_lora", {"objective": "activation", "rounding": "nearest"}),
    "LQ-LoRA, loss": ("lq_lora", {}),
    "LQ-LoRA, loss, to nearest": ("lq_lora", {"rounding": "nearest"}),
    "LQ-LoRA, loss, ranks chosen": ("lq_lora", {"ranks": (1, 2, 4, 8, 16, 32)}),
}


def quantise(
    model: nn.Module, name: str, given: dict[str, Any], *, rank: int, bits: int | None, budget: float | None
) -> None:
    """Quantise every matrix to ``bits``, or all under a budget of bits a weight that counts factors.

    Args:
        model: changed in place.
        name: of ``METHODS``.
        given: calibration data and settings for ``wrap``; of use only to methods that look at data.
        rank: of the factors, where it is not chosen.
        bits: of every code; None under a budget.
        budget: None where ``bits`` is given.
    """
    method, options = METHODS[name]
    options = {**options, "bits": bits} if bits is not None else dict(options)
    if bits is not None:
        options.pop("grid", None)
    elif budget is not None:
        options["budget"] = budget - (factor_bits(model, rank) if name == "QLoRA, program" else 0.0)
    if method == "lq_lora":
        options.update(
            {"factors": "bfloat16"} if "ranks" in options else {"factors": "bfloat16", "rank": rank}
        )
    looks = method == "lq_lora" and options.get("objective") != "weight"
    lowrank_ft.wrap(model, method, **options, **(given if looks else {}))


def targeted(model: nn.Module) -> list[nn.Linear | Quantized]:
    """Return the linear layers in blocks, as they stand."""
    heads = tuple(layouts.head_names(model))
    layers = [module for name, module in model.named_modules() if not name.startswith(heads)]
    return [layer for layer in layers if isinstance(layer, (nn.Linear, Quantized))]


def factor_bits(model: nn.Module, rank: int) -> float:
    """Return the bits for each targeted weight that factors of a rank take in bfloat16."""
    sizes = [(layer.out_features, layer.in_features) for layer in targeted(model)]
    return sum(16 * rank * (o + i) for o, i in sizes) / sum(o * i for o, i in sizes)


def bits_of(model: nn.Module) -> dict[str, float]:
    """Return the bits for each targeted weight, with factors in bfloat16 and without; 32 if all is dense."""
    layers = targeted(model)
    weights = sum(layer.out_features * layer.in_features for layer in layers)
    stored = sum(layer.stored_bytes for layer in layers if isinstance(layer, Quantized)) or 4 * weights
    deltas = [module for module in model.modules() if isinstance(module, LoRADelta)]
    factors = sum(p.numel() for delta in deltas for p in delta.parameters()) if stored < 4 * weights else 0
    return {"stored bits": (8 * stored + 16 * factors) / weights, "without factors": 8 * stored / weights}
