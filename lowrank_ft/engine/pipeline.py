"""Run a method: statistics, options, choice, values, and the journal that lets a compression resume.

``surgery`` makes every change to the model; this file decides when.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lowrank_ft import config as configs
from lowrank_ft import solve
from lowrank_ft.algorithms.base import Family, Method, Need, Share, Statistics
from lowrank_ft.anatomy import layouts, ties
from lowrank_ft.anatomy.sites import Site, stock_modules
from lowrank_ft.calibration import batches as batching
from lowrank_ft.calibration import collect, probes, size, stream
from lowrank_ft.calibration.batches import Batch, Loss, Source
from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.calibration.store import Store, StoredStatistics, check_room
from lowrank_ft.engine.adapters import disable
from lowrank_ft.engine.counting import bytes_of, count, numbers_in
from lowrank_ft.engine.digest import key_of
from lowrank_ft.engine.journal import Journal
from lowrank_ft.engine.offers import Shelf, offers, recipe_of
from lowrank_ft.engine.state import adapter_names, hosts, stock_tensors
from lowrank_ft.engine.surgery import in_place, replace
from lowrank_ft.errors import ConfigError, StateError
from lowrank_ft.modules.adapted import AdaptedNode
from lowrank_ft.modules.layer import layer_of
from lowrank_ft.modules.lowrank import LowRank
from lowrank_ft.modules.resized import Resized
from lowrank_ft.solve.allocation import Handle
from lowrank_ft.structure.replacement import Container, Replacement


@dataclass
class Run:
    """One run of a method on a model.

    Attributes:
        model: the model, in eval mode.
        method: the method.
        chosen: the sites of the method.
        batches: calibration data; empty if the method needs none.
        root: directory for statistics and finished layers: the cache, or ``scratch`` if there is none.
        scratch: a directory that is deleted when the run ends.
        key: hash of the model and the data.
        loss: the caller's own loss, to be differentiated; None for the default.
        name: the adapter's name, for a method that leaves one.
    """

    model: nn.Module
    method: Method[Any]
    chosen: list[Site]
    batches: list[Batch]
    root: Path
    scratch: Path
    key: str
    loss: Loss | None
    name: str

    @property
    def loss_root(self) -> Path:
        """Directory for what depends on the loss: a caller's own loss has no hash, so nothing is reused."""
        return self.root if self.loss is None else self.scratch

    @cached_property
    def chain(self) -> stream.Chain | None:
        """The model's chain of blocks, or None if it has none; finding it runs a forward."""
        shelf = self.scratch if self.method.config.calibration.hidden_states == "disk" else None
        return stream.find_chain(self.model, batching.take(self.batches, 1)[0], shelf)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The targeted layers by name, in module order."""
        layers = {n: m for site in self.chosen for n, m in site.layers.items()}
        return {n: layers[n] for n in stock_modules(self.model) if n in layers}


def compress(
    model: nn.Module, method: Method[Any], chosen: list[Site], source: Source, name: str
) -> list[dict[str, Any]]:
    """Compress the layers of ``chosen`` by ``method``; return facts on each, for the report.

    If the method leaves an adapter on them, ``name`` is the adapter's name.

    Raises:
        ConfigError: data is missing, or the method uses none; a budget cannot be met.
        NonFiniteError: activations are not finite.
        StateError: the model has adapters, or a weight to be replaced is shared.
    """
    _check_replaceable(model, chosen, method.family)
    with _begun(model, method, chosen, source, name) as run:
        return _run(run)


@contextmanager
def statistics(
    model: nn.Module, method: Method[Any], chosen: list[Site], source: Source
) -> Iterator[Mapping[str, SiteStatistics]]:
    """Gather the statistics that an adapter method needs, with the model's present adapters disabled.

    They can be read, layer by layer, until the block ends. If the method needs no statistics, nothing is
    gathered.

    Raises:
        ConfigError: data is missing, or the method uses none.
        NonFiniteError: activations are not finite.
        StateError: a weight is not loaded yet.
    """
    if not method.needs():
        for site in chosen:
            method.check(site)
        yield {}
        return
    bare = disable(model) if hosts(model) else nullcontext()
    with bare, _begun(model, method, chosen, source) as run:
        stored = _statistics(run)
        _warn_of_few_tokens(run, stored)
        yield stored


@contextmanager
def _begun(
    model: nn.Module, method: Method[Any], chosen: list[Site], source: Source, name: str = ""
) -> Iterator[Run]:
    """Check the arguments, set eval mode, and prepare the directories of a run."""
    for site in chosen:
        _check_loaded(site)
        method.check(site)
    settings = method.config.calibration
    needs = method.needs()
    need_loss = {Need.OUTPUT_GRADIENT, Need.FISHER, Need.WEIGHTED_INPUT}
    for argument, what, is_used in (
        (source.data, "data", bool(needs)),
        (source.loss, "loss", bool(needs & need_loss)),
    ):
        if argument is not None and not is_used:
            raise ConfigError(
                f"The method {method.name!r} with these options looks at no {what}: leave out {what}=."
            )
    batches = batching.prepare(source.data, source.tokenizer, settings) if needs else []
    was_training = model.training
    model.eval()
    try:
        with tempfile.TemporaryDirectory() as directory, torch.no_grad():
            scratch = Path(directory)
            root = scratch if settings.cache is None else Path(settings.cache)
            key = key_of(model, batches)
            yield Run(model, method, chosen, batches, root, scratch, key, source.loss, name)
    finally:
        model.train(was_training)


def _check_loaded(site: Site) -> None:
    for name, module in zip(site.names, site.modules, strict=True):
        if any(p.is_meta for p in module.parameters()):
            raise StateError(f"The weight of {name} is on the meta device: load the model's weights first.")


def _check_replaceable(model: nn.Module, chosen: Sequence[Site], family: Family) -> None:
    """Raise ``StateError`` if the layers of these sites cannot be replaced."""
    # Resized layers can be compressed again, and low-rank layers quantised.
    recompressible = (Resized, Container, *((LowRank,) if family is Family.QUANTIZER else ()))
    if hosts(model):
        raise StateError(
            f"The model carries the adapters {list(adapter_names(model))}. Compressing would leave "
            f"them on weights that are gone: merge(model, reversible=False) or unload() them first."
        )
    shared = ties.shared(stock_tensors(model))
    for site in chosen:
        for name, module in zip(site.names, site.modules, strict=True):
            if isinstance(module, Replacement) and not isinstance(module, recompressible):
                raise StateError(
                    f"{name} is compressed already: exclude it, or start from the original model."
                )
            others = ties.other_users(model, module, shared)
            if others:
                raise StateError(
                    f"The weight of {name} is shared with {others[0]} (tied embeddings), so it cannot be "
                    f"replaced alone: exclude it, or untie the two before compressing."
                )


def _run(run: Run) -> list[dict[str, Any]]:
    method, settings = run.method, run.method.config.calibration
    _check_measurable(run)
    store = _statistics(run)
    _warn_of_few_tokens(run, store)
    shelf = Shelf(
        run.loss_root, recipe_of(method, run.chosen, [run.key, *(s.directory.name for s in store.stores)])
    )
    shares = method.choose(run.chosen, offers(method, run.chosen, store, shelf), count(run.model))
    journal = Journal(run.loss_root, _recipe(run, shares))
    plan = list(zip(run.chosen, shares, strict=True))
    if settings.sequential and method.needs():
        rows = _sequential(run, plan, store, journal)
    else:
        rows = _at_once(run, plan, store, journal)
    journal.close()
    return rows


def _at_once(
    run: Run, plan: Sequence[tuple[Site, Share]], store: StoredStatistics, journal: Journal
) -> list[dict[str, Any]]:
    """Build the new modules of all sites from the unchanged model, and then put all of them into it."""
    new: dict[str, dict[str, nn.Module]] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for site, share in tqdm(plan, desc="Compressing", unit="site", leave=False):
        new[site.name], rows[site.name] = _solve(run, site, share, store, journal, share.handle)
    for name, measured in _measured(run, new).items():
        rows[name][0]["measured"] = measured
    replace(run.model, {name: module for of_site in new.values() for name, module in of_site.items()})
    return [row for of_site in rows.values() for row in of_site]


def _measured(run: Run, new: Mapping[str, Mapping[str, nn.Module]]) -> dict[str, float]:
    """Return how far each site's new modules alone move the output, in nats per token; if configured."""
    settings = run.method.config.calibration
    if not settings.measure_options:
        return {}
    batches = batching.take(run.batches, settings.probe_samples)
    changes = {name: partial(in_place, run.model, modules) for name, modules in new.items() if modules}
    return probes.divergences(run.model, run.chain, changes, batches)


