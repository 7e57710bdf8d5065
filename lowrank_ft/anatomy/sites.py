"""Selecting the layers that a method acts on: by name, glob, regular expression, or ``"all-linear"``."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from lowrank_ft.anatomy import layouts
from lowrank_ft.errors import TargetError, did_you_mean
from lowrank_ft.modules.host import Host
from lowrank_ft.modules.layer import Layer, find_layer, layer_of
from lowrank_ft.structure.replacement import Container, Replacement

T = TypeVar("T")

KEYWORDS: dict[str, tuple[str, ...]] = {
    "all-linear": ("linear", "transposed-linear"),
    "all-conv": ("conv", "transposed-conv"),
    "all-embedding": ("embedding",),
}


@dataclass(frozen=True)
class Site:
    """One place where a method acts: a layer, or a coupled group such as an MLP.

    Attributes:
        names: names of the modules in the stock model.
        modules: the modules themselves, in the same order.
        role: the function of this part in the model (``layouts.ROLES``).
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    role: str

    @property
    def name(self) -> str:
        """The name of its first layer; options, journals and reports use it for the whole site."""
        return next(iter(self.layers))

    @property
    def layers(self) -> dict[str, nn.Module]:
        """The modules that carry a weight, by name."""
        pairs = zip(self.names, self.modules, strict=True)
        return {name: module for name, module in pairs if find_layer(module) is not None}


@dataclass(frozen=True)
class Targets:
    """A selection of layers; :func:`select` explains the fields."""

    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    layers: int | Sequence[int] | None = None

    def select(self, model: nn.Module) -> list[Site]:
        """Return one site for each selected layer; see :func:`select`."""
        return select(model, self.targets, self.exclude, self.layers)


def stock_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of ``model`` by their names in the stock model.

    For a host of adapters its base is returned, under the host's name. The root is left out.
    """
    modules: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, name: str) -> None:
        if isinstance(module, Host):
            module = module.base
        if id(module) in seen:
            return
        seen.add(id(module))
        if name:
            modules[name] = module
        if isinstance(module, Replacement) and not isinstance(module, Container):
            return  # a compressed layer counts as one layer; its parts are not listed
        for child_name, child in module.named_children():
            visit(child, f"{name}.{child_name}" if name else child_name)

    visit(model, "")
    return modules


def select(
    model: nn.Module,
    targets: str | Sequence[str] = "all-linear",
    exclude: str | Sequence[str] = (),
    layers: int | Sequence[int] | None = None,
) -> list[Site]:
    r"""Return one site for each layer that ``targets`` match, in module order.

    A target is a keyword (``"all-linear"``, ``"all-conv"``, ``"all-embedding"``; these never reach into
    the head), a name or the end of one (``"q_proj"``, ``"self_attn.q_proj"``), a glob on the full name
    (``"*.layers.1?.mlp.*"``), or a regular expression for the full name (``"re:.*\.(q|v)_proj"``).

    Args:
        model: any module, with or without adapters on it.
        targets: one target or several; a layer is taken if any matches.
        exclude: patterns of layers to leave out.
        layers: block indices to keep (the first number in the name); negative ones count from the end.

    Raises:
        TargetError: a pattern matches nothing (the nearest names are suggested); a target is not a layer that
            can be adapted; a block index does not exist; no layer is left.
    """
    modules = stock_modules(model)
    read_directly = _read_directly(modules)
    heads = layouts.head_names(model)
    names: set[str] = set()
    for target in _as_tuple(targets):
        names |= _matches(target, modules, heads, read_directly)
    for pattern in _as_tuple(exclude):
        names -= _excluded(pattern, modules)
    if layers is not None:
        names = _in_blocks(names, (layers,) if isinstance(layers, int) else layers)
    if not names:
        raise TargetError(f"targets={targets!r} with exclude={exclude!r} leaves no layer to act on.")
    return [
        Site((name,), (module,), layouts.role_of(name, module))
        for name, module in modules.items()
        if name in names
    ]


def matches(pattern: str, name: str) -> bool:
    """Whether a name, name ending, glob, or ``re:`` expression matches a full module name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


