"""Inspect a model: its adapters, its compressed modules, its base weights, and what may be done to it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lowrank_ft.errors import ConfigError, StateError, did_you_mean
from lowrank_ft.modules.host import Host
from lowrank_ft.modules.layer import find_layer
from lowrank_ft.structure.manifest import replacements

SCHEMA = 1  # of the manifest in a transformers config
QUANT_METHOD = "lowrank_ft"  # the name by which transformers finds this package's loader for a config
FACTS = "layers changed"
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass
class State:
    """The state that the engine keeps for a wrapped model; everything else is read from the model itself.

    Attributes:
        trainable: stock names of the parameters that required a gradient before the first wrap.
        recipes: for each adapter, the method and the options that made it, as JSON data.
        merged: the hosts that :func:`merge` replaced, for :func:`unmerge`; None if nothing is merged.
        untied: whether :func:`merge` broke the tie of the embeddings.
    """

    trainable: frozenset[str]
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    merged: dict[str, Host] | None = None
    untied: bool = False


def hosts(model: nn.Module) -> dict[str, Host]:
    """Return the modules that carry adapters, by stock name, in module order."""
    return {name: module for name, module in replacements(model).items() if isinstance(module, Host)}


def compressed(model: nn.Module) -> list[str]:
    """Return the names of the compressed modules: all replaced ones but hosts with a stock base."""
    replaced = replacements(model).items()
    return [n for n, m in replaced if not isinstance(m, Host) or m.base_node().kind != "dense"]


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters on a model, in the order in which they were added."""
    return tuple(dict.fromkeys(name for host in hosts(model).values() for name in host.parts))


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the active adapters."""
    return tuple(dict.fromkeys(name for host in hosts(model).values() for name in host.active))


def check_whole(model: nn.Module, active: Collection[str]) -> None:
    """Raise ``StateError`` if an adapter that holds part of the weights would be inactive."""
    for name in _carrying(model):
        if name not in active:
            raise StateError(
                f"Part of the quantised weights lies in the adapter {name!r}, so the model is not whole "
                f"without it: keep it active beside others (set_adapter([{name!r}, …])), or merge() it."
            )


def carries(model: nn.Module) -> bool:
    """Whether an adapter holds part of the weights, so that the base is incomplete without it."""
    return bool(_carrying(model))


def _carrying(model: nn.Module) -> list[str]:
    """The adapters that hold part of the weights."""
    parts = [(name, part) for host in hosts(model).values() for name, part in host.parts.items()]
    return list(dict.fromkeys(name for name, part in parts if getattr(part, "carries", False)))


def require_adapter(model: nn.Module, name: str) -> None:
    """Raise ``StateError`` unless the model has an adapter of that name."""
    names = adapter_names(model)
    if name not in names:
        raise StateError(f"There is no adapter {name!r}.{did_you_mean(name, names)} Known: {list(names)}.")


def stock_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer of the base model by its stock name.

    A tied tensor is listed under each of its names; tensors of adapters are left out.
    """
    host_names = {n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Host)}
    tensors: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        host = next((name for name in prefixes(key) if name in host_names), None)
        if host is None:
            tensors[key] = tensor
        elif key.startswith(f"{host}.base."):
            tensors[f"{host}.{key.removeprefix(f'{host}.base.')}"] = tensor
    return tensors


def prefixes(key: str) -> Iterator[str]:
    """Yield the names of the modules that contain a dotted name, the outermost first."""
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


def frozen_keys(model: nn.Module) -> set[str]:
    """Return the keys of ``state_dict`` that belong to no adapter: the base, which is not trained."""
    carriers = hosts(model)
    base = tuple(f"{name}.base." for name in carriers)
    in_hosts = tuple(f"{name}." for name in carriers)
    return {key for key in model.state_dict() if key.startswith(base) or not key.startswith(in_hosts)}


def state_of(model: nn.Module) -> State:
    """Return the engine's state of a wrapped model.

    Raises:
        StateError: the model is not wrapped.
    """
    state = model.__dict__.get("_lowrank_ft")
    if not isinstance(state, State):
        raise StateError("This model has no adapter: wrap() or load() one first.")
    return state


def check_can_wrap(model: nn.Module, name: str) -> None:
    """Raise ``StateError`` or ``ConfigError`` if no adapter ``name`` can be put on the model."""
    if not _ADAPTER_NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"An adapter cannot be called {name!r}: use letters, digits, - and _ ('math-v2').")
    if name in adapter_names(model):
        raise StateError(
            f"The model already has an adapter {name!r}. Choose another name=, or delete_adapter() it."
        )
    check_whole(model, ())  # a new adapter becomes the only active one
    check_can_change(model)


def check_can_change(model: nn.Module) -> None:
    """Raise ``StateError`` if no module of the model can be replaced in its present state."""
    state = model.__dict__.get("_lowrank_ft")
    if state is not None and state.merged is not None:
        raise StateError(
            "The model holds a reversible merge. unmerge() it, or make it permanent with "
            "merge(model, reversible=False), before putting another adapter on."
        )
    if hasattr(model, "_orig_mod"):
        raise StateError("The model is compiled: wrap it first, then torch.compile it.")
    if hasattr(model, "peft_config"):
        raise StateError(
            "PEFT adapters are on this model. load() their directory on the plain base model instead."
        )
    foreign = getattr(getattr(model, "config", None), "quantization_config", None)
    if foreign is not None and not is_ours(foreign):
        raise StateError(
            "The model is quantised by another library. Load it unquantised, or with bitsandbytes, whose "
            "linear layers wrap() takes over."
        )
    if find_layer(model) is not None:
        raise StateError(
            "The model is itself a single layer, which cannot be replaced in place: put it in a container."
        )


def stages_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the stages that compressed a model: method, options, and facts on each layer.

    Facts are lost when the model is saved: a checkpoint keeps only methods and options.
    """
    return list(model.__dict__.get("_lowrank_ft_stages", ()))


def recipes_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the stages without their facts."""
    return [{k: v for k, v in stage.items() if k != FACTS} for stage in stages_of(model)]


def replaced_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of all replaced modules, by their names in the model."""
    prefixes = tuple(f"{name}." for name in replacements(model))
    return {key: t for key, t in model.state_dict(keep_vars=True).items() if key.startswith(prefixes)}


def trainable_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that require a gradient, tied ones under each of their names."""
    named = model.named_parameters(remove_duplicate=False)  # a tie may be broken later
    return frozenset(n for n, p in named if p.requires_grad)


def is_ours(quantization_config: Any) -> bool:
    """Whether a transformers config holds this package's manifest."""
    if isinstance(quantization_config, Mapping):
        return quantization_config.get("quant_method") == QUANT_METHOD
    return getattr(quantization_config, "quant_method", None) == QUANT_METHOD
