"""Datasets for the recipes: files or the hub in, token ids and labels out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowrank_ft.calibration.texts import read
from lowrank_ft.errors import ConfigError, did_you_mean

IGNORED = -100  # the label that losses ignore

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]  # makes a batch of examples


@dataclass(frozen=True)
class DataConfig:
    """What to train on and to evaluate on."""

    train: str
    """A file (.jsonl, .json, .csv, .parquet, .txt), a directory that `datasets` wrote, or a hub name."""
    eval: str | None = None
    """Held-out data, likewise. Without it, `eval_fraction` of the training data is held out."""
    name: str | None = None
    """Configuration of a hub dataset."""
    train_split: str = "train"
    """Split of a hub dataset to train on."""
    eval_split: str = "validation"
    """Split of a hub dataset to evaluate on, where `eval` names one."""
    eval_fraction: float = 0.05
    """Share of the examples to hold out where `eval` is not given."""
    kind: Literal["auto", "text", "chat", "prompt-completion"] = "auto"
    """What an example is; "auto" looks for the columns `messages`, `prompt` with `completion`, then text."""
    text_column: str = "text"
    """Column of plain text (and of the text to classify)."""
    label_column: str = "label"
    """Column of class labels, for classification."""
    image_column: str = "image"
    """Column of the images to classify: the pictures themselves, or paths of their files."""
    image_size: int | None = None
    """Pixels of a side, to which images are resized; what the model's image processor says by default."""
    max_length: int = 512
    """Tokens of a sequence; longer ones are cut, or with packing laid end to end and cut into blocks."""
    packing: bool = True
    """Lay examples end to end, separated by the end-of-text token, so that no token is padding."""
    max_eval_examples: int | None = None
    """At most so many held-out examples (blocks, with packing)."""


def load(config: DataConfig, seed: int) -> tuple[Any, Any]:
    """Return the raw training and held-out datasets.

    Raises:
        ConfigError: a path or split that is not there, an empty dataset.
    """
    train = read(config.train, config.name, config.train_split)
    if config.eval is not None:
        held_out = read(config.eval, config.name, config.eval_split)
    else:
        if not 0 < config.eval_fraction < 1:
            raise ConfigError(f"data.eval_fraction must lie in (0, 1), but is {config.eval_fraction}.")
        parts = train.train_test_split(test_size=config.eval_fraction, seed=seed)
        train, held_out = parts["train"], parts["test"]
    for name, dataset in (("train", train), ("eval", held_out)):
        if len(dataset) == 0:
            raise ConfigError(f"The {name} data has no examples.")
    return train, held_out


# Causal language modelling ----------------------------------------------------------------------------------


def tokenize_for_generation(dataset: Any, config: DataConfig, tokenizer: Any) -> Any:
    """Return a dataset of ``input_ids`` and ``labels``, packed into equal blocks where asked.

    In chats and prompt-completion pairs only the model's answers have labels.

    Raises:
        ConfigError: missing columns; a chat template that the prompt cannot be masked with; too little text
            for one block.
    """
    encode = _encoder(_kind(dataset, config), config, tokenizer)
    columns = dataset.column_names
    encoded = dataset.map(encode, remove_columns=columns, desc="Tokenising")
    if not config.packing:
        limit = config.max_length
        return encoded.map(lambda row: {k: v[:limit] for k, v in row.items()}, desc="Cutting")
    packed = encoded.map(
        lambda rows: pack(rows, config.max_length), batched=True, batch_size=None, desc="Packing"
    )
    if len(packed) == 0:
        total = sum(len(row) for row in encoded["input_ids"])
        raise ConfigError(f"The data has {total} tokens, too few for one block of {config.max_length}.")
    return packed


def pack(rows: Mapping[str, Sequence[Sequence[int]]], length: int) -> dict[str, list[list[int]]]:
    """Lay sequences end to end and cut them into blocks of ``length``; the last, shorter rest is dropped."""
    joined = {key: [token for row in value for token in row] for key, value in rows.items()}
    total = len(joined["input_ids"]) // length * length
    return {key: [value[i : i + length] for i in range(0, total, length)] for key, value in joined.items()}


def _kind(dataset: Any, config: DataConfig) -> str:
    columns = set(dataset.column_names)
    needs = {
        "chat": {"messages"},
        "prompt-completion": {"prompt", "completion"},
        "text": {config.text_column},
    }
    if config.kind == "auto":
        for kind, wanted in needs.items():
            if wanted <= columns:
                return kind
    elif needs[config.kind] <= columns:
        return config.kind
    hint = did_you_mean(config.text_column, columns)
    raise ConfigError(
        f"The data has the columns {sorted(columns)}: neither 'messages', nor 'prompt' and 'completion', nor "
        f"{config.text_column!r}.{hint} Set data.text_column."
    )