def _check_measurable(run: Run) -> None:
    """Raise ``ConfigError`` if options are to be measured but cannot be."""
    settings = run.method.config.calibration
    if settings.measure_options and (settings.sequential or not run.batches):
        why = "sequential calibration" if settings.sequential else "options that look at no data"
        raise ConfigError(
            f"calibration.measure_options runs the model with one option put in at a time, which is not "
            f"possible with {why}: leave it out."
        )


def _recipe(run: Run, shares: Sequence[Share]) -> dict[str, Any]:
    """Everything that determines the result of a run."""
    options = configs.to_dict(run.method.config)
    # The cache's path and measuring do not change the result.
    options["calibration"] = {**options["calibration"], "cache": None, "measure_options": False}
    return {
        "key": run.key,
        "method": run.method.name,
        "options": options,
        "sites": [site.names for site in run.chosen],
        "ranks": [[share.rank, dict(share.ranks), configs.plain(share.scheme)] for share in shares],
        "adapter": run.name,
    }


def _statistics(run: Run) -> StoredStatistics:
    """Return the statistics that the method needs; gather those that the cache lacks.

    The name of each store in the cache contains hashes of everything that its statistics depend on.

    Raises:
        StorageError: the disk has no room for the missing statistics.
    """
    settings, needs = run.method.config.calibration, run.method.needs()
    few = batching.take(run.batches, settings.gradient_samples)
    tail = f"{run.key}-{batching.fingerprint(few)[:16]}"
    fisher, weighted = Need.FISHER in needs, Need.WEIGHTED_INPUT in needs
    kind = "".join(("-fisher" if fisher else "", "-weighted" if weighted else ""))
    store = StoredStatistics(
        Store(run.root / f"inputs-{run.key}"),
        Store(run.loss_root / f"gradients{kind}-{tail}"),
        Store(run.root / f"probes-{tail}-{settings.probe_samples}"),
    )

    def missing(need: bool, of_kind: Store) -> dict[str, nn.Module]:
        return {name: module for name, module in run.modules.items() if need and name not in of_kind}

    inputs = missing(Need.INPUT in needs, store.inputs)
    gradients = missing(fisher or Need.OUTPUT_GRADIENT in needs, store.gradients)
    _check_room(run, inputs, gradients, weighted)
    if inputs:
        collect.inputs(run.model, run.chain, run.modules, run.batches, store.inputs)
    if gradients:
        collect.gradients(run.model, run.chain, run.modules, few, store.gradients, run.loss, fisher, weighted)
    if missing(Need.SENSITIVITY in needs, store.probes):
        samples = batching.take(few, settings.probe_samples)
        probes.sensitivities(run.model, run.chain, run.modules, samples, store.probes)
    return store


