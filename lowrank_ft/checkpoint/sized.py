"""Exports for tools without this package: smaller MLPs, of one width or of one width for each block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn

from lowrank_ft import engine
from lowrank_ft.anatomy import layouts, sites
from lowrank_ft.checkpoint import native
from lowrank_ft.errors import StateError, TargetError
from lowrank_ft.modules.host import Host
from lowrank_ft.modules.layer import layer_of
from lowrank_ft.modules.resized import Resized
from lowrank_ft.structure.manifest import replacements

_DECI_STEP = 256  # DeciLM rounds the width that it works out from `ffn_mult` up to a multiple of this


def export_uniform(model: nn.Module, directory: Path, tokenizer: Any) -> None:
    """Write a stock model with a smaller MLP, the same in every block; any tool loads it.

    Raises:
        StateError: parts of the model that a stock config cannot hold, all of them named.
    """
    layout, widths = _widths(model, "hf-uniform")
    problems = _other_parts(model)
    if len(set(widths.values())) > 1:
        problems.append(
            f"MLPs of {len(set(widths.values()))} widths, from {min(widths.values())} to "
            f"{max(widths.values())} (allocation='uniform' gives one width)"
        )
    if not layout.width:
        problems.append("a width that this family's config has no option for")
    _refuse(problems, "hf-uniform")
    with engine.folded(model), _trimmed(model), _option(model, layout.width, next(iter(widths.values()))):
        native.save_model(model, directory, tokenizer, None)


def export_deci(model: nn.Module, directory: Path, tokenizer: Any) -> None:
    """Write a Llama whose MLPs differ as the DeciLM layout that vLLM and llama.cpp read (``block_configs``).

    Not verified against either.

    Raises:
        StateError: parts that the layout cannot hold, all of them named.
    """
    _, widths = _widths(model, "deci")
    problems = _other_parts(model)
    odd = sorted({width for width in widths.values() if width % _DECI_STEP})
    if odd:
        problems.append(f"MLP widths that are no multiples of {_DECI_STEP}: {odd} (align={_DECI_STEP})")
    config = cast(Any, model).config
    if config.model_type not in ("llama", "mistral"):
        problems.append(f"the family {config.model_type!r}: the layout is Llama's")
    _refuse(problems, "deci")
    attention = {"n_heads_in_group": config.num_attention_heads // config.num_key_value_heads}
    blocks = [
        {
            "attention": {**attention, "no_op": False, "replace_with_linear": False},
            # Half a column less, so that rounding up gives the width despite the division's rounding.
            "ffn": {
                "ffn_mult": 3 * (width - 0.5) / (2 * config.hidden_size),
                "no_op": False,
                "replace_with_linear": False,
            },
        }
        for _, width in sorted(widths.items())
    ]
    changes = {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "block_configs": blocks}
    with engine.folded(model), _trimmed(model):
        native.save_model(model, directory, tokenizer, None, {**changes, "intermediate_size": None})


def _widths(model: nn.Module, format: str) -> tuple[layouts.Layout, dict[int, int]]:
    """The width of each block's MLP."""
    try:
        layout = layouts.layout_of(model)
    except TargetError as error:
        raise StateError(f"The format {format!r} cannot hold this model. {error}") from error
    modules = sites.stock_modules(model)
    widths = {
        cast(int, layouts.block_index(name)): layer_of(module).in_features
        for name, module in modules.items()
        if name in layouts.mlp_of(layout, name, modules)[-1:]
    }
    return layout, widths


def _other_parts(model: nn.Module) -> list[str]:
    """The replaced modules that are not resized MLPs, by kind."""
    kinds: dict[str, list[str]] = {}
    layout, names = layouts.layout_of(model), sites.stock_modules(model)
    for name, module in replacements(model).items():
        part = module.base if isinstance(module, Host) else module
        if isinstance(part, Resized) and layouts.mlp_of(layout, name, names) and not part.adds_bias:
            continue
        if part is not module and not hasattr(part, "structure"):
            continue  # an adapter on a stock layer is folded in
        kinds.setdefault(cast(Any, part).structure().kind, []).append(name)
    return [f"{len(names)} {kind!r} modules ({names[0]} …)" for kind, names in kinds.items()]


def _refuse(problems: list[str], format: str) -> None:
    if problems:
        raise StateError(f"The format {format!r} cannot hold: {'; '.join(problems)}.")


@contextmanager
def _trimmed(model: nn.Module) -> Iterator[None]:
    resized = {name: m for name, m in replacements(model).items() if isinstance(m, Resized)}
    with engine.instead(model, {name: module.trimmed() for name, module in resized.items()}):
        yield


@contextmanager
def _option(model: nn.Module, name: str, value: int) -> Iterator[None]:
    config = cast(Any, model).config
    before = getattr(config, name)
    setattr(config, name, value)
    try:
        yield
    finally:
        setattr(config, name, before)
