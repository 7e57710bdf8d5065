"""The only code that changes a model: put structures in, fold them, take them out.

A method says what is to stand where (``structure``) and with what values; everything is built and filled
before the first module is replaced, so an error leaves the model as it was.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_ft import config as configs
from lowrank_ft import registry, sites, ties
from lowrank_ft.algorithms.base import AdapterConfig, Counts, FactorType, Family, Method, MethodConfig
from lowrank_ft.calibration.batches import Calibration, Source
from lowrank_ft.errors import CheckpointError, ConfigError, StateError, TargetError, did_you_mean
from lowrank_ft.manifest import Node, describe, replacements, to_json
from lowrank_ft.modules.adapted import Adapted
from lowrank_ft.modules.copied import Copied, CopyNode
from lowrank_ft.modules.delta import Delta, digest_of
from lowrank_ft.modules.host import Host
from lowrank_ft.modules.layer import find_layer, layer_of
from lowrank_ft.modules.quantized import Quantized
from lowrank_ft.modules.replacement import Container, Factored, Replacement
from lowrank_ft.modules.resized import Resized

ModelT = TypeVar("ModelT", bound=nn.Module)

QUANT_METHOD = "lowrank_ft"  # under which transformers finds the manifest in a config
SCHEMA = 1
_FACTS = "layers changed"
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass
class State:
    """What the engine must remember about a wrapped model; all else is read off the model.

    Attributes:
        trainable: stock names of the parameters that required a gradient before the first wrap.
        recipes: for each adapter, the method and the options that made it, as JSON data.
        merged: what :func:`merge` took out, for :func:`unmerge`; None when nothing is merged.
        untied: whether :func:`merge` broke the tie of the embeddings.
    """

    trainable: frozenset[str]
    recipes: dict[str, dict[str, Any]] = field(default_factory=dict)
    merged: dict[str, Host] | None = None
    untied: bool = False


# The verbs ------------------------------------------------------------------------------------------------


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

    With an adapter, the model's own parameters are frozen, the adapter becomes the only active one, and the
    model computes what it computed before.

    Args:
        model: any ``nn.Module``.
        method: a method's name, with its options as keywords; a config object; or a list of config objects.
        name: the adapter's name. Several adapters can live on one model under different names.
        targets: which layers (see :func:`lowrank_ft.sites.select`).
        exclude: which of them not.
        layers: block indices to keep.
        data: calibration data, for methods that look at any.
        tokenizer: turns texts in ``data`` into tokens.
        loss: what to differentiate, for methods that need gradients.
        **options: the fields of the method's config.

    Raises:
        RegistryError: no such method.
        ConfigError: an option that is unknown, ill-typed or out of range; data for a method that takes none.
        TargetError: targets that match nothing, or layers that cannot be adapted.
        StateError: the name is taken; the model is compiled, quantised, merged or on ``meta``.
    """
    from lowrank_ft.adoption import adopted  # it needs this module

    stages = _stages(method, options)
    source = Source(data, tokenizer, loss)
    if source and not any(stage.needs() for stage in stages):
        names = " and ".join(repr(stage.name) for stage in stages)
        raise ConfigError(
            f"The method {names} takes no calibration data: leave out data, tokenizer and loss."
        )
    blocks = layers if layers is None or isinstance(layers, int) else list(layers)
    where: dict[str, Any] = {"targets": targets, "exclude": exclude, "layers": blocks}
    with adopted(model):
        if any(stage.trains for stage in stages):
            check_can_wrap(model, name)
        check_can_change(model)
        for stage in stages:
            given = source if len(stages) == 1 or stage.needs() else Source()  # in a stack, others may look
            _put(model, stage, where, name, given)
    return model


