"""What is in a model or a checkpoint, in numbers and tables."""

from __future__ import annotations

import inspect
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from tabulate import tabulate
from torch import nn

from lowrank_ft import engine
from lowrank_ft.anatomy import layouts
from lowrank_ft.checkpoint import files
from lowrank_ft.engine.counting import count, numbers_in
from lowrank_ft.modules.adapted import AdaptedNode
from lowrank_ft.modules.copied import CopiedNode
from lowrank_ft.modules.host import Host
from lowrank_ft.structure import manifest, registry
from lowrank_ft.structure.node import Node


@dataclass(frozen=True)
class Row:
    """One replaced module.

    Attributes:
        module: its name.
        role: its part in the model's family.
        kind: kind of its node.
        parts: what each adapter has there, ``{"default": "lora r=16"}``.
        parameters: numbers those parts hold; None where only a checkpoint is at hand.
    """

    module: str
    role: str
    kind: str
    parts: dict[str, str]
    parameters: int | None


@dataclass(frozen=True)
class Report:
    """The replaced modules of a model or a checkpoint, with their sizes.

    Attributes:
        source: class of the model, or the directory.
        base: what identifies the base model (empty for a live model).
        adapters: for each adapter, the method and options that made it.
        active: the adapters in force.
        total_parameters: numbers in the model, adapters included; None for a checkpoint.
        trainable_parameters: of those, the trained ones.
        adapter_parameters: numbers in the adapters.
        bytes: size of the adapters in memory, or of the checkpoint's files.
        rows: the replaced modules.
    """

    source: str
    base: dict[str, Any]
    adapters: dict[str, dict[str, Any]]
    active: list[str]
    total_parameters: int | None
    trainable_parameters: int | None
    adapter_parameters: int
    bytes: int
    rows: list[Row]

    def __str__(self) -> str:
        return render(self)


def report(target: nn.Module | str | Path) -> Report:
    """Return a report of a live model, or of a checkpoint directory without loading a model.

    Raises:
        CheckpointError: a directory that is damaged or not ours.
    """
    return _of_model(target) if isinstance(target, nn.Module) else _of_directory(Path(target))


def methods() -> dict[str, str]:
    """Return the registered methods by name, each with one line on what it is."""
    return {name: inspect.getdoc(cls.Config).split("\n")[0] for name, cls in registry.methods.items()}  # type: ignore[union-attr]


def _of_model(model: nn.Module) -> Report:
    carriers = engine.hosts(model)
    parts = [p for host in carriers.values() for part in host.parts.values() for p in part.parameters()]
    rows = [
        Row(
            name,
            layouts.role_of(name, module),
            module.structure().kind,
            _describe(module.structure()),
            numbers_in([module.parts if isinstance(module, Host) else module]),
        )
        for name, module in manifest.replacements(model).items()
    ]
    return Report(
        source=type(model).__name__,
        base={},
        adapters=dict(engine.state_of(model).recipes) if carriers else {},
        active=list(engine.active_adapters(model)),
        total_parameters=count(model).total,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter_parameters=sum(p.numel() for p in parts),
        bytes=sum(p.numel() * p.element_size() for p in parts),
        rows=rows,
    )


def _of_directory(directory: Path) -> Report:
    index = files.read_index(directory)
    structure = manifest.from_json(index.get("manifest", []))
    rows = [
        Row(name, layouts.role_of(name, nn.Identity()), node.kind, _describe(node), None)
        for name, node in structure.items()
    ]
    return Report(
        source=str(directory),
        base=dict(index.get("base", {})),
        adapters=dict(index.get("adapters", {})),
        active=list(index.get("active", [])),
        total_parameters=None,
        trainable_parameters=None,
        adapter_parameters=stored_numbers(directory, index["files"]),
        bytes=sum(facts["bytes"] for facts in index["files"].values()),
        rows=rows,
    )


def _describe(node: Node) -> dict[str, str]:
    if isinstance(node, AdaptedNode):
        parts: Mapping[str, Node] = node.deltas
    elif isinstance(node, CopiedNode):
        parts = node.copies
    else:
        return {what: str(value) for what, value in _sizes(node).items()}
    described = {name: part.kind + _ranks(part) for name, part in parts.items()}
    base = cast(Any, node).base
    if base.kind == "dense":
        return described
    sizes = ", ".join(f"{what} {value}" for what, value in _sizes(base).items())
    return {"base": f"{base.kind} ({sizes})", **described}


def _ranks(part: Node) -> str:
    """The rank of an adapter's part, or its ranks by axis of the weight: a dot where it has no factor."""
    ranks = getattr(part, "ranks", (part.rank,) if hasattr(part, "rank") else ())
    return f" r={'×'.join('·' if rank is None else str(rank) for rank in ranks)}" if ranks else ""


def _sizes(node: Node) -> dict[str, Any]:
    """The numbers in a node, and how its weights are stored."""
    values = {f.name: getattr(node, f.name) for f in fields(cast(Any, node))}
    stored = {"scheme": values["scheme"].label} if "scheme" in values else {}
    return {name: value for name, value in values.items() if isinstance(value, int)} | stored


def stored_numbers(directory: Path, names: Iterable[str]) -> int:
    """Return how many numbers a checkpoint's own safetensors files hold; others may lie beside them."""
    from safetensors import safe_open

    total = 0
    for name in names:
        if not name.endswith(".safetensors"):
            continue
        with safe_open(directory / name, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                total += torch.Size(tensors.get_slice(key).get_shape()).numel()
    return total


def render(content: Report) -> str:
    """Return a report as text: the facts, then one line for each kind of replaced module."""
    facts: list[tuple[str, Any]] = [("source", content.source)]
    facts += [(f"base {key}", value) for key, value in content.base.items() if value and key != "structure"]
    for name, recipe in content.adapters.items():
        options = ", ".join(
            f"{k}={v}" for k, v in recipe.get("options", {}).items() if v not in (None, [], {})
        )
        mark = " (active)" if name in content.active else ""
        facts.append((f"adapter {name}{mark}", f"{recipe.get('method', 'unknown')}: {options}"))
    if content.total_parameters is not None:
        facts.append(("parameters", f"{content.total_parameters:,}"))
        facts.append(("trainable", f"{content.trainable_parameters:,}"))
    facts.append(("stored numbers", f"{content.adapter_parameters:,}"))
    facts.append(("bytes", f"{content.bytes:,}"))
    text = tabulate(facts, ("fact", "value"), "github", disable_numparse=True)
    if not content.rows:
        return text
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in content.rows:
        parts = ", ".join(f"{n}: {p}" for n, p in row.parts.items())
        groups.setdefault((row.module.rpartition(".")[2], row.role, f"{row.kind} ({parts})"), []).append(row)
    lines = [(len(g), *key, sum(r.parameters or 0 for r in g) or "") for key, g in groups.items()]
    return text + "\n\n" + tabulate(lines, ("layers", "name", "role", "structure", "parameters"), "github")


def peak_memory_bytes() -> int:
    """Return the peak memory so far: of the GPU where one is used, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
