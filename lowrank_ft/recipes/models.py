"""Loading models, tokenizers and image processors for the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lowrank_ft import checkpoint
from lowrank_ft.checkpoint import loading
from lowrank_ft.errors import ConfigError


def device_of(name: str) -> torch.device:
    """Return the device of a config's name; "auto" is the GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_causal_lm(path: str, dtype: str, device: str, adapter: str | None = None) -> tuple[nn.Module, Any]:
    """Return a causal language model, with an adapter on it if asked, and its tokenizer.

    Raises:
        ConfigError: a local path that is not there.
    """
    from transformers import AutoModelForCausalLM

    loading.check_path(path)
    tokenizer = loading.load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=loading.dtype_of(dtype))
    if adapter is not None:
        checkpoint.load(model, adapter)
    return model.to(device_of(device)), tokenizer


def load_classifier(path: str, dtype: str, classes: Sequence[str], pad_token_id: int) -> nn.Module:
    """Return a sequence classifier with one output a class, its head new where the model has no such one.

    Raises:
        ConfigError: a local path that is not there; a model whose other weights do not fit either.
    """
    from transformers import AutoModelForSequenceClassification

    loading.check_path(path)
    model: Any = loading.with_head(AutoModelForSequenceClassification, path, dtype, dict(enumerate(classes)))
    model.config.pad_token_id = pad_token_id
    return model  # type: ignore[no-any-return]


def load_image_classifier(path: str, dtype: str, classes: Sequence[str]) -> nn.Module:
    """Return an image classifier with one output a class, its head new where the model has no such one.

    Raises:
        ConfigError: a local path that is not there; a model that is none for images, does not take three
            channels, or whose other weights do not fit either.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    loading.check_path(path)
    config = AutoConfig.from_pretrained(path)
    if type(config) not in AutoModelForImageClassification._model_mapping:
        raise ConfigError(
            f"{path} is a {config.model_type!r} model, which transformers has no image classifier for."
        )
    channels = getattr(config, "num_channels", 3)
    if channels != 3:
        raise ConfigError(f"{path} takes images of {channels} channels, and only 3 are supported.")
    model: nn.Module = loading.with_head(
        AutoModelForImageClassification, path, dtype, dict(enumerate(classes))
    )
    return model