def set_adapter(model: ModelT, names: str | Sequence[str]) -> ModelT:
    """Make these adapters the active ones: they add up and train; the others are frozen and unused.

    Raises:
        StateError: no adapter of that name, or a combination that cannot run together.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names)
    found = hosts(model)
    for name in wanted:
        require_adapter(model, name)
    for host in found.values():
        host.check_active(wanted)
    check_whole(model, wanted)
    for host in found.values():
        host.activate(wanted)
    _write_config(model)
    return model


@contextmanager
def disable(model: nn.Module) -> Iterator[None]:
    """Run the block with no adapter active: the base model, to the bit."""
    found = hosts(model)
    if not found:
        raise StateError("There is no adapter on this model to disable.")
    check_whole(model, ())
    before = [(host, host.active) for host in found.values()]
    for host, _ in before:
        host.use(())
    try:
        yield
    finally:
        for host, active in before:
            host.use(active)


def delete_adapter(model: ModelT, name: str) -> ModelT:
    """Remove one adapter; layers left without any become stock again.

    Raises:
        StateError: no adapter of that name.
    """
    require_adapter(model, name)
    check_whole(model, [other for other in adapter_names(model) if other != name])
    owners = _owners(model)
    for host in hosts(model).values():
        if name in host.parts:
            host.detach(name)
            if not host.parts:
                _replace(owners, host, host.base)
    state_of(model).recipes.pop(name, None)
    if not hosts(model):
        _forget(model)
    _write_config(model)
    return model


def merge(model: ModelT, *, reversible: bool = True, untie: bool = False) -> ModelT:
    """Fold the active adapters into stock layers. What a compressor left stays.

    Weight and update are summed in at least float32 and rounded once, to the layer's dtype. The result has
    no trace of this package: it saves, compiles and serves as the stock model.

    Args:
        model: a wrapped model.
        reversible: keep what was there, so that :func:`unmerge` gives it back to the bit; costs the memory
            of the adapted weights once more. Without it the adapters are gone.
        untie: break the tie where an adapted weight is shared (tied embeddings), and say so in the model's
            config; refused otherwise, because the merged weight would change the other user too.

    Raises:
        StateError: nothing to merge; a tied weight; adapters that would be lost.
    """
    state = state_of(model)
    if state.merged is not None:
        if reversible:
            raise StateError("The model is merged already. unmerge() it first, or merge(reversible=False).")
        _forget(model)
        return model
    found = hosts(model)
    idle = [name for name in adapter_names(model) if not any(name in h.active for h in found.values())]
    if idle and not reversible:
        raise StateError(
            f"merge(reversible=False) would lose the inactive adapters {idle}: delete_adapter() them."
        )
    ties.check_merge(model, found, ties.shared(stock_tensors(model)), untie)

    owners = _owners(model)
    for host in found.values():
        _replace(owners, host, host.merged())
    if untie:
        state.untied = ties.set_tied(model, False)
    _restore_trainable(model, state.trainable)
    if reversible:
        state.merged = found
    else:
        _forget(model)
    _write_config(model)
    return model


def cast_adapters(model: ModelT, dtype: str, name: str | None = None) -> ModelT:
    """Round the factors of LoRAs to a dtype, in place, and keep them in it: also on disk, and when reloaded.

    Half precision halves what they take. Train in ``"float32"`` and round at the end: steps of an optimiser
    are lost in half precision.

    Args:
        model: a wrapped model.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for what :func:`wrap` chooses.
        name: the adapter; by default all.

    Raises:
        StateError: no adapter of that name, or one without factors of its own.
        ConfigError: no such dtype.
    """
    state_of(model)
    if dtype not in get_args(FactorType):
        raise ConfigError(f"Factors are kept in one of {list(get_args(FactorType))}, but not in {dtype!r}.")
    if name is not None:
        require_adapter(model, name)
    found = [
        (host, other)
        for host in hosts(model).values()
        for other in host.parts
        if name in (None, other) and not isinstance(host, Copied)
    ]
    for host, other in found:
        if not hasattr(host.nodes[other], "dtype"):
            kind = host.nodes[other].kind
            raise StateError(f"The adapter {other!r} is a {kind!r}, whose numbers have no dtype to choose.")
    for host, other in found:
        node = dataclasses.replace(cast(Any, host.nodes[other]), dtype=dtype)
        shell = node.build(meta_twin(host.base))
        wanted = {key: tensor.dtype for key, tensor in shell.state_dict().items()}
        part = cast(Delta, host.parts[other])
        for key, tensor in (*part.named_parameters(), *part.named_buffers()):
            tensor.data = tensor.data.to(wanted[key])
        host.nodes[other] = part.node = node
    _write_config(model)
    return model


def merge_drift(model: nn.Module) -> dict[str, float]:
    """Return how far :func:`merge` would move each quantised layer: what rounding to its dtype adds.

    The relative Frobenius distance of the merged weight from the sum, in float64, of what is stored and what
    the active adapters add, by layer name. Zero but for rounding in float32; in half precision it can be
    as large as what training did.

    Raises:
        StateError: no adapter on a quantised layer.
    """
    found = {}
    for name, host in hosts(model).items():
        if not isinstance(host, Adapted) or not isinstance(host.base, Quantized) or not host.active:
            continue
        with torch.no_grad():
            exact = host.base.matrix(torch.float64)
            for delta in host.active:
                exact = exact + host.deltas[delta].weight().double()
            merged = layer_of(host.merged()).matrix().double()
            found[name] = float((merged - exact).norm() / exact.norm().clamp_min(1e-300))
    if not found:
        raise StateError("No quantised layer has an active adapter, so nothing would be merged into one.")
    return found


def requantize(model: ModelT, *, data: Any = None, tokenizer: Any = None, loss: Any = None) -> ModelT:
    """Merge the active adapters into the weights, and quantise those again as they were before.

    After training, an adapter of a quantised base becomes part of it; LQ-LoRA splits the sum anew. The last
    quantising stage runs again with its own options, and its report says what it left.

    Args:
        model: a model with a quantised base and adapters on it.
        data: calibration data, where that stage looks at any; see :func:`wrap`.
        tokenizer: turns texts in ``data`` into tokens.
        loss: what to differentiate.

    Raises:
        StateError: no stage has quantised the model, or there is no adapter to merge.
        ConfigError: data that is missing, or not looked at.
    """
    stages = stages_of(model)
    known = [s for s in stages if registry.methods[s["method"]].family is Family.QUANTIZER]
    if not known:
        raise StateError("No stage has quantised this model: wrap() it with a quantising method.")
    last, names = known[-1], adapter_names(model)
    cls = registry.methods[last["method"]]
    method = cls(configs.parse(cls.Config, last["options"], what=f"The method {cls.name!r}"))
    if bool(method.needs()) is (data is None):
        state = "looks at calibration data: pass data=" if method.needs() else "takes no calibration data"
        raise ConfigError(f"The method {cls.name!r} that quantised this model {state}.")
    merge(model, reversible=False)
    model.__dict__["_lowrank_ft_stages"] = [stage for stage in stages if stage is not last]
    where = {key: last[key] for key in ("targets", "exclude", "layers")}
    name = names[0] if method.trains else "default"
    return wrap(model, method.config, name=name, data=data, tokenizer=tokenizer, loss=loss, **where)


def unmerge(model: ModelT) -> ModelT:
    """Undo :func:`merge`: the same modules are back, so base and adapters are equal to the bit.

    Raises:
        StateError: nothing is merged.
    """
    state = state_of(model)
    if state.merged is None:
        raise StateError("Nothing is merged, or the merge was made permanent with reversible=False.")
    owners = _owners(model)
    modules = dict(model.named_modules())
    for name, host in state.merged.items():
        current = modules[name]
        where = next(current.parameters(), None)
        if where is not None:
            host.to(where.device)  # the model may have moved since
        _replace(owners, current, host.train(current.training))
    if state.untied:
        ties.set_tied(model, True)
        state.untied = False
    state.merged = None
    _freeze_base(model)
    _write_config(model)
    return model


def unload(model: ModelT) -> ModelT:
    """Take all adapters out: the model is what it was before the first wrap, to the bit.

    Raises:
        StateError: there is no adapter; the model is merged (its adapters are in the weights).
    """
    if state_of(model).merged is not None:
        raise StateError("The adapters are merged into the weights: unmerge() first, then unload().")
    check_whole(model, ())
    owners = _owners(model)
    for host in hosts(model).values():
        _replace(owners, host, host.base)
    _forget(model)
    _write_config(model)
    return model


# What other files ask of the engine -------------------------------------------------------------------------


def calibration_of(config: MethodConfig) -> Calibration | None:
    """Return how much data a method looks at with these options; None where it looks at none."""
    found: Calibration | None = getattr(config, "calibration", None)
    return found if _method_for(config).needs() else None


def trains(config: MethodConfig) -> bool:
    """Whether a method leaves an adapter."""
    return _method_for(config).trains


def hosts(model: nn.Module) -> dict[str, Host]:
    """Return the modules that carry adapters, by stock name, in module order."""
    return {name: module for name, module in replacements(model).items() if isinstance(module, Host)}


def compressed(model: nn.Module) -> list[str]:
    """Return the modules of which no stock one is left: replaced by more than a host of adapters."""
    found = replacements(model).items()
    return [n for n, m in found if not isinstance(m, Host) or m.base_node().kind != "dense"]


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters on a model, in the order they came."""
    return tuple(dict.fromkeys(name for host in hosts(model).values() for name in host.parts))


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters in force."""
    return tuple(dict.fromkeys(name for host in hosts(model).values() for name in host.active))


def digests(model: nn.Module) -> dict[str, str]:
    """Return a digest of what each adapter depends on and no checkpoint keeps, for those that have such."""
    found, carriers = {}, hosts(model)
    for name in adapter_names(model):
        digest = digest_of({path: host.parts[name] for path, host in carriers.items() if name in host.parts})
        if digest is not None:
            found[name] = digest
    return found


def check_digest(name: str, digest: str | None, expected: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` where an adapter's random bases are not those that it was saved with."""
    if digest != expected.get(name):
        raise CheckpointError(
            f"The adapter {name!r} was saved with other random bases than this package makes for it, so its "
            f"coefficients mean nothing here: use the release it was saved with."
        )


