"""Loading models and tokenizers for the recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_ft import checkpoint
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


def device_of(name: str) -> torch.device:
    """Return the device of a config's name; "auto" is the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_tokenizer(path: str) -> Any:
    """Return a tokenizer that can pad (with the end-of-text token where it has no padding token)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(path: str, dtype: str, device: str, adapter: str | None = None) -> tuple[nn.Module, Any]:
    """Return a causal language model, with an adapter on it if asked, and its tokenizer.

    Raises:
        ConfigError: a local path that is not there.
    """
    from transformers import AutoModelForCausalLM

    check_path(path)
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype_of(dtype))
    if adapter is not None:
        checkpoint.load(model, adapter)
    return model.to(device_of(device)), tokenizer


def load_classifier(path: str, dtype: str, classes: list[Any], pad_token_id: int) -> nn.Module:
    """Return a sequence classifier with one output a class, its head new where the model has none."""
    from transformers import AutoModelForSequenceClassification

    check_path(path)
    labels = label_options({i: str(label) for i, label in enumerate(classes)})
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=dtype_of(dtype), **labels)
    model.config.pad_token_id = pad_token_id
    return model  # type: ignore[no-any-return]


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
    cls = _class_named(checkpoint.base_of(Path(directory)).get("class", ""))
    return cls.from_pretrained(directory, dtype=dtype_of(dtype))  # type: ignore[no-any-return]


def _class_named(name: str) -> Any:
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None:
        raise CheckpointError(f"The checkpoint was made for a {name!r}, which transformers does not have.")
    return cls


def load_any(path: str, adapter: str | None, dtype: str) -> tuple[nn.Module, Any]:
    """Return the base model that an adapter was made for, with the adapter on it, and a tokenizer if any.

    Without an adapter, the model in ``path`` as it was saved, compressed or not.

    Raises:
        ConfigError: a local path that is not there.
        CheckpointError: the adapter was made for a class that transformers does not have.
    """
    check_path(path)
    if adapter is None:
        model = load_whole(path, dtype)
    else:
        base = checkpoint.base_of(Path(adapter))
        cls = _class_named(base.get("class", "AutoModelForCausalLM"))
        labels = label_options(base["labels"]) if base.get("labels") else {}
        model = cls.from_pretrained(path, dtype=dtype_of(dtype), **labels)
        checkpoint.load(model, adapter)
    try:
        return model, load_tokenizer(path)
    except (OSError, ValueError):
        return model, None  # vision models have none
