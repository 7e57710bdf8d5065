"""Operations on adapters: activate, merge, cast and remove them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast, get_args

import torch
from torch import nn

from lowrank_ft.algorithms.base import FactorType
from lowrank_ft.anatomy import ties
from lowrank_ft.engine.digest import check_digest, digests
from lowrank_ft.engine.state import (
    State,
    adapter_names,
    check_whole,
    hosts,
    require_adapter,
    state_of,
    stock_tensors,
)
from lowrank_ft.engine.surgery import (
    forget,
    freeze_base,
    meta_twin,
    owners_of,
    put_in_place,
    restore_trainable,
    write_config,
)
from lowrank_ft.errors import ConfigError, StateError
from lowrank_ft.modules.adapted import Adapted
from lowrank_ft.modules.copied import TrainedCopy
from lowrank_ft.modules.delta import Delta
from lowrank_ft.modules.layer import layer_of
from lowrank_ft.modules.quantized import Quantized

ModelT = TypeVar("ModelT", bound=nn.Module)


def set_adapter(model: ModelT, names: str | Sequence[str]) -> ModelT:
    """Make these adapters the active ones: their updates add up and train; the others are frozen and unused.

    Raises:
        StateError: no adapter of that name, or a combination that cannot run together.
    """
    active = (names,) if isinstance(names, str) else tuple(names)
    carriers = hosts(model)
    for name in active:
        require_adapter(model, name)
    for host in carriers.values():
        host.check_active(active)
    check_whole(model, active)
    for host in carriers.values():
        host.activate(active)
    write_config(model)
    return model


@contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """Run the block with no adapter active: outputs are bit-identical to the base model's."""
    carriers = hosts(model)
    if not carriers:
        raise StateError("There is no adapter on this model to disable.")
    check_whole(model, ())
    before = [(host, host.active) for host in carriers.values()]
    for host, _ in before:
        host.use(())
    try:
        yield
    finally:
        for host, active in before:
            host.use(active)


def delete_adapter(model: ModelT, name: str) -> ModelT:
    """Remove one adapter. Layers that then have no adapter become stock layers again.

    Raises:
        StateError: no adapter of that name.
    """
    require_adapter(model, name)
    check_whole(model, [other for other in adapter_names(model) if other != name])
    owners = owners_of(model)
    for host in hosts(model).values():
        if name in host.parts:
            host.detach(name)
            if not host.parts:
                put_in_place(owners, host, host.base)
    state_of(model).recipes.pop(name, None)
    if not hosts(model):
        forget(model)
    write_config(model)
    return model


def merge(model: ModelT, *, reversible: bool = True, untie: bool = False) -> ModelT:
    """Fold the active adapters into stock layers. Compressed layers stay compressed.

    Weight and update are summed in at least float32 and rounded once, to the layer's dtype. Without
    compressed layers the result is the stock model: it saves, compiles and serves as such.

    Args:
        model: a wrapped model.
        reversible: keep the replaced modules, so that :func:`unmerge` restores them bit-identically; costs
            the memory of the adapted weights once more. Without it the adapters are deleted.
        untie: break the tie if an adapted weight is shared (tied embeddings), and record that in the model's
            config. Without it such a merge is refused: it would also change the other layer with the weight.

    Raises:
        StateError: there is nothing to merge, a weight is tied, or inactive adapters would be lost.
    """
    state = state_of(model)
    if state.merged is not None:
        if reversible:
            raise StateError("The model is merged already. unmerge() it first, or merge(reversible=False).")
        forget(model)
        return model
    carriers = hosts(model)
    idle = [name for name in adapter_names(model) if not any(name in h.active for h in carriers.values())]
    if idle and not reversible:
        raise StateError(
            f"merge(reversible=False) would lose the inactive adapters {idle}: delete_adapter() them."
        )
    ties.check_merge(model, carriers, ties.shared(stock_tensors(model)), untie)

    owners = owners_of(model)
    for host in carriers.values():
        put_in_place(owners, host, host.merged())
    if untie:
        state.untied = ties.set_tied(model, False)
    restore_trainable(model, state.trainable)
    if reversible:
        state.merged = carriers
    else:
        forget(model)
    write_config(model)
    return model


def cast_adapters(model: ModelT, dtype: str, name: str | None = None) -> ModelT:
    """Cast the factors of LoRAs in place; a checkpoint keeps them in this dtype too.

    Half precision halves their bytes. Train in ``"float32"`` and cast at the end: in half precision small
    optimiser steps are lost.

    Args:
        model: a wrapped model.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for what :func:`wrap` uses.
        name: the adapter; by default all.

    Raises:
        StateError: no adapter of that name, or one whose parameters have no choice of dtype.
        ConfigError: no such dtype.
    """
    state_of(model)
    if dtype not in get_args(FactorType):
        raise ConfigError(f"Factors are kept in one of {list(get_args(FactorType))}, but not in {dtype!r}.")
    if name is not None:
        require_adapter(model, name)
    to_cast = [
        (host, other)
        for host in hosts(model).values()
        for other in host.parts
        if name in (None, other) and not isinstance(host, TrainedCopy)
    ]
    for host, other in to_cast:
        if not hasattr(host.nodes[other], "dtype"):
            kind = host.nodes[other].kind
            raise StateError(f"The adapter {other!r} is a {kind!r}, whose numbers have no dtype to choose.")
    for host, other in to_cast:
        node = dataclasses.replace(cast(Any, host.nodes[other]), dtype=dtype)
        shell = node.build(meta_twin(host.base))
        dtypes = {key: tensor.dtype for key, tensor in shell.state_dict().items()}
        part = cast(Delta, host.parts[other])
        for key, tensor in (*part.named_parameters(), *part.named_buffers()):
            tensor.data = tensor.data.to(dtypes[key])
        host.nodes[other] = part.node = node
    write_config(model)
    return model