def _check_room(
    run: Run, inputs: Mapping[str, nn.Module], gradients: Mapping[str, nn.Module], weighted: bool
) -> None:
    """Raise ``StorageError`` if the disk has no room for the statistics of these layers."""
    most = size.of_inputs(inputs) + size.of_gradients(run.model, gradients, weighted)
    if most <= shutil.disk_usage(run.root).free:
        return
    # Layers with the same input share moments; a forward of one sequence shows which.
    leaders = collect.shared_inputs(run.model, run.modules, run.batches[0]) if inputs else {}
    distinct = {name: module for name, module in inputs.items() if leaders.get(name, name) == name}
    check_room(run.root, size.of_inputs(distinct) + size.of_gradients(run.model, gradients, weighted))


def _solve(
    run: Run,
    site: Site,
    share: Share,
    statistics: Statistics,
    journal: Journal,
    handle: Handle | None = None,
) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    """Build and fill the new modules of one site, or read their values from the journal if it has them."""
    nodes = dict(run.method.structure(site, share))
    for name, delta in run.method.deltas(site, share).items():
        nodes[name] = AdaptedNode({run.name: delta}, nodes[name])
    modules = dict(zip(site.names, site.modules, strict=True))
    new = {name: node.build(modules[name], name) for name, node in nodes.items()}
    facts: dict[str, Any] = {}
    if new:
        finished = journal.read(site.name, new)
        if finished is None:
            facts = dict(run.method.values(site, new, statistics, handle) or {})
            journal.write(site.name, new, facts)
        else:
            facts = finished
        for name in site.layers.keys() & new.keys():
            new[name].requires_grad_(any(p.requires_grad for p in modules[name].parameters()))
    return new, _rows(site, share, new, facts)


