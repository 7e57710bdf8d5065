"""Our own checkpoints: adapter directories, and whole models.

An adapter directory holds ``adapter.safetensors`` and ``lowrank_ft.json``. A whole-model directory is what
``save_pretrained`` writes (``model.safetensors`` for other modules), with our index beside it.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_ft import engine
from lowrank_ft._version import __version__
from lowrank_ft.checkpoint import base_model, card, files, tensors
from lowrank_ft.errors import CheckpointError, StateError, did_you_mean
from lowrank_ft.modules.adapted import AdaptedNode
from lowrank_ft.modules.copied import CopiedNode
from lowrank_ft.modules.delta import digest_of
from lowrank_ft.modules.host import Host
from lowrank_ft.structure import manifest
from lowrank_ft.structure.manifest import Manifest
from lowrank_ft.structure.node import Node

ADAPTER_FILE = "adapter.safetensors"
MODEL_FILE = "model.safetensors"


# Saving -----------------------------------------------------------------------------------------------------


def save_adapters(
    model: nn.Module,
    directory: Path,
    names: tuple[str, ...],
    tokenizer: Any,
    figures: Mapping[str, Any] | None,
) -> None:
    """Write the adapters ``names`` of a model whose base is untouched."""
    hosts = engine.hosts(model)
    structure: Manifest = {}
    packed: dict[str, Tensor] = {}
    for name in names:
        held = {path: host for path, host in hosts.items() if name in host.parts}
        nodes = {path: host.nodes[name] for path, host in held.items()}
        packed.update(tensors.pack(name, nodes, {path: host.parts[name] for path, host in held.items()}))
    for path, host in hosts.items():
        node = _restricted(host, names)
        if node is not None:
            structure[path] = node
    _refuse_non_finite(packed)
    state = engine.state_of(model)
    index = {
        "content": "adapters",
        "adapters": {name: state.recipes.get(name, {}) for name in names},
        "active": [name for name in engine.active_adapters(model) if name in names],
        "base": base_model.identify(model, _replaced(structure)),
        "manifest": manifest.to_json(structure),
        "digests": {n: digest for n, digest in engine.digests(model).items() if n in names},
        "versions": versions(),
    }
    with files.staged(directory) as staging:
        save_file(packed, staging / ADAPTER_FILE, metadata={"format": "pt"})
        card.write(staging, index, figures)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        files.write_index(staging, index, [ADAPTER_FILE])


def save_model(
    model: nn.Module,
    directory: Path,
    tokenizer: Any,
    figures: Mapping[str, Any] | None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a whole model with all its replaced modules; ``config`` changes entries of ``config.json``."""
    index = {
        "content": "model",
        "stages": engine.recipes_of(model),
        "active": list(engine.active_adapters(model)),
        "adapters": dict(engine.state_of(model).recipes) if engine.hosts(model) else {},
        "base": base_model.identify(model),
        "manifest": manifest.to_json(manifest.describe(model)),
        "digests": engine.digests(model),
        "versions": versions(),
    }
    with files.staged(directory) as staging:
        if hasattr(model, "save_pretrained"):
            cast(Any, model).save_pretrained(staging)
        else:
            save_file(_untied(model), staging / MODEL_FILE, metadata={"format": "pt"})
        if config is not None:
            path = staging / "config.json"
            content = {**json.loads(path.read_text(encoding="utf-8")), **config}
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        weights = sorted(f.name for f in staging.iterdir())
        card.write(staging, index, figures)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        files.write_index(staging, index, weights)


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    packages = {"lowrank_ft": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            continue
    return packages


def _restricted(host: Host, names: tuple[str, ...]) -> Node | None:
    """The host's node with only these adapters in it."""
    node = host.structure()
    if isinstance(node, AdaptedNode):
        deltas = {n: d for n, d in node.deltas.items() if n in names}
        return AdaptedNode(deltas, node.base) if deltas else None
    copies = {n: c for n, c in cast(CopiedNode, node).copies.items() if n in names}
    return CopiedNode(copies, cast(CopiedNode, node).base) if copies else None


def _replaced(structure: Manifest) -> list[str]:
    """The modules that adapters store whole."""
    return [path for path, node in structure.items() if isinstance(node, CopiedNode)]


def _refuse_non_finite(packed: Mapping[str, Tensor]) -> None:
    for key, tensor in packed.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise StateError(
                f"The adapter's {key} has NaN or infinite values: the training diverged. Not saved."
            )


def _untied(model: nn.Module) -> dict[str, Tensor]:
    """The state of a plain module with each tied tensor once, under its first name."""
    seen: set[int] = set()
    state = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[key] = tensor.detach().contiguous()
    return state


# Loading ----------------------------------------------------------------------------------------------------


def load(model: nn.Module, directory: Path, name: str | None, check_base: bool) -> None:
    """Load a directory onto a fresh base, after checking all of it."""
    index = files.read_index(directory)
    content = index.get("content")
    if content == "adapters":
        _load_adapters(model, directory, index, name, check_base)
    elif content == "model":
        if name is not None:
            raise CheckpointError(f"{directory} holds a whole model, so name={name!r} has no meaning.")
        _load_model(model, directory, index)
    else:
        raise CheckpointError(
            f"{directory / files.INDEX} says it holds {content!r}, which this version cannot read."
        )


def _load_adapters(
    model: nn.Module, directory: Path, index: Mapping[str, Any], name: str | None, check_base: bool
) -> None:
    structure = manifest.from_json(index.get("manifest"))
    nodes = _by_adapter(structure)
    targets = _names_to_load(tuple(nodes), name)
    for target in targets.values():
        engine.check_can_wrap(model, target)
    if check_base:
        base_model.check(model, index.get("base") or {}, _replaced(structure))
    packed = _read(directory / ADAPTER_FILE)
    adapters = {key.partition(".")[0] for key in packed}
    if adapters != set(nodes):
        raise CheckpointError(
            f"{ADAPTER_FILE} holds the adapters {sorted(adapters)}, the manifest {sorted(nodes)}."
        )

    built = {}
    for source in targets:
        shells = engine.build(model, nodes[source], on_meta=True)
        tensors.check(source, nodes[source], shells, packed)
        engine.check_digest(source, digest_of(shells), index.get("digests") or {})
    for source, target in targets.items():
        built[target] = engine.build(model, nodes[source])
        tensors.unpack(source, nodes[source], built[target], packed)
    recipes = index.get("adapters") or {}
    for source, target in targets.items():
        engine.commit(model, target, nodes[source], built[target], recipes.get(source, {}))
    active = [targets[source] for source in index.get("active") or [] if source in targets]
    if active and active != list(engine.active_adapters(model)):
        engine.set_adapter(model, active)


def _by_adapter(structure: Manifest) -> dict[str, dict[str, Node]]:
    """Sort a manifest's parts by adapter; the layers below them must be stock."""
    nodes: dict[str, dict[str, Node]] = {}
    for path, node in structure.items():
        if not isinstance(node, (AdaptedNode, CopiedNode)) or node.base.kind != "dense":
            raise CheckpointError(
                f"The manifest has a {node.kind!r} node at {path}, which no adapter directory can hold."
            )
        for name, part in (node.deltas if isinstance(node, AdaptedNode) else node.copies).items():
            nodes.setdefault(name, {})[path] = part
    if not nodes:
        raise CheckpointError("The manifest describes no adapter.")
    return nodes


def _names_to_load(held: tuple[str, ...], name: str | None) -> dict[str, str]:
    """Map the names in the checkpoint to names on the model."""
    if name is None:
        return {held_name: held_name for held_name in held}
    if len(held) == 1:
        return {held[0]: name}
    if name not in held:
        raise CheckpointError(
            f"The checkpoint has no adapter {name!r}.{did_you_mean(name, held)} It has: {list(held)}."
        )
    return {name: name}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def _load_model(model: nn.Module, directory: Path, index: Mapping[str, Any]) -> None:
    if "_lowrank_ft" in model.__dict__ or manifest.describe(model):
        raise StateError(
            f"{directory} holds a whole model: load it onto a fresh base, not onto a wrapped model."
        )
    if hasattr(type(model), "from_pretrained"):
        loaded = cast(Any, type(model)).from_pretrained(directory).to(next(model.parameters()).device)
        for shared in ("_modules", "_parameters", "_buffers", "config", "_lowrank_ft", "_lowrank_ft_stages"):
            if shared in loaded.__dict__:
                model.__dict__[shared] = loaded.__dict__[shared]
        return
    structure = manifest.from_json(index.get("manifest"))
    state = _read(directory / MODEL_FILE)
    twin = engine.meta_twin(
        model
    )  # shapes only: an untrusted checkpoint must not change the model or allocate memory
    engine.restore_structure(twin, structure)
    expected = _untied(twin)
    wrong = [
        k
        for k in {*state, *expected}
        if k not in state or k not in expected or state[k].shape != expected[k].shape
    ]
    if wrong:
        raise CheckpointError(f"{directory} was saved from another module: {sorted(wrong)[:3]} differ.")
    engine.restore_structure(model, structure)
    model.load_state_dict(state, strict=False)  # tied tensors are stored under one name
    engine.restore_state(
        model,
        index.get("active") or (),
        dict(index.get("adapters") or {}),
        index.get("stages") or (),
        index.get("digests") or {},
    )


def export_dense(model: nn.Module, directory: Path, tokenizer: Any) -> None:
    """Write stock weights, adapters folded in and factors multiplied out; the model is unchanged."""
    with engine.folded(model), engine.multiplied_out(model):
        save_model(model, directory, tokenizer, None)