def merge_drift(model: nn.Module) -> dict[str, float]:
    """Return the rounding error that :func:`merge` would add to each quantised layer.

    It is the relative Frobenius distance, by layer name, between the merged weight and the sum in float64 of
    the stored weight and the active updates. In float32 it is negligible; in half precision it can be
    as large as the update that was trained.

    Raises:
        StateError: no adapter on a quantised layer.
    """
    drifts = {}
    for name, host in hosts(model).items():
        if not isinstance(host, Adapted) or not isinstance(host.base, Quantized) or not host.active:
            continue
        with torch.no_grad():
            exact = host.base.matrix(torch.float64)
            for delta in host.active:
                exact = exact + host.deltas[delta].weight().double()
            merged = layer_of(host.merged()).matrix().double()
            drifts[name] = float((merged - exact).norm() / exact.norm().clamp_min(1e-300))
    if not drifts:
        raise StateError("No quantised layer has an active adapter, so nothing would be merged into one.")
    return drifts


def unmerge(model: ModelT) -> ModelT:
    """Undo :func:`merge`: the same modules are put back, so base and adapters are bit-identical.

    Raises:
        StateError: nothing is merged.
    """
    state = state_of(model)
    if state.merged is None:
        raise StateError("Nothing is merged, or the merge was made permanent with reversible=False.")
    owners = owners_of(model)
    modules = dict(model.named_modules())
    for name, host in state.merged.items():
        current = modules[name]
        parameter = next(current.parameters(), None)
        if parameter is not None:
            host.to(parameter.device)  # the model may have moved to another device since
        put_in_place(owners, current, host.train(current.training))
    if state.untied:
        ties.set_tied(model, True)
        state.untied = False
    state.merged = None
    freeze_base(model)
    write_config(model)
    return model


def unload(model: ModelT) -> ModelT:
    """Remove all adapters: the model is bit-identical to the one before the first wrap.

    Raises:
        StateError: the model has no adapter, or its adapters are merged into the weights.
    """
    if state_of(model).merged is not None:
        raise StateError("The adapters are merged into the weights: unmerge() first, then unload().")
    check_whole(model, ())
    owners = owners_of(model)
    for host in hosts(model).values():
        put_in_place(owners, host, host.base)
    forget(model)
    write_config(model)
    return model


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Run the block with the active adapters merged, if there are any."""
    is_adapted = bool(hosts(model))
    if is_adapted:
        merge(model)
    try:
        yield
    finally:
        if is_adapted:
            unmerge(model)


def restore_state(
    model: nn.Module,
    active: Sequence[str],
    recipes: dict[str, dict[str, Any]],
    stages: Sequence[dict[str, Any]],
    expected: Mapping[str, Any],
) -> None:
    """Finish a model from :func:`restore_structure` after its weights are loaded, as if it were just wrapped.

    Args:
        model: the model.
        active: names of the adapters to activate.
        recipes: for each adapter, the method and the options that made it.
        stages: the stages that compressed the model.
        expected: for each adapter, the digest of what it depends on, from the checkpoint.

    Raises:
        CheckpointError: the digest of an adapter differs from ``expected``.
    """
    for name, digest in digests(model).items():
        check_digest(name, digest, expected)
    if stages:
        model.__dict__["_lowrank_ft_stages"] = list(stages)
    if hosts(model):
        trainable = frozenset(stock_tensors(model))
        model.__dict__["_lowrank_ft"] = State(trainable, recipes)
        set_adapter(model, active)
        freeze_base(model)
    write_config(model)


def keep_adapters_in_float32(model: nn.Module) -> None:
    """Ask transformers not to cast adapters down when it loads a model in half precision."""
    adapted = [
        f"{name}.parts.{adapter}."
        for name, host in hosts(model).items()
        for adapter, node in host.nodes.items()
        if isinstance(host, Adapted) and getattr(node, "dtype", "auto") in ("auto", "float32")
    ]
    if adapted and hasattr(model, "_keep_in_fp32_modules_strict"):
        patterns = {re.escape(name) for name in adapted}
        existing: set[str] = set(cast(Any, model)._keep_in_fp32_modules_strict or ())
        cast(Any, model)._keep_in_fp32_modules_strict = existing | patterns
