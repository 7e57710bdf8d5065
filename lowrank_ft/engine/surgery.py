"""The only code that changes a model: build modules, put them in, take them out."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lowrank_ft.anatomy import sites, ties
from lowrank_ft.engine.digest import digests
from lowrank_ft.engine.state import (
    QUANT_METHOD,
    SCHEMA,
    State,
    active_adapters,
    hosts,
    is_ours,
    prefixes,
    recipes_of,
    state_of,
    stock_tensors,
    trainable_names,
)
from lowrank_ft.errors import CheckpointError, StateError, TargetError, did_you_mean
from lowrank_ft.modules.adapted import Adapted
from lowrank_ft.modules.copied import CopyNode, TrainedCopy
from lowrank_ft.modules.quantized import Quantized
from lowrank_ft.modules.resized import Resized
from lowrank_ft.structure.manifest import describe, replacements, to_json
from lowrank_ft.structure.node import Node
from lowrank_ft.structure.replacement import Container, Factored, Replacement


def replace(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Replace stock modules by name; a module that contains others is replaced before them.

    A container is not replaced by another container: the present one stays, with its children.
    """
    outer = {name for name in new if any(other.startswith(f"{name}.") for other in new)}
    for names in (outer, new.keys() - outer):
        owners, modules = owners_of(model), sites.stock_modules(model)
        for name, module in new.items():
            stays = isinstance(module, Container) and isinstance(modules[name], Container)
            if name in names and not stays:
                put_in_place(owners, modules[name], module)
    ties.rename(model)


@contextmanager
def in_place(model: nn.Module, new: Mapping[str, nn.Module]) -> Iterator[None]:
    """Run the block with these modules instead of the stock ones, by name; nothing else changes."""
    stock = sites.stock_modules(model)
    before = {name: stock[name] for name in new}
    replace(model, new)
    try:
        yield
    finally:
        replace(model, before)


@contextmanager
def multiplied_out(model: nn.Module) -> Iterator[None]:
    """Run the block with each compressed layer replaced by a stock layer of the stock size.

    Raises:
        StateError: a layer has a bias, but its stock layer has none.
    """
    kinds = (Factored, Resized, Container, Quantized)
    compressed = {name: module for name, module in replacements(model).items() if isinstance(module, kinds)}
    extra = [name for name, module in compressed.items() if getattr(module, "adds_bias", False)]
    if extra:
        raise StateError(
            f"{extra[0]} has a bias that a stock {type(model).__name__} cannot hold ({len(extra)} such "
            f"layers): it came with centered=True, or with the values' bias folded into the output. Compress "
            f"without centered=True, or leave out the value and output projections."
        )
    with instead(model, {name: module.dense() for name, module in compressed.items()}):
        yield


@contextmanager
def instead(model: nn.Module, new: Mapping[str, nn.Module]) -> Iterator[None]:
    """Run the block with these modules instead of the replaced ones, by name."""
    replaced = replacements(model)
    before = {name: replaced[name] for name in new}
    replace(model, new)
    write_config(model)
    try:
        yield
    finally:
        replace(model, before)
        write_config(model)


def build(model: nn.Module, nodes: Mapping[str, Node], *, on_meta: bool = False) -> dict[str, nn.Module]:
    """Build an adapter's parts for the given stock modules, without touching the model.

    Args:
        model: the model they are for.
        nodes: nodes by stock module name.
        on_meta: build shapes only, so that an untrusted checkpoint cannot make this allocate memory.

    Raises:
        TargetError: the model has no such module, or it cannot be adapted, or lies inside one that another
            adapter trains in full.
        StateError: a weight is not loaded yet.
    """
    modules = sites.stock_modules(model)
    carriers = hosts(model)
    built: dict[str, nn.Module] = {}
    for path, node in nodes.items():
        if path not in modules:
            raise TargetError(f"The model has no module {path!r}.{did_you_mean(path, modules)}")
        inside = [other for other in prefixes(path) if other in carriers or other in nodes]
        around = [other for other in carriers if other.startswith(f"{path}.")]
        if inside or around:
            raise TargetError(
                f"{path} and {(inside + around)[0]} cannot both be adapted: one lies inside the other."
            )
        if isinstance(node, CopyNode) and any(
            isinstance(part, Replacement) for part in modules[path].modules()
        ):
            raise TargetError(
                f"{path} holds compressed layers, of which no trained copy can be saved: name layers outside "
                f"them in modules_to_save."
            )
        host = carriers.get(path)
        if host is not None and isinstance(host, TrainedCopy) is not isinstance(node, CopyNode):
            raise TargetError(f"{path} is adapted by one adapter and trained in full by another.")
        if any(p.is_meta for p in modules[path].parameters()):
            raise StateError(f"The weight of {path} is on the meta device: load the model's weights first.")
        built[path] = node.build(meta_twin(modules[path]) if on_meta else modules[path], path)
    return built


