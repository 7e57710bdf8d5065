"""Pictures: learning curves, confusion matrices, and the page of a compression."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from lowrank_ft.anatomy import layouts


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
    if len(classes) <= 40:  # more labels would be unreadable
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
    """Import matplotlib's pyplot for drawing to files; without matplotlib print a line and return None."""
    try:
        import matplotlib
    except ImportError:
        print(f"No {what}: matplotlib is not installed (pip install 'lowrank_ft[plot]').")
        return None
    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot

    return pyplot


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
        ("Rise of the loss: predicted, and measured with this option alone", "predicted (nats a token)",
         "measured (nats a token)", _draw_nats),
        ("Spectrum under the metric, one layer of each kind", "share of the rank", "share of the energy",
         _draw_spectra),
    )  # fmt: skip
    for title, horizontal, vertical, draw in drawings:
        figure, axes = pyplot.subplots(figsize=(7.5, 3.6), layout="constrained")
        for role in roles:
            draw(axes, role, [row for row in layers if row["role"] == role])
        if not axes.has_data():  # no row has this property
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
    unquantised = [row for row in rows if "bits" not in row]  # quantised layers keep all their parameters
    if unquantised:
        blocks = [layouts.block_index(row["module"]) or 0 for row in unquantised]
        axes.plot(
            blocks, [row["parameters"] / row["parameters before"] for row in unquantised], ".-", label=role
        )


def _draw_bits(axes: Any, role: str, rows: Sequence[Mapping[str, Any]]) -> None:
    quantised = [row for row in rows if "bits" in row]
    if quantised:
        blocks = [layouts.block_index(row["module"]) or 0 for row in quantised]
        axes.plot(blocks, [row["bits"] for row in quantised], ".-", label=role)


def _draw_turns(axes: Any, role: str, rows: Sequence[Mapping[str, Any]]) -> None:
    curves = [row["errors"] for row in rows if len(row.get("errors", ())) > 1 and row["errors"][0] > 0]
    if curves:
        curve = curves[len(curves) // 2]
        axes.plot(range(1, len(curve) + 1), [error / curve[0] for error in curve], ".-", label=role)


def _draw_errors(axes: Any, role: str, rows: Sequence[Mapping[str, Any]]) -> None:
    measured = [r for r in rows if r.get("measured error") is not None and "output error" in r]
    axes.plot([r["output error"] for r in measured], [r["measured error"] for r in measured], ".", label=role)


def _draw_nats(axes: Any, role: str, rows: Sequence[Mapping[str, Any]]) -> None:
    measured = [row for row in rows if row.get("measured") is not None and row["predicted"] is not None]
    if measured:
        predictions = [row["predicted"] for row in measured]
        axes.loglog(predictions, [row["measured"] for row in measured], ".", label=role)


def _draw_spectra(axes: Any, role: str, rows: Sequence[Mapping[str, Any]]) -> None:
    spectra = [row["spectrum"] for row in rows if row.get("spectrum")]
    if spectra:
        spectrum = spectra[len(spectra) // 2]
        axes.semilogy([i / len(spectrum) for i in range(len(spectrum))], spectrum, label=role)
