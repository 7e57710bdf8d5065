"""Where statistics are kept: a safetensors file for each block and kind, so that one is read at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.errors import CheckpointError


class Store(Mapping[str, SiteStatistics]):
    """Statistics by layer name, on disk; read when asked for.

    Attributes:
        directory: where the files are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self._groups: dict[str, dict[str, dict[str, str]]] = {"input": {}, "gradient": {}}
        for path in sorted(self.directory.glob("*.safetensors")):
            kind, group = path.stem.split(".", 1)
            with self._open(path) as file:
                self._groups[kind][group] = json.loads(file.metadata()["leaders"])

    def has(self, kind: str, group: str) -> bool:
        """Whether a group of layers is finished."""
        return group in self._groups[kind]

    def names_in(self, kind: str, group: str) -> set[str]:
        """Return the layers of a finished group."""
        return set(self._groups[kind][group])

    def names(self, kind: str = "input") -> set[str]:
        """Return the layers whose inputs (or output gradients) are known."""
        return {name for leaders in self._groups[kind].values() for name in leaders}

    def put(self, kind: str, group: str, tensors: Mapping[str, Tensor], leaders: Mapping[str, str]) -> None:
        """Write a group: all of it or nothing.

        Args:
            kind: ``"input"`` or ``"gradient"``.
            group: the block.
            tensors: ``"layer|quantity"`` to tensor.
            leaders: for each layer, the one whose tensors it shares.
        """
        path = self.directory / f"{kind}.{group}.safetensors"
        partial = path.with_suffix(".partial")
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, partial, metadata={"leaders": json.dumps(leaders)})
        partial.replace(path)
        self._groups[kind][group] = dict(leaders)

    def __getitem__(self, name: str) -> SiteStatistics:
        found: dict[str, Any] = {}
        for kind in ("input", "gradient"):
            for group, leaders in self._groups[kind].items():
                if name in leaders:
                    found.update(self._read(kind, group, leaders[name]))
        if "C" not in found:
            raise KeyError(name)
        return SiteStatistics(
            tokens=int(found["tokens"]),
            C=found["C"],
            mean=found["mean"],
            G=found.get("G"),
            pulled=found.get("pulled"),
        )

    def __iter__(self) -> Any:
        return iter(sorted(self.names()))

    def __len__(self) -> int:
        return len(self.names())

    def _read(self, kind: str, group: str, leader: str) -> dict[str, Tensor]:
        with self._open(self.directory / f"{kind}.{group}.safetensors") as file:
            keys = [key for key in file.keys() if key.startswith(f"{leader}|")]  # noqa: SIM118 (it is no mapping)
            return {key.rpartition("|")[2]: file.get_tensor(key) for key in keys}

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except Exception as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}): delete it, and it is made again."
            ) from error
