"""What is in a model or a checkpoint, in numbers, tables and plots."""

from __future__ import annotations

import inspect
import io
import math
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
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
    """What stands in a model or a checkpoint.

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
    found = engine.hosts(model)
    parts = [p for host in found.values() for part in host.parts.values() for p in part.parameters()]
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
        adapters=dict(engine.state_of(model).recipes) if found else {},
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


def plot_curve(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the learning curve that Trainer logged, training and held-out loss over steps.

    Without matplotlib (the ``plot`` extra) it says so and draws nothing.
    """
    pyplot = _pyplot("learning curve")
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for key, label in (("loss", "training"), ("eval_loss", "held-out")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], path: Path) -> None:
    """Draw how many examples of a class (row) were taken for which (column), coloured by share of the row.

    Without matplotlib (the ``plot`` extra) it says so and draws nothing.
    """
    pyplot = _pyplot("confusion matrix")
    if pyplot is None:
        return
    table = torch.tensor(counts)
    shares = table / table.sum(1, keepdim=True).clamp(min=1)
    side = 2.5 + 0.45 * min(len(classes), 40)
    figure, axes = pyplot.subplots(figsize=(side, side), layout="constrained")
    axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="Blues")
    if len(classes) <= 40:  # more cannot be read
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        for i, j in table.nonzero().tolist():
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{counts[i][j]}", ha="center", va="center", color=colour, fontsize=8)
    axes.set_xlabel("taken for")
    axes.set_ylabel("is")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot(what: str) -> Any:
    """Import matplotlib's pyplot, which draws to files; or None, and a line that says what is not drawn."""
    try:
        import matplotlib
    except ImportError:
        print(f"No {what}: matplotlib is not installed (pip install 'lowrank_ft[plot]').")
        return None
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot


def peak_memory_bytes() -> int:
    """Return the peak memory so far: of the GPU where one is used, else of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compression_page(result: Mapping[str, Any], output: Path) -> None:
    """Write ``report.html``: the steps as a table, and plots of ranks, errors and spectra by layer.

    Without matplotlib (the ``plot`` extra) the page has the table alone.

    Args:
        result: a ``CompressResult`` as plain data.
        output: the recipe's directory.
    """
    import base64
    import html

    rows = [
        (step["stage"], f"{step['parameters']['total']:,}", f"{step['bytes'] / 1e6:.0f}",
         f"{step['tokens_per_second']:.0f}",
         ", ".join(f"{name} {math.exp(loss):.2f}" for name, loss in step["losses"].items()))
        for step in result["steps"]
    ]  # fmt: skip
    table = tabulate(
        rows, ("after", "parameters", "MB", "tokens/s", "perplexity"), "html", disable_numparse=True
    )
    pictures = [
        f"<h2>{html.escape(title)}</h2><img src='data:image/png;base64,{base64.b64encode(png).decode()}'>"
        for title, png in _layer_plots(result["layers"])
    ]
    style = (
        "body{font:16px sans-serif;margin:2em auto;max-width:62em}td,th{padding:.2em .8em;text-align:left}"
    )
    page = f"<!doctype html><meta charset=utf-8><title>Compression</title><style>{style}</style>"
    (output / "report.html").write_text(page + table + "".join(pictures) + "\n", encoding="utf-8")


def _layer_plots(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, bytes]]:
    """Ranks, errors and spectra of compressed layers, each as a title and a PNG."""
    pyplot = _pyplot("plots")
    if pyplot is None:
        return []
    roles = list(dict.fromkeys(row["role"] for row in layers))
    plots = []
    drawings = (
        ("Parameters that remain, by block", "block", "share", _draw_shares),
        ("Bits a weight, factors left out, by block", "block", "bits", _draw_bits),
        ("Squared weighted error after each turn, over that of the first", "turn", "error", _draw_turns),
        ("Relative error of outputs: on calibration text, and on held-out text", "calibration", "held-out",
         _draw_errors),
        ("Spectrum under the metric, one layer of each kind", "share of the rank", "share of the energy",
         _draw_spectra),
    )  # fmt: skip
    for title, horizontal, vertical, draw in drawings:
        figure, axes = pyplot.subplots(figsize=(7.5, 3.6), layout="constrained")
        for role in roles:
            draw(axes, role, [row for row in layers if row["role"] == role])
        if not axes.has_data():  # nothing here has that property
            pyplot.close(figure)
            continue
        axes.set_xlabel(horizontal)
        axes.set_ylabel(vertical)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncol=2)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
        pyplot.close(figure)
        plots.append((title, buffer.getvalue()))
    return plots


def _draw_shares(axes: Any, role: str, rows: Sequence[Mapping[str, Any]]) -> None:
    known = [row for row in rows if "bits" not in row]  # stored in few bits, all of them remain
    if known:
        blocks = [layouts.block_index(row["module"]) or 0 for row in known]
        axes.plot(blocks, [row["parameters"] / row["parameters before"] for row in known], ".-", label=role)


def _draw_bits(axes: Any, role: str, rows: Sequence[Mapping[str, Any]]) -> None:
    known = [row for row in rows if "bits" in row]
    if known:
        blocks = [layouts.block_index(row["module"]) or 0 for row in known]
        axes.plot(blocks, [row["bits"] for row in known], ".-", label=role)


def _draw_turns(axes: Any, role: str, rows: Sequence[Mapping[str, Any]]) -> None:
    known = [row["errors"] for row in rows if len(row.get("errors", ())) > 1 and row["errors"][0] > 0]
    if known:
        curve = known[len(known) // 2]
        axes.plot(range(1, len(curve) + 1), [error / curve[0] for error in curve], ".-", label=role)


def _draw_errors(axes: Any, role: str, rows: Sequence[Mapping[str, Any]]) -> None:
    known = [r for r in rows if r.get("measured error") is not None and "output error" in r]
    axes.plot([r["output error"] for r in known], [r["measured error"] for r in known], ".", label=role)


def _draw_spectra(axes: Any, role: str, rows: Sequence[Mapping[str, Any]]) -> None:
    known = [row["spectrum"] for row in rows if row.get("spectrum")]
    if known:
        spectrum = known[len(known) // 2]
        axes.semilogy([i / len(spectrum) for i in range(len(spectrum))], spectrum, label=role)
