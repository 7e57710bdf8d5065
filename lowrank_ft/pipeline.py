"""Gather what a method asks for; run a compressor: plan, values, and the journal that makes it resumable.

The engine still makes every change; this file decides when.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from tqdm.auto import tqdm

from lowrank_ft import config as configs
from lowrank_ft import engine, layouts, linalg, ties
from lowrank_ft.algorithms.base import Counts, Family, Method, Need, Share
from lowrank_ft.calibration import batches as batching
from lowrank_ft.calibration import collect, stream
from lowrank_ft.calibration.batches import Batch, Loss, Source
from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.calibration.store import Known, Notes, Store, write_whole
from lowrank_ft.checkpoint import base_model
from lowrank_ft.errors import ConfigError, StateError
from lowrank_ft.modules.adapted import AdaptedNode
from lowrank_ft.modules.layer import layer_of
from lowrank_ft.modules.lowrank import LowRank
from lowrank_ft.modules.quantized import Quantized
from lowrank_ft.modules.replacement import Container, Replacement
from lowrank_ft.modules.resized import Resized
from lowrank_ft.sites import Site, stock_modules

_SCHEMA = 4  # of what the cache holds: a change there makes earlier caches unknown, not incomplete


@dataclass
class Run:
    """A method that looks at a model on data.

    Attributes:
        model: the model, in eval mode.
        method: the method.
        chosen: its sites.
        batches: calibration data; empty where the method needs none.
        root: where statistics and finished layers are kept.
        scratch: a directory that goes when the run ends.
        key: hash of the model and the data.
        loss: what to differentiate, the caller's own; None for the default.
        name: of the adapter, where the method leaves one.
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

    @cached_property
    def chain(self) -> stream.Chain | None:
        """The model's blocks, if it has a chain of them; found by a forward."""
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
    """Replace the layers of ``chosen`` by what ``method`` makes of them; return facts on each.

    An adapter that it leaves on them goes by ``name``.

    Raises:
        ConfigError: data that is missing, or not looked at; a budget that cannot be met.
        NonFiniteError: activations that are not finite.
        StateError: the model carries adapters, or shares a weight that is to be replaced.
    """
    _check_replaceable(model, chosen, method.family)
    with _begun(model, method, chosen, source, name) as run:
        return _run(run)


@contextmanager
def statistics(
    model: nn.Module, method: Method[Any], chosen: list[Site], source: Source
) -> Iterator[Mapping[str, SiteStatistics]]:
    """Gather what an adapter asks for, on the model without the adapters that it carries.

    What is known can be read, layer by layer, until the block ends. Nothing is gathered for a method that
    looks at nothing.

    Raises:
        ConfigError: data that is missing, or not looked at.
        NonFiniteError: activations that are not finite.
        StateError: a weight that is not loaded yet.
    """
    if not method.needs():
        for site in chosen:
            method.check(site)
        yield {}
        return
    bare = engine.disable(model) if engine.hosts(model) else nullcontext()
    with bare, _begun(model, method, chosen, source) as run:
        known = _statistics(run)
        _warn_of_few_tokens(run, known)
        yield known


@contextmanager
def _begun(
    model: nn.Module, method: Method[Any], chosen: list[Site], source: Source, name: str = ""
) -> Iterator[Run]:
    """Check what was given, and put the model and the disk into the state that a run needs."""
    for site in chosen:
        _check_loaded(site)
        method.check(site)
    settings = method.config.calibration
    needs = method.needs()
    losing = {Need.OUTPUT_GRADIENT, Need.FISHER, Need.WEIGHTED_INPUT}
    for given, what, looks in (
        (source.data, "data", bool(needs)),
        (source.loss, "loss", bool(needs & losing)),
    ):
        if given is not None and not looks:
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
            key = _key(model, batches)
            yield Run(model, method, chosen, batches, root, scratch, key, source.loss, name)
    finally:
        model.train(was_training)


def _check_loaded(site: Site) -> None:
    for name, module in zip(site.names, site.modules, strict=True):
        if any(p.is_meta for p in module.parameters()):
            raise StateError(f"The weight of {name} is on the meta device: load the model's weights first.")