def lookup(patterns: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of the first pattern that matches ``name``."""
    return next((value for pattern, value in patterns.items() if matches(pattern, name)), default)


def check_patterns(patterns: Iterable[str], names: Sequence[str], what: str) -> None:
    """Raise ``TargetError`` for the first pattern that matches none of ``names``."""
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise TargetError(
                f"{what} {pattern!r} matches none of the targeted layers. {_nearest(pattern, names)}"
            )


def find_modules(model: nn.Module, patterns: Sequence[str], what: str) -> dict[str, nn.Module]:
    """Return the outermost modules (not only layers) that patterns match.

    Raises:
        TargetError: a pattern that matches nothing.
    """
    modules = stock_modules(model)
    outermost: dict[str, nn.Module] = {}
    for pattern in patterns:
        hits = {n: m for n, m in modules.items() if matches(pattern, n)}
        if not hits:
            raise TargetError(f"{what} {pattern!r} matches no module. {_nearest(pattern, list(modules))}")
        outermost.update(hits)
    return {n: m for n, m in outermost.items() if not any(n.startswith(f"{other}.") for other in outermost)}


def _matches(
    target: str, modules: Mapping[str, nn.Module], heads: frozenset[str], read_directly: frozenset[str]
) -> set[str]:
    if target in KEYWORDS:
        return _keyword(target, modules, heads, read_directly)
    if target.startswith("all-"):
        raise TargetError(f"There is no target keyword {target!r}.{did_you_mean(target, KEYWORDS)}")
    hits = {name for name in modules if _guarded(matches, target, name)}
    adaptable = {name for name in hits if find_layer(modules[name]) is not None}
    exact = not target.startswith("re:") and not any(c in target for c in "*?[")
    if not hits or (not adaptable and not exact):
        layers = [name for name, module in modules.items() if find_layer(module) is not None]
        raise TargetError(f"The target {target!r} matches no layer. {_nearest(target, layers)}")
    if exact:  # a plain name must match layers only; a glob may match other modules too
        for name in sorted(hits):
            layer_of(modules[name], name)
    for name in sorted(adaptable & read_directly):
        raise TargetError(
            f"{name} is read by its nn.MultiheadAttention without being called, so an adapter on it would "
            f"have no effect. Exclude it."
        )
    return adaptable


def _keyword(
    target: str, modules: Mapping[str, nn.Module], heads: frozenset[str], read_directly: frozenset[str]
) -> set[str]:
    kinds = KEYWORDS[target]
    layers: dict[str, Layer] = {n: v for n, m in modules.items() if (v := find_layer(m)) is not None}
    hits = {name for name, layer in layers.items() if layer.kind in kinds}
    kept = {n for n in hits if not _is_inside(n, heads)} - read_directly
    if not kept:
        counts = {
            k: sum(v.kind in KEYWORDS[k] and not _is_inside(n, heads) for n, v in layers.items())
            for k in KEYWORDS
        }
        others = (
            ", ".join(f"{k!r} would match {count}" for k, count in counts.items() if count)
            or "no keyword would"
        )
        left_out = f" {sorted(hits)} belong to the head: name them to adapt them." if hits else ""
        raise TargetError(f"{target!r} matches no layer of this model ({others}).{left_out}")
    return kept


def _excluded(pattern: str, modules: Mapping[str, nn.Module]) -> set[str]:
    if pattern in KEYWORDS:
        return {n for n, m in modules.items() if (v := find_layer(m)) and v.kind in KEYWORDS[pattern]}
    hits = [name for name in modules if _guarded(matches, pattern, name)]
    if not hits:
        raise TargetError(f"exclude={pattern!r} matches no module. {_nearest(pattern, list(modules))}")
    return {name for name in modules if _is_inside(name, hits)}


def _in_blocks(names: set[str], layers: Sequence[int]) -> set[str]:
    present = {index for name in names if (index := layouts.block_index(name)) is not None}
    count = max(present, default=-1) + 1
    requested = {index + count if index < 0 else index for index in layers}
    missing = sorted(requested - present)
    if missing or not requested:
        raise TargetError(
            f"layers={list(layers)} asks for blocks {missing}, but the targets lie in {sorted(present)}."
        )
    return {name for name in names if layouts.block_index(name) in requested}


def _read_directly(modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """The names of layers whose parent uses their weight without calling them."""
    return frozenset(f"{n}.out_proj" for n, m in modules.items() if isinstance(m, nn.MultiheadAttention))


def _is_inside(name: str, containers: Iterable[str]) -> bool:
    return any(name == c or name.startswith(f"{c}.") for c in containers)


def _guarded(test: Callable[[str, str], bool], pattern: str, name: str) -> bool:
    try:
        return test(pattern, name)
    except re.error as error:
        raise TargetError(f"{pattern!r} is not a regular expression: {error}.") from None


def _nearest(pattern: str, names: Sequence[str]) -> str:
    """Return a sentence with the nearest names, and the endings of all names."""
    endings = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
    close = did_you_mean(pattern, endings) or did_you_mean(pattern, names)
    shown = ", ".join(endings[:20]) + (", …" if len(endings) > 20 else "")
    return f"{close} The names in this model end in: {shown}.".strip()


def _as_tuple(value: str | Sequence[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
