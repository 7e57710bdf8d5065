"""Finished layers on disk, so that a compression can resume after it was killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lowrank_ft.calibration.store import open_whole, write_whole
from lowrank_ft.engine.digest import digest_of_json
from lowrank_ft.structure.replacement import Container


class Journal:
    """Finished layers on disk: a killed run resumes after them, and its result is bit-identical."""

    def __init__(self, root: Path, recipe: Mapping[str, Any]) -> None:
        """Open the journal of a run.

        Args:
            root: where journals are kept.
            recipe: everything that determines the result of the run, as plain data.
        """
        self.directory = root / f"journal-{digest_of_json(recipe)}"
        self.directory.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, modules: Mapping[str, nn.Module], facts: Mapping[str, Any]) -> None:
        """Write a finished site: all of it or nothing."""
        tensors = {f"{n}|{k}": t for n, m in _own(modules).items() for k, t in m.state_dict().items()}
        write_whole(self._path(name), tensors, {"facts": json.dumps(facts)})

    def read(self, name: str, modules: Mapping[str, nn.Module]) -> dict[str, Any] | None:
        """Fill the modules of a site from the journal and return its facts; None if it was not finished."""
        if not self._path(name).exists():
            return None
        with open_whole(self._path(name)) as file:
            for module_name, module in _own(modules).items():
                state = {k: file.get_tensor(f"{module_name}|{k}") for k in module.state_dict()}
                module.load_state_dict(state)
            facts: dict[str, Any] = json.loads(file.metadata()["facts"])
        return facts

    def close(self) -> None:
        """Delete the journal, when the run has finished."""
        shutil.rmtree(self.directory)

    def _path(self, name: str) -> Path:
        return self.directory / f"site-{name}.done"


def _own(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules that have tensors of their own; containers have none."""
    return {name: module for name, module in modules.items() if not isinstance(module, Container)}