def _check_replaceable(model: nn.Module, chosen: Sequence[Site], family: Family) -> None:
    """Raise ``StateError`` where the layers of these sites cannot be replaced."""
    again = (Resized, Container, *((LowRank,) if family is Family.QUANTIZER else ()))
    if engine.hosts(model):
        raise StateError(
            f"The model carries the adapters {list(engine.adapter_names(model))}. Compressing would leave "
            f"them on weights that are gone: merge(model, reversible=False) or unload() them first."
        )
    shared = ties.shared(engine.stock_tensors(model))
    for site in chosen:
        for name, module in zip(site.names, site.modules, strict=True):
            if isinstance(module, Replacement) and not isinstance(module, again):
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
    store = _statistics(run)
    _warn_of_few_tokens(run, store)
    counts = count(run.model)
    shares = method.plan(run.chosen, store, counts)
    # What a loss of the caller's led to cannot be told from its name, so such a run starts anew.
    journal = Journal(run, shares, run.root if run.loss is None else run.scratch)
    plan = list(zip(run.chosen, shares, strict=True))
    if not settings.sequential or not method.needs():
        facts = [
            _solve(run, site, share, store, journal)
            for site, share in tqdm(plan, desc="Compressing", unit="site", leave=False)
        ]
        new = {name: module for modules, _ in facts for name, module in modules.items()}
        engine.replace(run.model, new)
        rows = [row for _, of_site in facts for row in of_site]
    else:
        rows = _sequential(run, plan, store, journal)
    journal.close()
    return rows


def _statistics(run: Run) -> Known:
    """Gather what the method asks for, or find it in the cache, under a name made of all it comes from."""
    settings, needs = run.method.config.calibration, run.method.needs()
    few = batching.take(run.batches, settings.gradient_samples)
    # What a loss of the caller's computes cannot be told from its name, so nothing made with it is kept.
    root = run.root if run.loss is None else run.scratch
    tail = f"{run.key}-{batching.fingerprint(few)[:16]}"
    fisher, weighted = Need.FISHER in needs, Need.WEIGHTED_INPUT in needs
    kind = "".join(("-fisher" if fisher else "", "-weighted" if weighted else ""))
    known = Known(
        Store(run.root / f"inputs-{run.key}"),
        Store(root / f"gradients{kind}-{tail}"),
        Store(run.root / f"probes-{tail}-{settings.probe_samples}"),
        Notes(root / f"notes-{tail}"),
    )

    def missing(need: bool, store: Store) -> bool:
        return need and not store.names() >= set(run.modules)

    if missing(Need.INPUT in needs, known.inputs):
        collect.inputs(run.model, run.chain, run.modules, run.batches, known.inputs)
    if missing(fisher or Need.OUTPUT_GRADIENT in needs, known.gradients):
        collect.gradients(run.model, run.chain, run.modules, few, known.gradients, run.loss, fisher, weighted)
    if missing(Need.SENSITIVITY in needs, known.probes):
        probes = batching.take(few, settings.probe_samples)
        collect.sensitivities(run.model, run.chain, run.modules, probes, known.probes)
    return known


def _solve(
    run: Run, site: Site, share: Share, statistics: Mapping[str, Any], journal: Journal
) -> tuple[dict[str, nn.Module], list[dict[str, Any]]]:
    """Build and fill what stands at one site; from the journal where it was finished before."""
    nodes = dict(run.method.structure(site, share))
    for name, delta in run.method.deltas(site, share).items():
        nodes[name] = AdaptedNode({run.name: delta}, nodes[name])
    modules = dict(zip(site.names, site.modules, strict=True))
    new = {name: node.build(modules[name], name) for name, node in nodes.items()}
    found: dict[str, Any] = {}
    if new:
        known = journal.read(site.name, new)
        found = dict(run.method.values(site, new, statistics) or {}) if known is None else known
        if known is None:
            journal.write(site.name, new, found)
        for name in site.layers.keys() & new.keys():
            new[name].requires_grad_(any(p.requires_grad for p in modules[name].parameters()))
    return new, _rows(site, share, new, found)