def check_whole(model: nn.Module, active: Collection[str]) -> None:
    """Raise ``StateError`` where an adapter that part of the weights lies in would not be active."""
    for name in _carrying(model):
        if name not in active:
            raise StateError(
                f"Part of the quantised weights lies in the adapter {name!r}, so the model is not whole "
                f"without it: keep it active beside others (set_adapter([{name!r}, …])), or merge() it."
            )


def carries(model: nn.Module) -> bool:
    """Whether part of the weights lies in an adapter, so that the model has no base without it."""
    return bool(_carrying(model))


def _carrying(model: nn.Module) -> list[str]:
    """The adapters that part of the weights lies in."""
    parts = [(name, part) for host in hosts(model).values() for name, part in host.parts.items()]
    return list(dict.fromkeys(name for name, part in parts if getattr(part, "carries", False)))


def require_adapter(model: nn.Module, name: str) -> None:
    """Raise ``StateError`` unless the model has an adapter of that name."""
    known = adapter_names(model)
    if name not in known:
        raise StateError(f"There is no adapter {name!r}.{did_you_mean(name, known)} Known: {list(known)}.")


def stock_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer of the base model by its stock name.

    Tied tensors come under each of their names; adapters and markers are left out.
    """
    found = {n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, Host)}
    tensors: dict[str, Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        host = next((name for name in _prefixes(key) if name in found), None)
        if host is None:
            tensors[key] = tensor
        elif key.startswith(f"{host}.base."):
            tensors[f"{host}.{key.removeprefix(f'{host}.base.')}"] = tensor
    return tensors


def _prefixes(key: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(1, len(parts)))


def frozen_keys(model: nn.Module) -> set[str]:
    """Return the keys of ``state_dict`` that no adapter owns: the base, which training leaves as it is."""
    found = hosts(model)
    base = tuple(f"{name}.base." for name in found)
    owned = tuple(f"{name}." for name in found)
    return {key for key in model.state_dict() if key.startswith(base) or not key.startswith(owned)}


def state_of(model: nn.Module) -> State:
    """Return what the engine remembers of a wrapped model.

    Raises:
        StateError: the model is not wrapped.
    """
    state = model.__dict__.get("_lowrank_ft")
    if not isinstance(state, State):
        raise StateError("This model has no adapter: wrap() or load() one first.")
    return state


def check_can_wrap(model: nn.Module, name: str) -> None:
    """Raise ``StateError`` or ``ConfigError`` where no adapter ``name`` can be put on the model."""
    if not _ADAPTER_NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"An adapter cannot be called {name!r}: use letters, digits, - and _ ('math-v2').")
    if name in adapter_names(model):
        raise StateError(
            f"The model already has an adapter {name!r}. Choose another name=, or delete_adapter() it."
        )
    check_whole(model, ())  # a new adapter becomes the only active one
    check_can_change(model)


def check_can_change(model: nn.Module) -> None:
    """Raise ``StateError`` where nothing can be put into the model as it is now."""
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
    if foreign is not None and not _is_ours(foreign):
        raise StateError(
            "The model is quantised by another library. Load it unquantised, or with bitsandbytes, whose "
            "linear layers wrap() takes over."
        )
    if find_layer(model) is not None:
        raise StateError(
            "The model is itself a single layer, which cannot be replaced in place: put it in a container."
        )


def replace(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of stock ones, by name: what stands around others before those.

    A container that stands there already stays, with what it holds.
    """
    outer = {name for name in new if any(other.startswith(f"{name}.") for other in new)}
    for names in (outer, new.keys() - outer):
        owners, modules = _owners(model), sites.stock_modules(model)
        for name, module in new.items():
            stands = isinstance(module, Container) and isinstance(modules[name], Container)
            if name in names and not stands:
                _replace(owners, modules[name], module)
    ties.rename(model)


