"""Saving, loading and exporting: the verbs, and where each directory goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lowrank_ft import engine
from lowrank_ft.checkpoint import files, native, peft, sized
from lowrank_ft.errors import ConfigError, StateError, did_you_mean

ModelT = TypeVar("ModelT", bound=nn.Module)


def save(
    model: nn.Module,
    dir: str | Path,
    *,
    name: str | None = None,
    tokenizer: Any = None,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's adapters, or the whole model, to a directory: all of it or nothing.

    Adapters on an untouched base give an adapter directory (one safetensors file, ``lowrank_ft.json``, a
    model card). Anything else (a merged model, say) gives a whole-model directory, which for transformers
    models ``from_pretrained`` loads.

    Args:
        model: the model.
        dir: replaced if it holds a checkpoint of ours; refused if it holds anything else.
        name: save this adapter alone.
        tokenizer: saved alongside.
        figures: measured values for the model card.

    Raises:
        CheckpointError: the directory cannot be written; nothing was changed then.
        StateError: no adapter of that name, or one with NaN in it.
    """
    only_adapters = bool(engine.hosts(model)) and not engine.compressed(model)
    if name is not None:
        engine.require_adapter(model, name)
        if not only_adapters:
            raise StateError(
                f"The base is compressed, so the model is saved whole, with all its adapters: leave out "
                f"name={name!r}, or delete_adapter() the others."
            )
    if only_adapters:
        names = engine.adapter_names(model) if name is None else (name,)
        native.save_adapters(model, Path(dir), names, tokenizer, figures)
    else:
        native.save_model(model, Path(dir), tokenizer, figures)


def load(model: ModelT, dir: str | Path, name: str | None = None, *, check_base: bool = True) -> ModelT:
    """Put adapters (ours, or PEFT's LoRA) or a whole model from a directory onto a fresh base.

    Everything is checked before the model is touched: checksums, names, shapes, and that the base is the
    one the adapter was made for. A loaded adapter is active and trainable, as after :func:`wrap`.

    Args:
        model: the base model, with its weights; it may carry other adapters.
        dir: what :func:`save` wrote, or a PEFT LoRA directory.
        name: the name to give a single adapter; of several, the one to load.
        check_base: refuse a base with other weights. Turn it off to put an adapter on a relative.

    Raises:
        CheckpointError: the directory is damaged, unsafe, or for another base.
        StateError: the name is taken.
    """
    directory = Path(dir)
    if peft.is_adapter(directory):
        peft.load(model, directory, name or "default")
    else:
        native.load(model, directory, name, check_base)
    return model


FORMATS = {
    "dense": native.export_dense,
    "hf-uniform": sized.export_uniform,
    "deci": sized.export_deci,
}


def export(
    model: nn.Module,
    dir: str | Path,
    format: str = "peft",
    *,
    tokenizer: Any = None,
    rank: int | None = None,
) -> dict[str, Any]:
    """Write a model in a form that tools without this package read. The model is left as it was.

    ``"peft"``: the active adapter as a PEFT LoRA on the unmodified base. ``"dense"``: the whole model with
    its adapters folded in, as plain Hugging Face weights of the stock sizes (what was resized is filled up
    with zeros). ``"hf-uniform"``: a stock model with smaller MLPs, where all have one width and nothing else
    was compressed. ``"deci"``: MLPs of several widths as DeciLM's ``block_configs``.

    Args:
        model: a wrapped model.
        dir: an empty or new directory, or an earlier export.
        format: one of these.
        tokenizer: saved alongside.
        rank: for ``"peft"``: replace updates of a larger rank (PiSSA, OLoRA and CorDA have twice theirs) by
            the nearest of this one.

    Returns:
        Facts on what was written: with ``rank``, the ``"relative error"`` of the update.

    Raises:
        ConfigError: an unknown format; a rank for a format that has none.
        StateError: the model has nothing that this format could hold; the message says what.
    """
    check_format(format)
    if rank is not None and (format != "peft" or rank < 1):
        raise ConfigError(f"rank={rank} is for format='peft', and at least 1: leave it out for {format!r}.")
    if format == "peft":
        return peft.export(model, Path(dir), tokenizer, rank)
    FORMATS[format](model, Path(dir), tokenizer)
    return {}


def check_format(format: str) -> None:
    """Raise ``ConfigError`` for a format that :func:`export` does not know."""
    formats = ["peft", *FORMATS]
    if format not in formats:
        raise ConfigError(
            f"There is no export format {format!r}.{did_you_mean(format, formats)} Known: {formats}."
        )


def base_of(dir: Path) -> dict[str, Any]:
    """Return what identifies the base of a checkpoint; empty for PEFT's, which do not say.

    Raises:
        CheckpointError: the directory is damaged or not a checkpoint.
    """
    return {} if peft.is_adapter(dir) else dict(files.read_index(dir)["base"])
