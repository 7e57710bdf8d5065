"""How many bytes statistics take on disk, computed before anything is gathered."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lowrank_ft.anatomy import layouts
from lowrank_ft.calibration.store import triangle_size
from lowrank_ft.modules.layer import Layer, layer_of

_DOUBLE = 8  # bytes of a vector's entry
_HEADER = 256  # bytes that a tensor may take in the header of its file


def of_inputs(modules: Mapping[str, nn.Module]) -> int:
    """Return the bytes of layers' input moments, if no two layers share an input."""
    total = 0
    for module in modules.values():
        layer = layer_of(module)
        n = layer.in_features
        moment = n * _DOUBLE if layer.kind == "embedding" else _triangle(layer, n)
        total += moment + (n + 1) * _DOUBLE + 3 * _HEADER
    return total


def of_gradients(model: nn.Module, modules: Mapping[str, nn.Module], weighted: bool) -> int:
    """Return the bytes of layers' gradient moments, including the means of squared gradients.

    Args:
        model: the model that has the layers.
        modules: the layers, by name.
        weighted: whether the weighted second moment of the inputs is gathered as well.
    """
    total = 0
    for name, module in modules.items():
        layer = layer_of(module)
        sides = [min(layer.in_features, layer.out_features), *layouts.fused_parts(model, name, module)[:2]]
        sides += [layer.in_features] if weighted else []
        vectors = 2 * layer.out_features + layer.in_features
        total += sum(_triangle(layer, n) for n in sides) + vectors * _DOUBLE + 6 * _HEADER
    return total


def _triangle(layer: Layer, n: int) -> int:
    """Bytes of a second moment of ``n`` features."""
    return triangle_size(n) * max(4, layer.weight.element_size())
