"""The matrix: every registered method, in its variants, on every tiny model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import lowrank_ft
from lowrank_ft.algorithms.base import CompressorConfig, Family, LowRankConfig
from lowrank_ft.structure.registry import methods
from tests.tiny import TINY, Tiny, perturb

# Options worth a row of their own. A method without an entry is tested with its defaults.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "rslora": {"scaling": "rslora", "alpha": 3.0},
        "dropout": {"dropout": 0.3},
        "gaussian": {"init": "gaussian"},
        "orthogonal": {"init": "orthogonal"},
        "pissa": {"init": "pissa"},
        "olora": {"init": "olora"},
        "dora": {"dora": True},
        "dora-pissa": {"dora": True, "init": "pissa", "alpha": 5.0},
    },
    "corda": {
        "knowledge": {"mode": "knowledge"},
        "output": {"objective": "output", "mode": "knowledge", "scaling": "rslora", "alpha": 3.0},
        "paper": {"factors": "paper", "dropout": 0.3},
        "dora": {"dora": True},
        "budget": {"budget": 3000},
    },
    "flora": {
        "paper": {
            "init": "kaiming-normal",
            "full_modes": "factor",
            "rank_kernel": 2,
            "scaling": "rslora",
            "alpha": 3.0,
        },
        "hosvd": {"init": "hosvd", "dropout": 0.3},
        "scale": {"rank_out": 3, "scale": 2.0, "init": "gaussian"},
        "kernel": {"rank_kernel": 2},
    },
    "nola": {
        "uniform": {"basis": "uniform", "scaling": "rslora", "alpha": 3.0},
        "coefficients": {"init": "coefficients", "dropout": 0.3},
    },
    "lord": {
        "output": {"objective": "output"},
        "probe": {"objective": "output", "allocation": "probe"},
        "weight": {"objective": "weight"},
        "centered": {"centered": True},
        "uncentered": {"centered": False},
        "sequential": {"calibration": {"sequential": True, "hidden_states": "disk"}},
    },
    "nf": {
        "two": {"bits": 2, "block": 16},
        "three": {"bits": 3, "scale_bits": 32},
        "eight": {"bits": 8, "scale_dtype": "bfloat16", "scale_block": 16},
        "signed": {"codebook": "signed", "bits": 3, "block": 24, "scale_bits": 4},
        "fitted": {"codebook": "fitted", "bits": 2},
        "feedback": {"bits": 3, "rounding": "feedback"},
        "budget": {"budget": 3.9, "solver": "lagrangian"},
        "loss": {"budget": 4.2, "objective": "loss", "rounding": "feedback"},
        "bnb-nf4": {"library": "bitsandbytes", "scale_bits": 32},
        "bnb-double": {"library": "bitsandbytes", "block": 32},
        "bnb-fp4": {"library": "bitsandbytes", "codebook": "fp4", "block": 128},
        "bnb-int8": {"library": "bitsandbytes", "codebook": "int8", "bits": 8},
    },
    "lq_lora": {
        "paper": {"mode": "paper", "codebook": "nf", "rounding": "nearest", "objective": "fisher"},
        "no-data": {"mode": "paper", "codebook": "nf", "rounding": "nearest", "objective": "weight"},
        "activation": {"objective": "activation", "bits": 2, "alpha": 3.0, "scaling": "rslora"},
        "budget": {"budget": 7.0, "ranks": (1, 2, 4), "solver": "uniform"},
        "bnb": {"library": "bitsandbytes", "codebook": "nf", "rounding": "nearest", "dropout": 0.3},
    },
    "tucker": {
        "output": {"objective": "output"},
        "weight": {"objective": "weight"},
        "sequential": {"calibration": {"sequential": True}},
    },
    "modegpt": {
        "paper": {"recipe": "paper"},
        "pivoted": {"recipe": "paper", "selection": "pivoted", "epsilon": float("inf")},
        "resized": {"low_rank": False},
        "sequential": {"recipe": "paper", "calibration": {"sequential": True}},
    },
}
VARIANT_MODELS = ("llama", "gpt2", "resnet")


@dataclass(frozen=True)
class Case:
    method: str
    model: str
    variant: str = "default"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.method}-{self.variant}-{self.model}"

    @property
    def tiny(self) -> Tiny:
        return TINY[self.model]

    @property
    def compresses(self) -> bool:
        return methods[self.method].family is Family.COMPRESSOR

    @property
    def quantizes(self) -> bool:
        return methods[self.method].family is Family.QUANTIZER

    def targets(self) -> Any:
        if self.compresses or self.quantizes:
            return "all-conv" if self.method == "tucker" else "all-linear"
        if self.options.get("dropout"):  # token ids cannot be dropped
            return "all-conv" if self.model == "resnet" else "all-linear"
        return self.tiny.targets

    def wrap(self, model: nn.Module, name: str = "default", **more: Any) -> nn.Module:
        options = {**self.options, **more}
        if self.looks:
            options.setdefault("data", self.data(next(model.parameters()).dtype))
        where = {"targets": self.targets(), "exclude": self.exclude()}
        return lowrank_ft.wrap(model, self.method, name=name, **where, **options)

    def exclude(self) -> tuple[str, ...]:
        """What cannot be a target: outputs of a grouped convolution see different inputs."""
        return ("dwconv",) if self.method in ("corda", "tucker") and self.model == "convnext" else ()

    @property
    def looks(self) -> bool:
        """Whether the method asks for data with these options."""
        cls = methods[self.method]
        if self.quantizes:
            return bool(cls(cls.Config(**self.options)).needs())
        return bool(cls(cls.Config(**{k: v for k, v in self.options.items() if k == "objective"})).needs())

    def data(self, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
        """Calibration batches, enough that no second moment is singular."""
        batches = []
        for seed in range(20):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                batch = self.tiny.batch()
            batches.append({k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()})
        return batches

    def wrapped(self, dtype: torch.dtype = torch.float32, name: str = "default") -> nn.Module:
        return self.wrap(self.tiny.model(dtype), name)

    def trained(self, dtype: torch.dtype = torch.float32, name: str = "default") -> nn.Module:
        return perturb(self.wrapped(dtype, name))


def _options(method: str) -> dict[str, Any]:
    if method == "nola":
        return {"rank": 2, "bases": 6}
    if issubclass(methods[method].Config, LowRankConfig):
        return {"rank": 2}
    return {"ratio": 0.3, "align": 1} if issubclass(methods[method].Config, CompressorConfig) else {}


def cases_of(method: str) -> list[Case]:
    small = _options(method)
    rows = [Case(method, model, options=small) for model in models_for(method, TINY)]
    for variant, options in VARIANTS.get(method, {}).items():
        chosen = models_for(method, VARIANT_MODELS)
        rows += [Case(method, model, variant, {**small, **options}) for model in chosen]
    return rows


def models_for(method: str, models: Iterable[str]) -> list[str]:
    """Compressors and quantisers act on linear layers, or convolutions: those that have enough of them."""
    if methods[method].family is Family.ADAPTER:
        return list(models)
    return [name for name in models if (name == "resnet") is (method == "tucker")]


CASES = [case for method in methods for case in cases_of(method)]
COMPRESSING = [case for case in CASES if case.compresses]
QUANTIZING = [case for case in CASES if case.quantizes]
