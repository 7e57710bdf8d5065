"""Tensors of many small parts as a few large ones.

An adapter has hundreds of small tensors; a header for each would be larger than a kilobyte adapter. So all
tensors of one adapter, node kind and name (``default.lora.A``) are laid end to end, sorted by module name: an
order that depends neither on how the manifest groups modules nor on how a model registers them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor, nn

from lowrank_ft.errors import CheckpointError
from lowrank_ft.modules.delta import Delta
from lowrank_ft.structure.node import Node

Parts = Mapping[str, nn.Module]
Nodes = Mapping[str, Node]


def pack(name: str, nodes: Nodes, parts: Parts) -> dict[str, Tensor]:
    """Return the values of adapter ``name``, concatenated; mixed dtypes become the wider one, exactly."""
    groups: dict[str, list[Tensor]] = {}
    for path, part in sorted(parts.items()):
        for key, tensor in _values(part).items():
            groups.setdefault(f"{name}.{nodes[path].kind}.{key}", []).append(tensor.detach().cpu().flatten())
    packed = {}
    for key, tensors in groups.items():
        dtype = reduce(torch.promote_types, (t.dtype for t in tensors))
        packed[key] = torch.cat([t.to(dtype) for t in tensors])
    return packed


def check(name: str, nodes: Nodes, parts: Parts, packed: Mapping[str, Tensor]) -> None:
    """Raise ``CheckpointError`` unless ``packed`` holds exactly the values that ``parts`` need.

    ``parts`` may be on ``meta``, so that an untrusted manifest cannot make this allocate memory.
    """
    wanted: dict[str, int] = {}
    real: dict[str, bool] = {}
    for path, part in parts.items():
        for key, tensor in _values(part).items():
            group = f"{name}.{nodes[path].kind}.{key}"
            wanted[group] = wanted.get(group, 0) + tensor.numel()
            real[group] = tensor.is_floating_point()
    held = {key for key in packed if key.startswith(f"{name}.")}
    if held != set(wanted):
        raise CheckpointError(
            f"The checkpoint's tensors do not fit its manifest: missing {sorted(set(wanted) - held)}, "
            f"unexpected {sorted(held - set(wanted))}."
        )
    for group, count in wanted.items():
        if packed[group].numel() != count:
            raise CheckpointError(
                f"The tensor {group!r} has {packed[group].numel()} elements, but the manifest on this model "
                f"describes {count}: the manifest's shapes are wrong, or the base model is another one."
            )
        if packed[group].is_floating_point() is not real[group]:
            raise CheckpointError(f"The tensor {group!r} has the wrong type, {packed[group].dtype}.")


def unpack(name: str, nodes: Nodes, parts: Parts, packed: Mapping[str, Tensor]) -> None:
    """Copy checked values into the parts."""
    offsets: dict[str, int] = {}
    with torch.no_grad():
        for path, part in sorted(parts.items()):
            values: dict[str, Tensor] = {}
            for key, tensor in _values(part).items():
                group = f"{name}.{nodes[path].kind}.{key}"
                start = offsets.get(group, 0)
                offsets[group] = start + tensor.numel()
                values[key] = packed[group][start : offsets[group]].view(tensor.shape).to(tensor.device)
            if isinstance(part, Delta):
                part.unpack(values)
            else:
                for key, tensor in part.state_dict().items():
                    tensor.copy_(values[key])


def _values(part: nn.Module) -> dict[str, Tensor]:
    """The values that a checkpoint stores of one part."""
    return part.packed() if isinstance(part, Delta) else dict(part.state_dict())
