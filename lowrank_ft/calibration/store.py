"""Where statistics are kept: a safetensors file for each block, so that one block is read at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.errors import CheckpointError


def write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file: all of it or nothing, whenever the process is killed."""
    partial = path.with_suffix(".partial")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial, metadata=metadata)
    partial.replace(path)


class Store:
    """Tensors by layer name, in one file for each group of layers.

    Attributes:
        directory: where the files are; those that are there already are finished groups.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self._groups: dict[str, dict[str, str]] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            with self._open(path) as file:
                self._groups[path.stem] = json.loads(file.metadata()["leaders"])

    def names(self) -> set[str]:
        """Return the layers that are known."""
        return {name for leaders in self._groups.values() for name in leaders}

    def put(self, group: str, tensors: Mapping[str, Tensor], leaders: Mapping[str, str]) -> None:
        """Write a group: all of it or nothing. More of a group that is there goes into a file of its own.

        Args:
            group: the block.
            tensors: ``"layer|quantity"`` to tensor.
            leaders: for each layer, the one whose tensors it shares.
        """
        while group in self._groups:
            group += "+"
        write_whole(self.directory / f"{group}.safetensors", tensors, {"leaders": json.dumps(leaders)})
        self._groups[group] = dict(leaders)

    def read(self, name: str, only: str = "") -> dict[str, Tensor]:
        """Return a layer's tensors by quantity; empty where the layer is not known.

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
        return next((group for group, leaders in self._groups.items() if name in leaders), "")

    def read_from(self, group: str, leader: str, only: str = "") -> dict[str, Tensor]:
        """Return what a group's file holds under a name."""
        with self._open(self.directory / f"{group}.safetensors") as file:
            prefix = f"{leader}|"
            keys = [key for key in file.keys() if key.startswith(prefix + only)]  # noqa: SIM118 (no mapping)
            return {key.removeprefix(prefix): file.get_tensor(key) for key in keys}

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}): delete it, and it is made again."
            ) from error


class Notes:
    """What a method worked out from statistics and may want again: JSON by key.

    Attributes:
        directory: where it is kept.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> Any:
        """Return what was written under a key; None where nothing was."""
        path = self.directory / f"{key}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def write(self, key: str, content: Any) -> None:
        """Write JSON data under a key: all of it or nothing."""
        partial = self.directory / f"{key}.partial"
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(self.directory / f"{key}.json")


class Known(Mapping[str, SiteStatistics]):
    """What is known of each layer, read from disk when asked for.

    Attributes:
        inputs: moments of the layers' inputs.
        gradients: second moments of the gradients at their outputs.
        probes: sensitivities.
        notes: what was worked out from them, where that is kept.
    """

    def __init__(self, inputs: Store, gradients: Store, probes: Store, notes: Notes | None = None) -> None:
        self.inputs, self.gradients, self.probes, self.notes = inputs, gradients, probes, notes

    def __getitem__(self, name: str) -> SiteStatistics:
        found = self.inputs.read(name)
        if not found:
            raise KeyError(name)
        tokens, sensitivity = int(found.pop("tokens")), self.probes.read(name).get("sensitivity")
        influence = self.inputs.read_from(self.inputs.group_of(name), "block").get("influence")
        return SiteStatistics(
            tokens=tokens,
            **found,
            **self.gradients.read(name),
            sensitivity=None if sensitivity is None else float(sensitivity),
            influence=None if influence is None else float(influence),
        )

    def tokens(self, name: str) -> int:
        """Return how many positions a known layer's moments are the mean of, without reading the moments."""
        return int(self.inputs.read(name, only="tokens")["tokens"])

    def __contains__(self, name: object) -> bool:
        return name in self.inputs.names()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.inputs.names()))

    def __len__(self) -> int:
        return len(self.inputs.names())