@contextmanager
def multiplied_out(model: nn.Module) -> Iterator[None]:
    """Run the block with a stock layer of the stock size in the place of each compressed one.

    Raises:
        StateError: a bias where the stock model has none.
    """
    kinds = (Factored, Resized, Container, Quantized)
    found = {name: module for name, module in replacements(model).items() if isinstance(module, kinds)}
    extra = [name for name, module in found.items() if getattr(module, "adds_bias", False)]
    if extra:
        raise StateError(
            f"{extra[0]} has a bias that a stock {type(model).__name__} cannot hold ({len(extra)} such "
            f"layers): it came with centered=True, or with the values' bias folded into the output. Compress "
            f"without the one, or leave the value and output projections out."
        )
    with instead(model, {name: module.dense() for name, module in found.items()}):
        yield


@contextmanager
def instead(model: nn.Module, new: Mapping[str, nn.Module]) -> Iterator[None]:
    """Run the block with modules in the place of replaced ones, by name."""
    replaced = replacements(model)
    before = {name: replaced[name] for name in new}
    replace(model, new)
    _write_config(model)
    try:
        yield
    finally:
        replace(model, before)
        _write_config(model)


@contextmanager
def folded(model: nn.Module) -> Iterator[None]:
    """Run the block with the active adapters merged, if there are any."""
    merges = bool(hosts(model))
    if merges:
        merge(model)
    try:
        yield
    finally:
        if merges:
            unmerge(model)