def _rows(
    site: Site, share: Share, new: Mapping[str, nn.Module], found: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What the report says of a site: one row; of a group factored layer by layer, one for each layer."""
    if share.rank is not None or not share.ranks:
        return [_row(site, share.rank, new, share.predicted, found)]
    rows = []
    for name, module in site.layers.items():
        layer = Site((name,), (module,), layouts.role_of(name, module))
        rows.append(_row(layer, share.ranks.get(name), new, None, found.get(name, {})))
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


def numbers_in(modules: Iterable[nn.Module]) -> int:
    """Return how many parameters modules have, quantised weights as many as they are."""
    return sum(p.numel() for module in modules for p in module.parameters()) + sum(
        part.weights for module in modules for part in module.modules() if isinstance(part, Quantized)
    )


def bytes_of(modules: Iterable[nn.Module]) -> int:
    """Return the bytes of parameters and persistent buffers, tied ones once."""
    tensors = (t for module in modules for t in module.state_dict().values())
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def _warn_of_few_tokens(run: Run, known: Known) -> None:
    """Warn where a second moment is singular because fewer tokens were seen than it has rows."""
    short = []
    for name, module in run.modules.items():
        layer = layer_of(module)
        if name in known and layer.kind != "embedding":
            tokens = known.tokens(name)
            if tokens < layer.in_features:
                short.append((tokens, layer.in_features, name))
    if short:
        tokens, features, name = min(short)
        warnings.warn(
            f"The calibration data has {tokens} tokens, fewer than the {features} inputs of {name} "
            f"({len(short)} such layers): their second moments are singular, and take a ridge of "
            f"{linalg.factor_spd(known[name].C).ridge:.0e} where they are inverted. Use more data.",
            UserWarning,
            stacklevel=5,
        )


def _sequential(
    run: Run, plan: Sequence[tuple[Site, Share]], dense: Known, journal: Journal
) -> list[dict[str, Any]]:
    """Compress block by block, each on what its compressed predecessors give it."""
    if run.chain is None:
        raise ConfigError(
            "calibration.sequential needs a model with a chain of blocks, and this one has none."
        )
    rows: dict[int, list[dict[str, Any]]] = {}
    originals = {n: m for site in run.chosen for n, m in zip(site.names, site.modules, strict=True)}
    fresh = Store(journal.directory)
    # Inputs as they are now; the rest as the dense model had it.
    known = Known(fresh, dense.gradients, dense.probes, dense.notes)

    def after(names: Sequence[str]) -> bool:
        for number, (site, share) in enumerate(plan):
            if site.layers.keys() <= set(names):
                new, rows[number] = _solve(run, site, share, known, journal)
                engine.replace(run.model, new)
        return bool(names)

    try:
        collect.inputs(run.model, run.chain, run.modules, run.batches, fresh, after)
    except BaseException:
        engine.replace(run.model, originals)  # whatever part of it was replaced
        raise
    return [row for number in range(len(plan)) for row in rows[number]]


class Journal:
    """Finished layers on disk: a run that was killed goes on where it was, and ends with the same bits."""

    def __init__(self, run: Run, shares: Sequence[Share], root: Path) -> None:
        options = configs.to_dict(run.method.config)
        options["calibration"] = {**options["calibration"], "cache": None}  # a cache can be moved
        recipe = {
            "key": run.key,
            "method": run.method.name,
            "options": options,
            "sites": [site.names for site in run.chosen],
            "ranks": [[share.rank, dict(share.ranks), configs.plain(share.scheme)] for share in shares],
            "adapter": run.name,
        }
        self.directory = root / f"journal-{_digest(recipe)}"
        self.directory.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, modules: Mapping[str, nn.Module], facts: Mapping[str, Any]) -> None:
        """Write a finished site: all of it or nothing."""
        tensors = {f"{n}|{k}": t for n, m in _own(modules).items() for k, t in m.state_dict().items()}
        write_whole(self._path(name), tensors, {"facts": json.dumps(facts)})

    def read(self, name: str, modules: Mapping[str, nn.Module]) -> dict[str, Any] | None:
        """Fill the modules of a site that was finished before; None where it was not."""
        if not self._path(name).exists():
            return None
        with safe_open(self._path(name), framework="pt") as file:
            for module_name, module in _own(modules).items():
                state = {k: file.get_tensor(f"{module_name}|{k}") for k in module.state_dict()}
                module.load_state_dict(state)
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        return facts

    def close(self) -> None:
        """Forget a run that has ended: the model has its layers now."""
        shutil.rmtree(self.directory)

    def _path(self, name: str) -> Path:
        return self.directory / f"site-{name}.done"


def _own(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of the modules that hold values; containers have none of their own."""
    return {name: module for name, module in modules.items() if not isinstance(module, Container)}


def count(model: nn.Module) -> Counts:
    """Count a model's parameters: all of them, and those in its blocks (all but embeddings and head).

    Tied weights count once, and quantised ones as many as they are.
    """
    total = {id(p): p.numel() for p in model.parameters()}
    total.update({id(m): m.weights for m in model.modules() if isinstance(m, Quantized)})
    heads = layouts.head_names(model)
    outside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or name in heads:
            outside |= {id(p) for p in module.parameters()}
    held = {id(t): t for t in engine.stock_tensors(model).values()}.values()
    return Counts(
        total=sum(total.values()),
        blocks=sum(n for key, n in total.items() if key not in outside),
        tensors=len(held),
        bytes=sum(t.numel() * t.element_size() for t in held),
    )


def _key(model: nn.Module, batches: Sequence[Batch]) -> str:
    tensors = {k: t for k, t in engine.stock_tensors(model).items() if t.is_floating_point()}
    dtypes = sorted({str(t.dtype) for t in tensors.values()})
    config: Any = getattr(model, "config", None)
    options = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
    apart = {"quantization_config", "_name_or_path", "dtype", "torch_dtype", "transformers_version"}
    return _digest(
        {
            "schema": _SCHEMA,
            "model": base_model.digest(tensors),
            "config": {name: value for name, value in options.items() if name not in apart},
            "dtypes": dtypes,
            "data": batching.fingerprint(batches),
        }
    )


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
