"""Load the model that a checkpoint was made for, with its class, base weights and adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_ft.anatomy import layouts
from lowrank_ft.checkpoint.verbs import base_of, load
from lowrank_ft.errors import CheckpointError, ConfigError, did_you_mean

_DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_of(name: str) -> Any:
    """Return the torch dtype of a config's name, or "auto".

    Raises:
        ConfigError: no such dtype.
    """
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not one of {list(_DTYPES)}.{did_you_mean(name, _DTYPES)}")
    return _DTYPES[name]


def load_tokenizer(path: str) -> Any:
    """Return a tokenizer that can pad (with the end-of-text token where it has no padding token)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_head(cls: Any, path: str, dtype: str, names: Mapping[Any, str]) -> Any:
    """Load a classifier. Its head, and nothing else, may differ in size from the saved one."""
    model, loading = cls.from_pretrained(
        path,
        dtype=dtype_of(dtype),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **label_options(names),
    )
    heads = tuple(f"{name}." for name in layouts.head_names(model))
    wrong = sorted(str(key) for key, *_ in loading["mismatched_keys"] if not key.startswith(heads))
    if wrong:
        raise ConfigError(f"{path} does not fit its own config: {wrong[0]} and {len(wrong) - 1} more differ.")
    return model


def label_options(labels: Mapping[Any, str]) -> dict[str, Any]:
    """Return ``from_pretrained``'s options for a classifier with these classes."""
    names = {int(i): name for i, name in labels.items()}
    return {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}


def check_path(path: str) -> None:
    """Raise ``ConfigError`` for what looks like a local directory and is not there."""
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ConfigError(f"There is no model at {path}.")


def load_whole(directory: str, dtype: str) -> nn.Module:
    """Return a model from a whole-model directory, by plain ``from_pretrained`` of the class that was saved.

    Raises:
        CheckpointError: the directory is damaged, or of a class that transformers does not have.
    """
    cls = _class_named(base_of(Path(directory)).get("class", ""))
    return cls.from_pretrained(directory, dtype=dtype_of(dtype))  # type: ignore[no-any-return]


def _class_named(name: str) -> Any:
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None:
        raise CheckpointError(f"The checkpoint was made for a {name!r}, which transformers does not have.")
    return cls


def load_any(path: str, adapter: str | None, dtype: str) -> tuple[nn.Module, Any]:
    """Return the base model that an adapter was made for, with the adapter on it, and its processor.

    That is the tokenizer or image processor, or None. An image processor that was saved beside the adapter
    goes before the model's: it has the size that was trained on.

    Without an adapter, the model in ``path`` as it was saved, compressed or not.

    Raises:
        ConfigError: a local path that is not there.
        CheckpointError: the adapter was made for a class that transformers does not have.
    """
    check_path(path)
    if adapter is None:
        model = load_whole(path, dtype)
    else:
        base = base_of(Path(adapter))
        cls = _class_named(base.get("class", "AutoModelForCausalLM"))
        if base.get("labels"):
            model = with_head(cls, path, dtype, base["labels"])
        else:
            model = cls.from_pretrained(path, dtype=dtype_of(dtype))
        load(model, adapter)
    return model, _processor((adapter, path) if adapter else (path,), model)


def _processor(directories: Sequence[str], model: nn.Module) -> Any:
    """The tokenizer or image processor of the first directory that has one, or None."""
    from transformers import AutoImageProcessor

    is_visual = getattr(model, "main_input_name", "") == "pixel_values"
    read = AutoImageProcessor.from_pretrained if is_visual else load_tokenizer
    for directory in directories if is_visual else directories[-1:]:
        try:
            return read(directory)
        except (ImportError, OSError, ValueError):
            continue
    return None