def stages_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return what compressed a model, stage by stage: method, options, and facts on each layer.

    The facts are those of this process: a checkpoint keeps methods and options.
    """
    return list(model.__dict__.get("_lowrank_ft_stages", ()))


def recipes_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the stages without their facts."""
    return [{k: v for k, v in stage.items() if k != _FACTS} for stage in stages_of(model)]


def build(model: nn.Module, nodes: Mapping[str, Node], *, on_meta: bool = False) -> dict[str, nn.Module]:
    """Build an adapter's parts for the given stock modules, without touching the model.

    Args:
        model: the model they are for.
        nodes: structure by stock module name.
        on_meta: build shapes only, so that nothing is allocated on a stranger's word.

    Raises:
        TargetError: a name the model lacks, or a module that cannot be adapted or lies inside one that
            another adapter trains in full.
        StateError: a weight that is not loaded yet.
    """
    modules = sites.stock_modules(model)
    taken = hosts(model)
    built: dict[str, nn.Module] = {}
    for path, node in nodes.items():
        if path not in modules:
            raise TargetError(f"The model has no module {path!r}.{did_you_mean(path, modules)}")
        inside = [other for other in _prefixes(path) if other in taken or other in nodes]
        around = [other for other in taken if other.startswith(f"{path}.")]
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
        host = taken.get(path)
        if host is not None and isinstance(host, Copied) is not isinstance(node, CopyNode):
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
    """Put built parts into the model under the adapter ``name``, make it the active one, freeze the rest."""
    if "_lowrank_ft" not in model.__dict__:
        model.__dict__["_lowrank_ft"] = State(_trainable(model))
    modules, existing, owners = sites.stock_modules(model), hosts(model), _owners(model)
    for path, part in parts.items():
        host = existing.get(path)
        if host is None:
            host = Copied(modules[path]) if isinstance(nodes[path], CopyNode) else Adapted(modules[path])
            _replace(owners, modules[path], host)
        host.attach(name, nodes[path], part)
    for host in hosts(model).values():
        host.activate((name,))
    state_of(model).recipes[name] = recipe
    _freeze_base(model)
    _write_config(model)


