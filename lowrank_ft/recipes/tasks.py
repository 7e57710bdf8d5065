"""The tasks: for each its model, its examples, and how examples become batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowrank_ft.checkpoint import loading
from lowrank_ft.recipes import data, images, models
from lowrank_ft.recipes.data import Collate, DataConfig


@dataclass(frozen=True)
class Prepared:
    """The model and the data of a task.

    Attributes:
        model: the base model, for a classifier with a head of the right size.
        processor: the tokenizer or image processor, saved beside the adapter.
        train: examples to train on.
        held_out: examples to measure on.
        collate: makes a batch of examples.
        classes: names of the classes; empty for language modelling.
    """

    model: nn.Module
    processor: Any
    train: Any
    held_out: Any
    collate: Collate
    classes: list[str]


Prepare = Callable[[str, str, DataConfig, Any, Any], Prepared]


def _language_model(path: str, dtype: str, config: DataConfig, train: Any, held_out: Any) -> Prepared:
    model, tokenizer = models.load_causal_lm(path, dtype, "cpu")
    return Prepared(
        model,
        tokenizer,
        data.tokenize_for_generation(train, config, tokenizer),
        data.tokenize_for_generation(held_out, config, tokenizer),
        data.Collator(tokenizer.pad_token_id),
        [],
    )


def _text_classifier(path: str, dtype: str, config: DataConfig, train: Any, held_out: Any) -> Prepared:
    classes = data.classes_of(train, config.text_column, config.label_column)
    names = data.names_of(train, config.label_column, classes)
    tokenizer = loading.load_tokenizer(path)
    model = models.load_classifier(path, dtype, names, tokenizer.pad_token_id)
    return Prepared(
        model,
        tokenizer,
        data.tokenize_for_classification(train, config, tokenizer, classes),
        data.tokenize_for_classification(held_out, config, tokenizer, classes),
        data.Collator(tokenizer.pad_token_id),
        names,
    )


def _image_classifier(path: str, dtype: str, config: DataConfig, train: Any, held_out: Any) -> Prepared:
    classes = data.classes_of(train, config.image_column, config.label_column)
    names = data.names_of(train, config.label_column, classes)
    train, held_out = (images.examples(rows, config, classes) for rows in (train, held_out))
    model = models.load_image_classifier(path, dtype, names)
    processor = images.load_processor(path, config.image_size, getattr(model.config, "image_size", None))
    collate = images.Collator(processor, next(model.parameters()).dtype)
    return Prepared(model, processor, train, held_out, collate, names)


TASKS: dict[str, Prepare] = {
    "causal-lm": _language_model,
    "sequence-classification": _text_classifier,
    "image-classification": _image_classifier,
}
