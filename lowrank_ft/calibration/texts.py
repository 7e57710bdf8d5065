"""Texts: read from a file, a directory or the hub, and turned into token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ft.errors import ConfigError

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read(source: str, name: str | None, split: str) -> Any:
    """Return one dataset: a local file, a directory that `datasets` wrote, or a split of a hub dataset.

    Raises:
        ConfigError: a local path that does not exist, or a file of no known format.
    """
    import datasets

    path = Path(source)
    if path.is_file():
        reader = _READERS.get(path.suffix)
        if reader is None:
            raise ConfigError(f"{source} is of no known format (known are {', '.join(_READERS)}).")
        return datasets.load_dataset(reader, data_files=str(path), split="train")
    if path.is_dir() and (path / "state.json").exists():
        return datasets.load_from_disk(source)
    if source.startswith((".", "/")) or path.suffix in _READERS:
        raise ConfigError(f"There is no data at {source}.")
    return datasets.load_dataset(source, name, split=split)


def text_ids(texts: Sequence[str], tokenizer: Any, max_tokens: int | None = None) -> Tensor:
    """Return texts as one row of token ids, each ended by the end-of-text token."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"]
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    return torch.tensor(ids[:max_tokens])