def restore_structure(model: nn.Module, nodes: Mapping[str, Node]) -> None:
    """Build a manifest's modules on an empty model, in place of the stock ones (for ``from_pretrained``).

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


def restore_state(
    model: nn.Module,
    active: Sequence[str],
    recipes: dict[str, dict[str, Any]],
    stages: Sequence[dict[str, Any]],
    expected: Mapping[str, Any],
) -> None:
    """Make a model built by :func:`restore_structure`, its weights loaded, like one just wrapped.

    Raises:
        CheckpointError: an adapter depends on something that is not what it was (``expected``, by adapter).
    """
    for name, digest in digests(model).items():
        check_digest(name, digest, expected)
    if stages:
        model.__dict__["_lowrank_ft_stages"] = list(stages)
    if hosts(model):
        trainable = frozenset(stock_tensors(model))
        model.__dict__["_lowrank_ft"] = State(trainable, recipes)
        set_adapter(model, active)
        _freeze_base(model)
    _write_config(model)


def replaced_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of replaced modules by their names in the model."""
    prefixes = tuple(f"{name}." for name in replacements(model))
    return {key: t for key, t in model.state_dict(keep_vars=True).items() if key.startswith(prefixes)}


def keep_adapters_in_float32(model: nn.Module) -> None:
    """Ask transformers not to cast adapters down when it loads a model in half precision."""
    adapted = [
        f"{name}.parts.{adapter}."
        for name, host in hosts(model).items()
        for adapter, node in host.nodes.items()
        if isinstance(host, Adapted) and getattr(node, "dtype", "auto") in ("auto", "float32")
    ]
    if adapted and hasattr(model, "_keep_in_fp32_modules_strict"):
        ours = {re.escape(name) for name in adapted}
        theirs: set[str] = set(cast(Any, model)._keep_in_fp32_modules_strict or ())
        cast(Any, model)._keep_in_fp32_modules_strict = theirs | ours


# Steps ------------------------------------------------------------------------------------------------------


def _stages(
    method: str | MethodConfig | Sequence[MethodConfig], options: Mapping[str, Any]
) -> list[Method[Any]]:
    """Turn what ``wrap`` was given into methods with checked configs, in an order that can be applied."""
    if isinstance(method, str):
        cls = registry.methods[method]
        return [cls(configs.parse(cls.Config, options, what=f"The method {method!r}"))]
    if options:
        names = ", ".join(options)
        raise ConfigError(
            f"Pass {names} in the config object, or the method by name with options as keywords."
        )
    given = [method] if isinstance(method, MethodConfig) else list(method)
    if not given:
        raise ConfigError("The list of methods is empty.")
    stages = [_method_for(config) for config in given]
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
            return cls(configs.parse(cls.Config, configs.to_dict(config), what=f"The method {cls.name!r}"))
    raise ConfigError(f"{config!r} is not the config of a registered method ({', '.join(registry.methods)}).")