def _rows(
    site: Site, share: Share, new: Mapping[str, nn.Module], facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The report's rows on a site: one, or one for each layer of a group whose layers are factored."""
    one_by_one = share.rank is None and any(name in site.layers for name in share.ranks)
    if not one_by_one:
        return [_row(site, share.rank, new, share.predicted, facts)]
    rows = []
    for name, module in site.layers.items():
        layer = Site((name,), (module,), layouts.role_of(name, module))
        rows.append(_row(layer, share.ranks.get(name), new, None, facts.get(name, {})))
    rows[0]["predicted"] = share.predicted  # for the group
    return rows


def _row(
    site: Site,
    rank: int | None,
    new: Mapping[str, nn.Module],
    predicted: float | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    before = list(site.layers.values())
    after = [new.get(name, layer) for name, layer in site.layers.items()]
    return {
        "module": site.name,
        "layers": list(site.layers),
        "role": site.role,
        "rank": rank,
        "parameters before": numbers_in(before),
        "parameters": numbers_in(after),
        "bytes before": bytes_of(before),
        "bytes": bytes_of(after),
        "predicted": predicted,
        **facts,
    }


def _warn_of_few_tokens(run: Run, stored: StoredStatistics) -> None:
    """Warn of second moments that are singular because the data has fewer tokens than they have rows."""
    short = []
    for name, module in run.modules.items():
        layer = layer_of(module)
        if name in stored and layer.kind != "embedding":
            tokens = stored.tokens(name)
            if tokens < layer.in_features:
                short.append((tokens, layer.in_features, name))
    if short:
        tokens, features, name = min(short)
        warnings.warn(
            f"The calibration data has {tokens} tokens, fewer than the {features} inputs of {name} "
            f"({len(short)} such layers): their second moments are singular, and take a ridge of "
            f"{solve.factor_spd(stored[name].C).ridge:.0e} where they are inverted. Use more data.",
            UserWarning,
            stacklevel=5,
        )


def _sequential(
    run: Run, plan: Sequence[tuple[Site, Share]], dense: StoredStatistics, journal: Journal
) -> list[dict[str, Any]]:
    """Compress block by block, each with statistics from the outputs of the compressed blocks before it."""
    if run.chain is None:
        raise ConfigError(
            "calibration.sequential needs a model with a chain of blocks, and this one has none."
        )
    rows: dict[int, list[dict[str, Any]]] = {}
    originals = {n: m for site in run.chosen for n, m in zip(site.names, site.modules, strict=True)}
    fresh = Store(journal.directory)
    # Input moments come from the partly compressed model, the other statistics from the dense model. The
    # options' handles were computed from the dense model's input moments, so they are not used.
    statistics = StoredStatistics(fresh, dense.gradients, dense.probes)

    def after(names: Sequence[str]) -> bool:
        for number, (site, share) in enumerate(plan):
            if site.layers.keys() <= set(names):
                new, rows[number] = _solve(run, site, share, statistics, journal)
                replace(run.model, new)
        return bool(names)

    try:
        collect.inputs(run.model, run.chain, run.modules, run.batches, fresh, after)
    except BaseException:
        replace(run.model, originals)  # this is right even if only some sites were replaced
        raise
    return [row for number in range(len(plan)) for row in rows[number]]
