"""Images for the recipes: a dataset's pictures in, pixel tensors and labels out.

Pictures become pixels by the model's own image processor. Where torchvision is not installed, transformers
takes the kind that needs Pillow alone.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ft.errors import ConfigError
from lowrank_ft.recipes import data
from lowrank_ft.recipes.data import DataConfig

# For a model that was saved without a processor: the whole picture, and ImageNet's mean and deviation.
_PLAIN = {
    "image_processor_type": "ViTImageProcessor",
    "resample": 3,  # bicubic
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def load_processor(path: str, size: int | None, own_size: Any) -> Any:
    """Return a model's image processor.

    Args:
        path: a model directory, or a name on the hub.
        size: pixels of a side, in place of what the processor says.
        own_size: the model's own; for a model without a processor where ``size`` is not given.

    Raises:
        ConfigError: Pillow is not installed; a size below 1, or none; a processor with other requirements.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ConfigError("Pillow, which reads images, is not installed: pip install 'lowrank_ft[images]'.")
    if size is not None and size < 1:
        raise ConfigError(f"data.image_size must be at least 1, but is {size}.")
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(path)
    except OSError:
        if size is None and not isinstance(own_size, int):
            raise ConfigError(f"{path} has no image processor: set data.image_size.") from None
        return _plain(size or own_size)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"The image processor of {path} cannot be used here: {error}") from error
    if size is None:
        return processor
    square = {"height": size, "width": size}
    # Some processors take the shorter side only, and crop the rest.
    shorter = {"shortest_edge": size} if processor.size.get("shortest_edge") else square
    return AutoImageProcessor.from_pretrained(path, size=shorter, crop_size=square)


def _plain(size: int) -> Any:
    from transformers import AutoImageProcessor

    with tempfile.TemporaryDirectory() as scratch:
        facts = {**_PLAIN, "size": {"height": size, "width": size}}
        Path(scratch, "preprocessor_config.json").write_text(json.dumps(facts), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(scratch)


def examples(dataset: Any, config: DataConfig, classes: list[Any]) -> Any:
    """Return a dataset of ``image`` and integer ``labels``, indices into ``classes``.

    An image is read when it is asked for; grey ones become coloured ones.

    Raises:
        ConfigError: a column that holds no images; a first image that cannot be read; a label that is not
            among the classes.
    """
    import datasets

    column = config.image_column
    feature = dataset.features[column]
    held = feature if isinstance(feature, Mapping) else {getattr(feature, "dtype", "")}
    if not isinstance(feature, datasets.Image) and not {"string", "binary", "bytes"}.intersection(held):
        raise ConfigError(
            f"The column {column!r} holds {feature}, neither images nor paths of their files. Set "
            f"data.image_column; the columns are {dataset.column_names}."
        )
    index = data.index_among(classes)
    labels = [index(label) for label in dataset[config.label_column]]
    rows = dataset.select_columns([column]).cast_column(column, datasets.Image(mode="RGB"))
    if column != "image":
        rows = rows.rename_column(column, "image")
    try:
        rows[0]
    except OSError as error:
        raise ConfigError(f"The first image of the column {column!r} cannot be read: {error}") from error
    return rows.add_column("labels", labels)


@dataclass(frozen=True)
class Collator:
    """Turns pictures into pixels.

    Attributes:
        processor: an image processor of transformers.
        dtype: of the pixels; the model's.
    """

    processor: Any
    dtype: torch.dtype

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return ``pixel_values`` and ``labels``."""
        pixels = self.processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels.to(self.dtype), "labels": torch.tensor([r["labels"] for r in rows])}
