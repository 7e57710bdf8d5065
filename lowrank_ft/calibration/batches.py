"""Calibration data: turn batches, a DataLoader, a dataset, a file or texts into a list of batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowrank_ft.calibration import texts as reading
from lowrank_ft.errors import ConfigError

Batch = dict[str, Tensor]
# Its arguments are the model, a batch, and the model's output for this batch.
Loss = Callable[[nn.Module, Batch, Any], Tensor]


@dataclass(frozen=True)
class Calibration:
    """How much calibration data to use, and how."""

    samples: int = 128
    """Sequences of calibration text."""
    gradient_samples: int = 32
    """How many of them the backward pass for the output gradients uses."""
    probe_samples: int = 1
    """How many of those each layer's probe runs, if sensitivities are probed instead of differentiated."""
    length: int = 512
    """Tokens in a sequence. Texts are concatenated and cut, unless the tokenizer has a CLS token."""
    batch_size: int = 4
    """Sequences in a batch."""
    seed: int = 0
    """Seed of the random choice of sequences, if there are more than `samples`."""
    hidden_states: Literal["memory", "disk"] = "memory"
    """Where to keep the hidden states between two blocks: `samples · length` positions, and for the backward
    pass `gradient_samples · length` positions of every block."""
    measure_options: bool = False
    """Measure how much each compressed layer (or group of layers) alone changes the model's output, to
    compare with the predicted loss; costs a forward pass over the probe sequences for each of them."""
    sequential: bool = False
    """Calibrate every block on the outputs of the compressed blocks before it; costs a second pass."""
    cache: str | None = None
    """Directory that keeps statistics, for another ratio or method, and finished layers, to resume a run."""

    def __post_init__(self) -> None:
        for name in ("samples", "gradient_samples", "probe_samples", "length", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"calibration.{name} must be at least 1, but is {getattr(self, name)}.")


@dataclass(frozen=True)
class Source:
    """The calibration data that a caller passes, and how to read it.

    Attributes:
        data: calibration data, as :func:`prepare` takes it, or None.
        tokenizer: turns texts in the data into tokens.
        loss: the caller's own loss, to be differentiated; None for the default.
    """

    data: Any = None
    tokenizer: Any = None
    loss: Loss | None = None

    def __bool__(self) -> bool:
        """Whether the caller passed anything."""
        return any(argument is not None for argument in (self.data, self.tokenizer, self.loss))


def prepare(data: Any, tokenizer: Any, settings: Calibration) -> list[Batch]:
    """Return calibration batches on the CPU.

    Args:
        data: batches (dicts of tensors with a batch dimension) or a DataLoader, used unchanged; texts, a
            ``datasets.Dataset`` with a column ``text``, or the path of a file that contains one.
        tokenizer: turns texts into tokens; batches need none.
        settings: how many sequences, how long.

    Raises:
        ConfigError: no data, data of an unknown kind, data that can be read only once, or texts without a
            tokenizer.
    """
    if data is None:
        raise ConfigError(
            "This method looks at calibration data: pass data= (batches, texts, a dataset or a file)."
        )
    if isinstance(data, (str, Path)):
        data = reading.read(str(data), None, "train")
    if isinstance(data, Iterable) and iter(data) is data:
        raise ConfigError(
            "The calibration data can be read only once (an iterator): pass a list or a DataLoader."
        )
    rows = _texts(data)
    batches = _from_texts(rows, tokenizer, settings) if rows is not None else _as_tensors(data)
    if not batches or count_tokens(batches) == 0:
        raise ConfigError("The calibration data has no tokens.")
    return batches


def _texts(data: Any) -> Sequence[str] | None:
    """The texts in ``data``, or None if it contains batches."""
    if hasattr(data, "column_names"):
        if "text" not in data.column_names:
            raise ConfigError(f"The calibration dataset has no column 'text', but {data.column_names}.")
        return list(data["text"])
    if isinstance(data, Sequence) and data and isinstance(data[0], str):
        return data
    return None


def _as_tensors(data: Any) -> list[Batch]:
    """The batches in ``data``, without their entries that are not tensors."""
    batches = []
    for batch in data:
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f"Calibration batches must be dicts of tensors or texts, but one is a {type(batch).__name__}."
            )
        batches.append({key: value for key, value in batch.items() if isinstance(value, Tensor)})
    return batches


def _from_texts(texts: Sequence[str], tokenizer: Any, settings: Calibration) -> list[Batch]:
    if tokenizer is None:
        raise ConfigError("Texts need a tokenizer: pass tokenizer=.")
    generator = torch.Generator().manual_seed(settings.seed)
    if getattr(tokenizer, "cls_token_id", None) is None:
        blocks = _packed(texts, tokenizer, settings.length)
    else:  # an encoder's texts are not concatenated: each must begin with its special token
        encoded = tokenizer(list(texts), truncation=True, max_length=settings.length)["input_ids"]
        blocks = [ids for ids in encoded if ids]
    order = torch.randperm(len(blocks), generator=generator).tolist()[: settings.samples]
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    chosen = [blocks[i] for i in order]
    return [
        _padded(chosen[i : i + settings.batch_size], padding)
        for i in range(0, len(chosen), settings.batch_size)
    ]


def _packed(texts: Sequence[str], tokenizer: Any, length: int) -> list[list[int]]:
    ids = reading.text_ids(texts, tokenizer).tolist()
    blocks = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    return blocks or ([ids] if len(ids) > 1 else [])  # a single token has no next token to predict


def _padded(rows: Sequence[Sequence[int]], padding: int) -> Batch:
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


def mask_of(batch: Batch) -> Tensor | None:
    """Return which positions of a batch are real, ``(batch, tokens)``, or None if all are."""
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def count_tokens(batches: Iterable[Batch]) -> int:
    """Return the number of real tokens; for data without token ids, the number of images or other samples."""
    total = 0
    for batch in batches:
        mask = mask_of(batch)
        ids = batch.get("input_ids", next(iter(batch.values())))
        are_ids = ids.dim() == 2 and not ids.is_floating_point()
        total += int(mask.sum()) if mask is not None else ids.numel() if are_ids else ids.shape[0]
    return total


def take(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """Return the first ``samples`` sequences."""
    taken: list[Batch] = []
    for batch in batches:
        size = next(iter(batch.values())).shape[0]
        if samples <= 0:
            break
        taken.append({key: value[:samples] for key, value in batch.items()})
        samples -= size
    return taken


def fingerprint(batches: Iterable[Batch]) -> str:
    """Return a hash of everything in the batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for key, value in sorted(batch.items()):
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
