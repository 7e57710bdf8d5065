"""Fine-tune Hugging Face models with few parameters, and compress them.

``model = lowrank_ft.wrap(model, "lora", rank=16)`` and the verbs beside it are all there is to know; they
are imported when first used, so that ``import lowrank_ft`` costs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from lowrank_ft._version import __version__

if TYPE_CHECKING:
    from lowrank_ft.algorithms.lora import LoRA
    from lowrank_ft.algorithms.lq_lora import LQLoRA
    from lowrank_ft.algorithms.nf import NF
    from lowrank_ft.checkpoint import export, load, save
    from lowrank_ft.engine import (
        cast_adapters,
        delete_adapter,
        disable,
        merge,
        merge_drift,
        requantize,
        set_adapter,
        unload,
        unmerge,
        wrap,
    )
    from lowrank_ft.recipes.callbacks import AdapterCheckpoint, StopOnNonFinite
    from lowrank_ft.recipes.reporting import methods, report

_WHERE = {
    "wrap": "engine",
    "set_adapter": "engine",
    "cast_adapters": "engine",
    "merge_drift": "engine",
    "requantize": "engine",
    "disable": "engine",
    "delete_adapter": "engine",
    "merge": "engine",
    "unmerge": "engine",
    "unload": "engine",
    "save": "checkpoint",
    "load": "checkpoint",
    "export": "checkpoint",
    "report": "recipes.reporting",
    "methods": "recipes.reporting",
    "AdapterCheckpoint": "recipes.callbacks",
    "StopOnNonFinite": "recipes.callbacks",
    "LoRA": "algorithms.lora",
    "NF": "algorithms.nf",
    "LQLoRA": "algorithms.lq_lora",
}

__all__ = [  # noqa: RUF022
    "wrap", "set_adapter", "disable", "delete_adapter", "cast_adapters",
    "merge", "merge_drift", "unmerge", "unload", "requantize",
    "save", "load", "export", "report", "methods",
    "AdapterCheckpoint", "StopOnNonFinite",
    "LoRA", "NF", "LQLoRA",
    "__version__",
]  # fmt: skip


@wrapt.when_imported("transformers.quantizers.auto")
def _register_with_transformers(_: ModuleType) -> None:
    """Let ``from_pretrained`` load our checkpoints, whichever of the two packages is imported first."""
    importlib.import_module("lowrank_ft.checkpoint.transformers_hook")


def __getattr__(name: str) -> Any:
    where = _WHERE.get(name)
    if where is None:
        raise AttributeError(f"module 'lowrank_ft' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lowrank_ft.{where}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
