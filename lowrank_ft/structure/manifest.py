"""The manifest: for each replaced module a node that describes its structure, as plain JSON.

A manifest maps module names to nodes. Building it on a fresh model (on the ``meta`` device, say) creates
modules of the right shapes without values; the values come from safetensors. No method's mathematics runs
on load.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from lowrank_ft import config
from lowrank_ft.errors import CheckpointError, ConfigError
from lowrank_ft.structure import registry
from lowrank_ft.structure.node import Node
from lowrank_ft.structure.replacement import Container, Replacement

_MODULE_NAME = re.compile(r"[^./\\\s]+(\.[^./\\\s]+)*")


Manifest = dict[str, Node]


def describe(model: nn.Module) -> Manifest:
    """Return the manifest of a model in its present state, in module order; it is computed, never stored."""
    return {name: module.structure() for name, module in replacements(model).items()}


def replacements(model: nn.Module) -> dict[str, Replacement]:
    """Return the outermost replaced modules of ``model`` by name, in module order.

    A container is returned as well as the replaced modules inside it.
    """
    replaced: dict[str, Replacement] = {}
    outermost = None
    for name, module in model.named_modules():  # a module comes directly before its descendants
        if outermost is not None and name.startswith(f"{outermost}."):
            continue
        if isinstance(module, Replacement):
            replaced[name] = module
            outermost = outermost if isinstance(module, Container) else name
    return replaced


# JSON -----------------------------------------------------------------------------------------------------


def to_json(manifest: Mapping[str, Node]) -> list[dict[str, Any]]:
    """Return the manifest as JSON data; each distinct node is written once, with the names that share it."""
    groups: dict[str, dict[str, Any]] = {}
    for name, node in manifest.items():
        data = node_to_json(node)
        group = groups.setdefault(repr(data), {"node": data, "modules": []})
        group["modules"].append(name)
    return list(groups.values())


def from_json(data: Any) -> Manifest:
    """Read what :func:`to_json` wrote, and validate all of it.

    Raises:
        CheckpointError: malformed data, a module name that is not a dotted path, a module named twice, a
            node of unknown kind, an unknown or ill-typed field.
    """
    manifest: Manifest = {}
    for group in _expect(data, list, "the manifest"):
        group = _expect(group, dict, "a group of the manifest")
        node = node_from_json(group.get("node"))
        for name in _expect(group.get("modules"), list, "a group's modules"):
            if not isinstance(name, str) or not _MODULE_NAME.fullmatch(name):
                raise CheckpointError(f"The manifest names a module {name!r}, which is not a dotted path.")
            if name in manifest:
                raise CheckpointError(f"The manifest describes the module {name!r} twice.")
            manifest[name] = node
    return manifest


def node_to_json(node: Node) -> dict[str, Any]:
    """Return one node as JSON data."""
    data: dict[str, Any] = {"kind": node.kind}
    for field in dataclasses.fields(cast(Any, node)):
        data[field.name] = _value_to_json(getattr(node, field.name))
    return data


def _value_to_json(value: Any) -> Any:
    if isinstance(value, Node):
        return node_to_json(value)
    if isinstance(value, Mapping):
        return {k: _value_to_json(v) for k, v in value.items()}
    return config.plain(value)


def node_from_json(data: Any) -> Node:
    """Read one node and its children.

    Raises:
        CheckpointError: see :func:`from_json`.
    """
    data = dict(_expect(data, dict, "a node of the manifest"))
    kind = data.pop("kind", None)
    if kind not in registry.nodes:
        kinds = ", ".join(registry.nodes)
        raise CheckpointError(
            f"The manifest has a node of unknown kind {kind!r}. This version knows: {kinds}. "
            f"Install the package that brings it, or a newer lowrank_ft."
        )
    cls = registry.nodes[kind]
    try:
        return _node_from_fields(cls, data)
    except ConfigError as error:
        raise CheckpointError(f"The manifest has a malformed {kind!r} node: {error}") from error


def _node_from_fields(cls: type[Node], data: dict[str, Any]) -> Node:
    children: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if name not in data:
            continue
        if isinstance(hint, type) and issubclass(hint, Node):
            children[name] = node_from_json(data.pop(name))
        elif _is_node_mapping(hint):
            named = _expect(data.pop(name), dict, f"{cls.kind}.{name}")
            children[name] = {k: node_from_json(v) for k, v in named.items()}
        if name in children:
            _check_child(cls, name, hint, children[name])
    return config.parse(cls, data, what=f"node {cls.kind!r}", built=children)


def _check_child(cls: type[Node], name: str, hint: Any, child: Any) -> None:
    wanted = typing.get_args(hint)[1] if _is_node_mapping(hint) else hint
    for node in child.values() if isinstance(child, Mapping) else (child,):
        if not isinstance(node, wanted):
            raise ConfigError(f"{cls.kind}.{name} cannot hold a {node.kind!r} node.")


def _is_node_mapping(hint: Any) -> bool:
    args = typing.get_args(hint)
    return len(args) == 2 and isinstance(args[1], type) and issubclass(args[1], Node)


def _expect(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise CheckpointError(f"{what.capitalize()} is {type(value).__name__}, not {kind.__name__}.")
    return value