def _put(model: nn.Module, stage: Method[Any], where: Mapping[str, Any], name: str, source: Source) -> None:
    """Apply one stage to the layers that are targeted."""
    chosen = stage.sites(model, sites.select(model, where["targets"], where["exclude"], where["layers"]))
    recipe = {
        "method": stage.name,
        "options": configs.to_dict(stage.config),
        **{key: configs.plain(value) for key, value in where.items()},
    }
    change = _adapt if stage.family is Family.ADAPTER else _compress
    change(model, stage, chosen, name, recipe, source)


def _adapt(
    model: nn.Module,
    method: Method[Any],
    chosen: list[sites.Site],
    name: str,
    recipe: dict[str, Any],
    source: Source,
) -> None:
    """Put an adapter on: statistics, plan, structure, build, values, and only then change the model."""
    from lowrank_ft import pipeline  # it needs this module

    nodes: dict[str, Node] = {}
    if isinstance(method.config, AdapterConfig):
        targets = {name for site in chosen for name in site.names}
        nodes.update(_copies(model, method.config.modules_to_save, targets))
    with pipeline.statistics(model, method, chosen, source) as known:
        for site, share in zip(chosen, method.plan(chosen, known, Counts(0, 0)), strict=True):
            nodes.update(method.structure(site, share))
        parts = build(model, nodes)
        for site in tqdm(chosen, desc="Starting", unit="layer", leave=False, disable=not known):
            method.values(site, {path: parts[path] for path in site.names}, known)
    commit(model, name, nodes, parts, recipe)


def _compress(
    model: nn.Module,
    method: Method[Any],
    chosen: list[sites.Site],
    name: str,
    recipe: dict[str, Any],
    source: Source,
) -> None:
    from lowrank_ft import pipeline

    trainable, copies = _trainable(model), dict[str, Node]()
    if isinstance(method.config, AdapterConfig):
        targets = {name for site in chosen for name in site.names}
        copies = _copies(model, method.config.modules_to_save, targets)
    facts = pipeline.compress(model, method, chosen, source, name)
    model.__dict__["_lowrank_ft_stages"] = [*stages_of(model), {**recipe, _FACTS: facts}]
    if method.trains:  # its adapter is there already, but for the modules to train in full
        model.__dict__["_lowrank_ft"] = State(trainable)
        commit(model, name, copies, build(model, copies), recipe)
    _write_config(model)


def _trainable(model: nn.Module) -> frozenset[str]:
    named = model.named_parameters(remove_duplicate=False)  # a tie may be broken later
    return frozenset(n for n, p in named if p.requires_grad)


def _copies(model: nn.Module, patterns: Sequence[str], adapted: Collection[str]) -> dict[str, Node]:
    """Copies of the modules to train in full, and of the batch norms, whose statistics move in training."""
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


def _owners(model: nn.Module) -> Owners:
    """Return, for each module, every place that holds it: a module can have several names."""
    owners: Owners = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                owners.setdefault(id(child), []).append((parent, attribute))
    return owners


def _replace(owners: Owners, old: nn.Module, new: nn.Module) -> None:
    for parent, attribute in owners[id(old)]:
        parent._modules[attribute] = new


def _freeze_base(model: nn.Module) -> None:
    ours = {id(p) for host in hosts(model).values() for p in host.parts.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            parameter.requires_grad_(False)


def _restore_trainable(model: nn.Module, names: frozenset[str]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(name in names)


def _forget(model: nn.Module) -> None:
    """Drop the state of a model that has no adapter left, giving its parameters their flags back."""
    _restore_trainable(model, state_of(model).trainable)
    del model.__dict__["_lowrank_ft"]


def _write_config(model: nn.Module) -> None:
    """Keep the manifest in a transformers config, so that the user's own ``save_pretrained`` can reload."""
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
    elif _is_ours(getattr(config, "quantization_config", None)):
        del config.quantization_config
    ties.rename(model)


def _is_ours(quantization_config: Any) -> bool:
    if isinstance(quantization_config, Mapping):
        return quantization_config.get("quant_method") == QUANT_METHOD
    return getattr(quantization_config, "quant_method", None) == QUANT_METHOD
