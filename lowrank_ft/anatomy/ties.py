"""Weights that several modules share: find them, refuse to break them, keep their names up to date."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from lowrank_ft.errors import StateError
from lowrank_ft.modules.adapted import Adapted
from lowrank_ft.modules.host import Host


def shared(tensors: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """Return the names of each tensor that has more than one, by the tensor's id."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return {key: several for key, several in names.items() if len(several) > 1}


def other_users(model: nn.Module, module: nn.Module, ties: Mapping[int, list[str]]) -> list[str]:
    """Return the names under which other modules use the weight of ``module``.

    Args:
        model: the model.
        module: the layer, or its host. A module registered under several names does not count as tied.
        ties: the result of :func:`shared`.
    """
    base = module.base if isinstance(module, Host) else module
    weight = base._parameters.get("weight")
    own = {f"{n}.weight" for n, m in model.named_modules(remove_duplicate=False) if m is module}
    return [name for name in ties.get(id(weight), ()) if name not in own]


def check_merge(
    model: nn.Module, hosts: Mapping[str, Host], ties: Mapping[int, list[str]], untie: bool
) -> None:
    """Refuse to merge into a weight that other modules use, unless ``untie`` is set."""
    for name, host in hosts.items():
        if untie or not isinstance(host, Adapted) or not host.active:
            continue
        others = other_users(model, host, ties)
        if others:
            raise StateError(
                f"The weight of {name} is shared with {others[0]}, so merging would break the tie. "
                f"merge(untie=True) does that and records it in the model's config."
            )


def set_tied(model: nn.Module, tied: bool) -> bool:
    """Set ``tie_word_embeddings`` in a transformers config; return whether that changed it."""
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", None) in (None, tied):
        return False
    cast(Any, config).tie_word_embeddings = tied
    return True


def rename(model: nn.Module) -> None:
    """Update transformers' names of tied weights: an embedding or head may have become a host's base."""
    for module in model.modules():
        stock = getattr(type(module), "_tied_weights_keys", None)
        if not isinstance(stock, dict):
            continue
        renamed = {_as_placed(module, k): _as_placed(module, v) for k, v in stock.items()}
        if renamed != stock:
            cast(Any, module)._tied_weights_keys = renamed
        else:
            module.__dict__.pop("_tied_weights_keys", None)
        expanded = module.__dict__.get("all_tied_weights_keys")
        if isinstance(expanded, dict):
            placed = {_as_placed(module, k): _as_placed(module, v) for k, v in expanded.items()}
            cast(Any, module).all_tied_weights_keys = placed


def _as_placed(module: nn.Module, key: str) -> str:
    """Return the present name of a tensor, given its name before hosts were inserted or removed."""
    owner, _, attribute = key.rpartition(".")
    modules = dict(module.named_modules())
    if owner.endswith(".base") and owner not in modules:
        owner = owner.removesuffix(".base")  # its host was removed
    if isinstance(modules.get(owner), Host):
        owner += ".base"  # a host was inserted
    return f"{owner}.{attribute}" if owner else attribute
