"""Statistics on disk: one safetensors file for each block, so that one block can be read at a time.

A second moment is symmetric, so only its upper triangle is written, in float32 (in float64 for a model in
float64). That is a quarter of the bytes of the float64 total. It is read back as a full float64 matrix.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_ft.calibration.statistics import SiteStatistics, mirror
from lowrank_ft.errors import CheckpointError, StorageError

# Files -----------------------------------------------------------------------------------------------------


def write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file: all of it or nothing, whenever the process is killed.

    Raises:
        StorageError: the disk is full.
    """
    partial = path.with_suffix(".partial")
    try:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata=metadata)
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        partial.unlink(missing_ok=True)
        raise StorageError(
            errno.ENOSPC,
            f"The disk of {path.parent} is full. Make room, or choose another calibration.cache.",
        ) from error
    partial.replace(path)


def _is_full(error: Exception) -> bool:
    """Whether a write failed because the disk is full; safetensors reports that in its message only."""
    return getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)


def open_whole(path: Path) -> Any:
    """Open a file that :func:`write_whole` wrote, as a context manager.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({error}): delete it, and it is made again.") from error


def check_room(directory: Path, needed: int) -> None:
    """Raise ``StorageError`` where a disk has less room than is needed.

    Args:
        directory: any directory on that disk.
        needed: bytes.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        message = (
            f"The calibration statistics take up to {needed / 1e9:.2f} GB, and the disk of {directory} has "
            f"{free / 1e9:.2f} GB left. Make room, choose another calibration.cache, or target fewer layers."
        )
        raise StorageError(errno.ENOSPC, message)


# Triangles -------------------------------------------------------------------------------------------------

_UPPER = "upper"


def upper_triangle(matrix: Tensor) -> Tensor:
    """Return the upper triangle of a square matrix, row after row: ``(n (n + 1) / 2,)``."""
    n = len(matrix)
    packed, start = matrix.new_empty(triangle_size(n)), 0
    for row in range(n):  # indices for all entries at once would take four times the matrix
        packed[start : start + n - row] = matrix[row, row:]
        start += n - row
    return packed


def whole_matrix(packed: Tensor) -> Tensor:
    """Undo :func:`upper_triangle`: a symmetric matrix in float64."""
    n = round(((8 * len(packed) + 1) ** 0.5 - 1) / 2)
    matrix, start = packed.new_empty(n, n, dtype=torch.float64), 0
    for row in range(n):
        matrix[row, row:] = packed[start : start + n - row]
        start += n - row
    mirror(matrix.T)
    return matrix


def triangle_size(n: int) -> int:
    """Return how many entries the upper triangle of an ``n × n`` matrix has."""
    return n * (n + 1) // 2


# The store -------------------------------------------------------------------------------------------------


class Store:
    """Tensors by layer name, in one file for each group of layers.

    Attributes:
        directory: where the files are. Every file there is a finished group.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self._groups: dict[str, dict[str, str]] = {}
        self._group_of: dict[str, str] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            with open_whole(path) as file:
                self._add(path.stem, json.loads(file.metadata()["leaders"]))

    def _add(self, group: str, leaders: Mapping[str, str]) -> None:
        self._groups[group] = dict(leaders)
        for name in leaders:
            self._group_of.setdefault(name, group)

    def __contains__(self, name: object) -> bool:
        return name in self._group_of

    def names(self) -> set[str]:
        """Return the names of the stored layers."""
        return set(self._group_of)

    def put(self, group: str, tensors: Mapping[str, Tensor], leaders: Mapping[str, str]) -> None:
        """Write a group: all of it or nothing. More layers of an existing group get a file of their own.

        Args:
            group: the block.
            tensors: ``"layer|quantity"`` to tensor; a square matrix is symmetric.
            leaders: for each layer, the layer whose tensors it shares (itself, if it has its own).

        Raises:
            StorageError: the disk is full.
        """
        while group in self._groups:
            group += "+"
        packed = {}
        for key, tensor in tensors.items():
            is_moment = tensor.dim() == 2
            packed[f"{key}.{_UPPER}" if is_moment else key] = upper_triangle(tensor) if is_moment else tensor
        write_whole(self.directory / f"{group}.safetensors", packed, {"leaders": json.dumps(leaders)})
        self._add(group, leaders)

    def read(self, name: str, only: str = "") -> dict[str, Tensor]:
        """Return a layer's tensors by quantity; empty where the layer is not stored.

        Args:
            name: the layer.
            only: the one quantity to read; all of them by default.

        Raises:
            CheckpointError: the file is damaged.
        """
        group = self.group_of(name)
        return {} if group not in self._groups else self.read_from(group, self._groups[group][name], only)

    def group_of(self, name: str) -> str:
        """Return the group that a layer is in; empty where it is in none."""
        return self._group_of.get(name, "")

    def read_from(self, group: str, leader: str, only: str = "") -> dict[str, Tensor]:
        """Return the tensors in a group's file that are stored under a layer's name, by quantity."""
        tensors, prefix = {}, f"{leader}|"
        with open_whole(self.directory / f"{group}.safetensors") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                quantity = key.removeprefix(prefix)
                if not key.startswith(prefix) or (only and quantity != only):
                    continue
                tensor = file.get_tensor(key)
                is_moment = quantity.endswith(f".{_UPPER}")
                tensors[quantity.removesuffix(f".{_UPPER}")] = whole_matrix(tensor) if is_moment else tensor
        return tensors


class StoredStatistics(Mapping[str, SiteStatistics]):
    """The statistics of each layer, read from disk when asked for.

    Attributes:
        inputs: moments of the layers' inputs.
        gradients: second moments of the gradients at their outputs.
        probes: sensitivities.
    """

    def __init__(self, inputs: Store, gradients: Store, probes: Store) -> None:
        self.inputs, self.gradients, self.probes = inputs, gradients, probes

    def __getitem__(self, name: str) -> SiteStatistics:
        tensors = self.inputs.read(name)
        if not tensors:
            raise KeyError(name)
        tokens, sensitivity = int(tensors.pop("tokens")), self.probes.read(name).get("sensitivity")
        influence = self.inputs.read_from(self.inputs.group_of(name), "block").get("influence")
        return SiteStatistics(
            tokens=tokens,
            **tensors,
            **self.gradients.read(name),
            sensitivity=None if sensitivity is None else float(sensitivity),
            influence=None if influence is None else float(influence),
        )

    @property
    def stores(self) -> tuple[Store, ...]:
        """All three stores."""
        return self.inputs, self.gradients, self.probes

    def tokens(self, name: str) -> int:
        """Return how many positions a layer's moments are means over, without reading the moments."""
        return int(self.inputs.read(name, only="tokens")["tokens"])

    def __contains__(self, name: object) -> bool:
        return name in self.inputs

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.inputs.names()))

    def __len__(self) -> int:
        return len(self.inputs.names())