def meta_twin(module: nn.Module) -> nn.Module:
    """A copy of a module without values: its tensors are on ``meta``."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        twin = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
        )
    return copy.deepcopy(module, memo)


def commit(
    model: nn.Module,
    name: str,
    nodes: Mapping[str, Node],
    parts: Mapping[str, nn.Module],
    recipe: dict[str, Any],
) -> None:
    """Attach built parts to the model as the adapter ``name``, activate only it, and freeze the rest."""
    if "_lowrank_ft" not in model.__dict__:
        model.__dict__["_lowrank_ft"] = State(trainable_names(model))
    modules, existing, owners = sites.stock_modules(model), hosts(model), owners_of(model)
    for path, part in parts.items():
        host = existing.get(path)
        if host is None:
            host = TrainedCopy(modules[path]) if isinstance(nodes[path], CopyNode) else Adapted(modules[path])
            put_in_place(owners, modules[path], host)
        host.attach(name, nodes[path], part)
    for host in hosts(model).values():
        host.activate((name,))
    state_of(model).recipes[name] = recipe
    freeze_base(model)
    write_config(model)


def restore_structure(model: nn.Module, nodes: Mapping[str, Node]) -> None:
    """Replace the stock modules of an empty model by a manifest's modules (for ``from_pretrained``).

    Raises:
        CheckpointError: the model lacks a module that the manifest names.
    """
    modules = dict(model.named_modules())
    for name in nodes:
        if name not in modules or not name:
            raise CheckpointError(
                f"The manifest names a module {name!r} that {type(model).__name__} does not have."
            )
    replace(model, {name: node.build(modules[name], name) for name, node in nodes.items()})


def trained_copies(model: nn.Module, patterns: Sequence[str], adapted: Collection[str]) -> dict[str, Node]:
    """Return nodes of copies: of modules to train in full, and of batch norms, whose statistics change."""
    saved = sites.find_modules(model, patterns, "modules_to_save")
    shared = ties.shared(stock_tensors(model))
    for name, module in saved.items():
        if name in adapted:
            raise TargetError(f"{name} is both a target and in modules_to_save: exclude it from the targets.")
        tied = [
            other
            for p in module.parameters()
            for other in shared.get(id(p), ())
            if not other.startswith(f"{name}.")
        ]
        if tied:
            raise TargetError(f"{name} shares its weight with {tied[0]}: a trained copy would break the tie.")
    copies: dict[str, Node] = {name: CopyNode(trainable=True) for name in saved}
    for name, module in sites.stock_modules(model).items():
        moves = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        if moves and not any(name == s or name.startswith(f"{s}.") for s in saved):
            copies[name] = CopyNode(trainable=False)
    return copies


Owners = dict[int, list[tuple[nn.Module, str]]]


def owners_of(model: nn.Module) -> Owners:
    """Return for the id of each module every parent and attribute name: a module can have several."""
    owners: Owners = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                owners.setdefault(id(child), []).append((parent, attribute))
    return owners


def put_in_place(owners: Owners, old: nn.Module, new: nn.Module) -> None:
    """Replace a module in all of its parents."""
    for parent, attribute in owners[id(old)]:
        parent._modules[attribute] = new


def freeze_base(model: nn.Module) -> None:
    """Freeze every parameter that belongs to no adapter."""
    in_adapters = {id(p) for host in hosts(model).values() for p in host.parts.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in in_adapters:
            parameter.requires_grad_(False)


def restore_trainable(model: nn.Module, names: frozenset[str]) -> None:
    """Make the parameters with these stock names, and no others, require a gradient."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in names)


def forget(model: nn.Module) -> None:
    """Delete the state of a model without adapters, and restore its parameters' ``requires_grad``."""
    restore_trainable(model, state_of(model).trainable)
    del model.__dict__["_lowrank_ft"]


def write_config(model: nn.Module) -> None:
    """Write the manifest to the transformers config, so that ``save_pretrained`` saves it for reloading."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_diff_dict"):
        return
    manifest = describe(model)
    if manifest:
        config.quantization_config = {
            "quant_method": QUANT_METHOD,
            "schema": SCHEMA,
            "manifest": to_json(manifest),
            "active": list(active_adapters(model)),
            "recipes": state_of(model).recipes if hosts(model) else {},
            "digests": digests(model),
            "stages": recipes_of(model),
        }
    elif is_ours(getattr(config, "quantization_config", None)):
        del config.quantization_config
    ties.rename(model)
