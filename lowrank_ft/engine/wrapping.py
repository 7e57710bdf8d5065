"""Put methods on a model: ``wrap`` and ``requantize``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from lowrank_ft import config as configs
from lowrank_ft.algorithms.base import AdapterConfig, Counts, Family, Method, MethodConfig
from lowrank_ft.anatomy.sites import Site, Targets
from lowrank_ft.calibration.batches import Calibration, Source
from lowrank_ft.engine import pipeline
from lowrank_ft.engine.adapters import ModelT, merge
from lowrank_ft.engine.adoption import adopted
from lowrank_ft.engine.offers import offers
from lowrank_ft.engine.state import (
    FACTS,
    State,
    adapter_names,
    check_can_change,
    check_can_wrap,
    stages_of,
    trainable_names,
)
from lowrank_ft.engine.surgery import build, commit, trained_copies, write_config
from lowrank_ft.errors import ConfigError, StateError
from lowrank_ft.structure import registry
from lowrank_ft.structure.node import Node


def wrap(
    model: ModelT,
    method: str | MethodConfig | Sequence[MethodConfig],
    *,
    name: str = "default",
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    layers: int | Sequence[int] | None = None,
    data: Any = None,
    tokenizer: Any = None,
    loss: Any = None,
    **options: Any,
) -> ModelT:
    """Put a method (or several, in order) on a model, in place, and return the model.

    With an adapter, the model's own parameters are frozen, the adapter becomes the only active one, and
    outputs are bit-identical until it is trained.

    Args:
        model: any ``nn.Module``.
        method: a method's name, with its options as keywords; a config object; or a list of config objects.
        name: the adapter's name. Several adapters can live on one model under different names.
        targets: the layers to act on (see :func:`lowrank_ft.anatomy.sites.select`).
        exclude: layers to leave out of ``targets``.
        layers: indices of the blocks to act on; all by default.
        data: calibration data, for methods that need it.
        tokenizer: turns texts in ``data`` into tokens.
        loss: the loss to differentiate, for methods that need gradients.
        **options: the fields of the method's config.

    Raises:
        RegistryError: no such method.
        ConfigError: an option that is unknown, ill-typed or out of range; data for a method that uses none.
        TargetError: targets match nothing, or layers that cannot be adapted.
        StateError: the name is taken; the model is compiled, quantised, merged or on ``meta``.
    """
    stages = _stages(method, options)
    source = Source(data, tokenizer, loss)
    if source and not any(stage.needs() for stage in stages):
        names = " and ".join(repr(stage.name) for stage in stages)
        raise ConfigError(
            f"The method {names} takes no calibration data: leave out data, tokenizer and loss."
        )
    selection = Targets(
        targets, exclude, layers if layers is None or isinstance(layers, int) else tuple(layers)
    )
    with adopted(model):
        if any(stage.trains for stage in stages):
            check_can_wrap(model, name)
        check_can_change(model)
        for stage in stages:
            # Of several stages, those that need no data would refuse it.
            stage_source = source if len(stages) == 1 or stage.needs() else Source()
            _put(model, stage, selection, name, stage_source)
    return model


def requantize(model: ModelT, *, data: Any = None, tokenizer: Any = None, loss: Any = None) -> ModelT:
    """Merge the active adapters into the weights, and quantise these again as before.

    So a trained adapter becomes part of the quantised base; LQ-LoRA splits the sum again. The last quantising
    stage runs again with its own options, and its report has the remaining errors.

    Args:
        model: a model with a quantised base and adapters on it.
        data: calibration data, if that stage needs any; see :func:`wrap`.
        tokenizer: turns texts in ``data`` into tokens.
        loss: the loss to differentiate.

    Raises:
        StateError: no stage has quantised the model, or there is no adapter to merge.
        ConfigError: data is missing, or the stage uses none.
    """
    stages = stages_of(model)
    quantising = [s for s in stages if registry.methods[s["method"]].family is Family.QUANTIZER]
    if not quantising:
        raise StateError("No stage has quantised this model: wrap() it with a quantising method.")
    last, names = quantising[-1], adapter_names(model)
    cls = registry.methods[last["method"]]
    method = _with_options(cls, last["options"])
    if bool(method.needs()) is (data is None):
        state = "looks at calibration data: pass data=" if method.needs() else "takes no calibration data"
        raise ConfigError(f"The method {cls.name!r} that quantised this model {state}.")
    merge(model, reversible=False)
    model.__dict__["_lowrank_ft_stages"] = [stage for stage in stages if stage is not last]
    selection: dict[str, Any] = {key: last[key] for key in ("targets", "exclude", "layers")}
    name = names[0] if method.trains else "default"
    return wrap(model, method.config, name=name, data=data, tokenizer=tokenizer, loss=loss, **selection)


def calibration_of(config: MethodConfig) -> Calibration | None:
    """Return how much calibration data a method uses with these options; None if it uses none."""
    settings: Calibration | None = getattr(config, "calibration", None)
    return settings if _method_for(config).needs() else None


def trains(config: MethodConfig) -> bool:
    """Whether a method leaves an adapter."""
    return _method_for(config).trains


def _stages(
    method: str | MethodConfig | Sequence[MethodConfig], options: Mapping[str, Any]
) -> list[Method[Any]]:
    """Return the methods that the arguments of ``wrap`` name, with checked configs and in a checked order."""
    if isinstance(method, str):
        return [_with_options(registry.methods[method], options)]
    if options:
        names = ", ".join(options)
        raise ConfigError(
            f"Pass {names} in the config object, or the method by name with options as keywords."
        )
    method_configs = [method] if isinstance(method, MethodConfig) else list(method)
    if not method_configs:
        raise ConfigError("The list of methods is empty.")
    stages = [_method_for(config) for config in method_configs]
    order = [stage.family.value for stage in stages]
    if order != sorted(order) or sum(stage.trains for stage in stages) > 1:
        listing = ", ".join(f"{stage.name} ({stage.family.name.lower()})" for stage in stages)
        raise ConfigError(
            f"These methods cannot be applied in one go: {listing}. The order is compress, quantise, adapt; "
            f"a second adapter takes a second wrap() with its own name=."
        )
    return stages


def _method_for(config: MethodConfig) -> Method[Any]:
    for cls in registry.methods.values():
        if type(config) is cls.Config:
            method: Method[Any] = cls(
                configs.parse(cls.Config, configs.to_dict(config), what=f"The method {cls.name!r}")
            )
            return method
    raise ConfigError(f"{config!r} is not the config of a registered method ({', '.join(registry.methods)}).")


def _with_options(cls: Any, options: Mapping[str, Any]) -> Method[Any]:
    """Return a method of a registered class, with checked options."""
    method: Method[Any] = cls(configs.parse(cls.Config, options, what=f"The method {cls.name!r}"))
    return method


def _put(model: nn.Module, stage: Method[Any], selection: Targets, name: str, source: Source) -> None:
    """Apply one stage to the targeted layers."""
    chosen = stage.sites(model, selection.select(model))
    recipe = {"method": stage.name, "options": configs.to_dict(stage.config), **configs.to_dict(selection)}
    change = _adapt if stage.family is Family.ADAPTER else _compress
    change(model, stage, chosen, name, recipe, source)


def _adapt(
    model: nn.Module,
    method: Method[Any],
    chosen: list[Site],
    name: str,
    recipe: dict[str, Any],
    source: Source,
) -> None:
    """Compute an adapter (statistics, options, structure, values), and only then change the model."""
    nodes = _copies(model, method, chosen)
    with pipeline.statistics(model, method, chosen, source) as statistics:
        shares = method.choose(chosen, offers(method, chosen, statistics), Counts(0, 0))
        for site, share in zip(chosen, shares, strict=True):
            nodes.update(method.structure(site, share))
        parts = build(model, nodes)
        for site in tqdm(chosen, desc="Starting", unit="layer", leave=False, disable=not statistics):
            method.values(site, {path: parts[path] for path in site.names}, statistics)
    commit(model, name, nodes, parts, recipe)


def _compress(
    model: nn.Module,
    method: Method[Any],
    chosen: list[Site],
    name: str,
    recipe: dict[str, Any],
    source: Source,
) -> None:
    trainable, copies = trainable_names(model), _copies(model, method, chosen)
    facts = pipeline.compress(model, method, chosen, source, name)
    model.__dict__["_lowrank_ft_stages"] = [*stages_of(model), {**recipe, FACTS: facts}]
    if method.trains:  # its adapter is in place already; only the modules trained in full are missing
        model.__dict__["_lowrank_ft"] = State(trainable)
        commit(model, name, copies, build(model, copies), recipe)
    write_config(model)


def _copies(model: nn.Module, method: Method[Any], chosen: list[Site]) -> dict[str, Node]:
    """Return the nodes of the modules that an adapter trains in full beside its targets."""
    if not isinstance(method.config, AdapterConfig):
        return {}
    targets = {name for site in chosen for name in site.names}
    return trained_copies(model, method.config.modules_to_save, targets)