def _encoder(kind: str, config: DataConfig, tokenizer: Any) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def text(row: Mapping[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row[config.text_column])["input_ids"] + end
        return {"input_ids": ids, "labels": list(ids)}

    def completion(row: Mapping[str, Any]) -> dict[str, Any]:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + end
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    def chat(row: Mapping[str, Any]) -> dict[str, Any]:
        return encode_chat(row["messages"], tokenizer)

    return {"text": text, "prompt-completion": completion, "chat": chat}[kind]


def encode_chat(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> dict[str, list[int]]:
    """Return a conversation's ids, with labels on the assistant's words alone.

    The assistant's words are the tokens that the chat template appends to the conversation so far with its
    generation prompt.

    Raises:
        ConfigError: no template, or one that rewrites earlier turns when a later one is added.
    """
    if tokenizer.chat_template is None:
        raise ConfigError("The tokenizer has no chat template, so the data cannot be of kind 'chat'.")

    def render(upto: int, opening: bool) -> list[int]:
        ids = tokenizer.apply_chat_template(
            list(messages[:upto]), tokenize=True, add_generation_prompt=opening, return_dict=False
        )
        return list(ids)

    ids = render(len(messages), opening=False)
    labels = [IGNORED] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(i, opening=True), render(i + 1, opening=False)
        if ids[: len(before)] != before or ids[: len(after)] != after:
            raise ConfigError(
                "The chat template rewrites earlier turns when later ones are added, so the assistant's "
                "words cannot be told from the prompt. Use a prefix-stable template."
            )
        labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return {"input_ids": ids, "labels": labels}


# Classification ---------------------------------------------------------------------------------------------


def tokenize_for_classification(dataset: Any, config: DataConfig, tokenizer: Any, classes: list[Any]) -> Any:
    """Return a dataset of ``input_ids`` and integer ``labels``, indices into ``classes``."""
    index = index_among(classes)

    def encode(row: Mapping[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row[config.text_column], truncation=True, max_length=config.max_length)["input_ids"]
        return {"input_ids": ids, "labels": index(row[config.label_column])}

    return dataset.map(encode, remove_columns=dataset.column_names, desc="Tokenising")


def index_among(classes: Sequence[Any]) -> Callable[[Any], int]:
    """Return a function from a label to its index among the classes; it raises ``ConfigError`` for others."""
    indices = {label: i for i, label in enumerate(classes)}

    def index(label: Any) -> int:
        if label not in indices:
            raise ConfigError(f"The held-out data has the label {label!r}, which the training data lacks.")
        return indices[label]

    return index


def classes_of(dataset: Any, content_column: str, label_column: str) -> list[Any]:
    """Return the distinct labels of a dataset, sorted.

    Args:
        dataset: the training data.
        content_column: what is to be classified.
        label_column: its labels.

    Raises:
        ConfigError: a column that is not there; fewer than two classes.
    """
    for column in (content_column, label_column):
        if column not in dataset.column_names:
            raise ConfigError(
                f"The data has no column {column!r}.{did_you_mean(column, dataset.column_names)} It has: "
                f"{dataset.column_names}."
            )
    classes = sorted(set(dataset[label_column]))
    if len(classes) < 2:
        raise ConfigError(f"The data has one class only: {classes}.")
    return classes


def names_of(dataset: Any, label_column: str, classes: Sequence[Any]) -> list[str]:
    """Return the classes' names: those of the dataset's feature if it has any, else the labels as text."""
    named = getattr(dataset.features[label_column], "int2str", str)
    return [named(label) for label in classes]


# Batches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collator:
    """Pads sequences to the longest in the batch; padding is masked and has no label."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, value: int) -> Tensor:
            return torch.tensor([list(row[key]) + [value] * (longest - len(row[key])) for row in rows])

        mask = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
        )
        sequences = isinstance(rows[0]["labels"], (list, tuple))
        labels = padded("labels", IGNORED) if sequences else torch.tensor([row["labels"] for row in rows])
        return {"input_ids": padded("input_ids", self.pad_token_id), "attention_mask": mask, "labels": labels}


def batches(dataset: Any, collate: Collate, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield a dataset's batches, in order."""
    for start in range(0, len(dataset), size):
        rows = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        yield collate(rows)
