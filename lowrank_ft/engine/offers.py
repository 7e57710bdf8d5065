"""Compute the options of each site: one loop for all methods, with cache, progress bar and threads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lowrank_ft import config as configs
from lowrank_ft.algorithms.base import Method, Statistics
from lowrank_ft.anatomy.sites import Site
from lowrank_ft.calibration.store import open_whole, write_whole
from lowrank_ft.engine.digest import digest_of_json
from lowrank_ft.errors import CheckpointError
from lowrank_ft.quant.scheme import Scheme
from lowrank_ft.solve.allocation import Option

T = TypeVar("T")
R = TypeVar("R")


def offers(
    method: Method[Any], sites: Sequence[Site], statistics: Statistics, shelf: Shelf | None = None
) -> dict[str, list[Option]]:
    """Return a method's options for each site, by the site's name.

    Args:
        method: the method; its :meth:`~lowrank_ft.algorithms.base.Method.options` is called for each site.
        sites: the sites.
        statistics: the statistics that the method needs.
        shelf: stores the options; those that it has already are not computed again. None keeps options and
            their handles in memory.
    """
    if type(method).options is Method.options:  # the method has no options of its own
        return {site.name: [] for site in sites}

    def of_site(number: int) -> list[Option]:
        stored = None if shelf is None else shelf.read(number)
        if stored is not None:
            return stored
        with torch.no_grad():  # each thread has a grad mode of its own
            options = method.options(sites[number], statistics)
        return options if shelf is None else shelf.write(number, options)

    results = _in_threads(of_site, range(len(sites)), "Options")
    return {site.name: options for site, options in zip(sites, results, strict=True)}


def recipe_of(method: Method[Any], sites: Sequence[Site], gathered: Sequence[str]) -> dict[str, Any]:
    """Return everything that options depend on, as plain data; a shelf is stored under its hash.

    Args:
        method: the method; the fields of its config in ``spending`` are left out.
        sites: the sites.
        gathered: names under which the statistics are stored; they contain hashes of the model and the data.
    """
    config = configs.to_dict(method.config)
    left_out = {*type(method).spending, "calibration"}  # its effect on the statistics is in their names
    return {
        "method": method.name,
        "config": {name: value for name, value in config.items() if name not in left_out},
        "sites": [[site.role, *site.names] for site in sites],
        "statistics": list(gathered),
    }


class Shelf:
    """Options on disk: for each site one file, with the options as metadata and their handle as tensors.

    Attributes:
        directory: the directory of the files; it is created by the first write.
    """

    def __init__(self, root: Path, recipe: Mapping[str, Any]) -> None:
        """Open the shelf of a recipe (see :func:`recipe_of`)."""
        self.directory = root / f"options-{digest_of_json(recipe)}"

    def read(self, number: int) -> list[Option] | None:
        """Return a site's options, whose handle is read when it is used; None if they are not stored.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = self._path(number)
        if not path.exists():
            return None
        with open_whole(path) as file:
            try:
                rows = json.loads(file.metadata()["options"])
                handle = Shelved(path)
                return [
                    Option(r, size, loss, ranks, None if scheme is None else Scheme(**scheme), handle=handle)
                    for r, size, loss, ranks, scheme in rows
                ]
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"{path} holds no options ({error}): delete it, and it is made again."
                ) from error

    def write(self, number: int, options: Sequence[Option]) -> list[Option]:
        """Write a site's options, and return them with a handle that is read from disk.

        Raises:
            StorageError: the disk is full.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        rows = [[o.rank, o.size, o.loss, dict(o.ranks), configs.plain(o.scheme)] for o in options]
        handle = {key: t.cpu() for option in options[-1:] for key, t in option.handle.items()}
        write_whole(self._path(number), handle, {"options": json.dumps(rows)})
        shelved = Shelved(self._path(number))
        return [replace(option, handle=shelved) for option in options]

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:05d}.safetensors"


class Shelved(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is used."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getitem__(self, name: str) -> Tensor:
        with open_whole(self.path) as file:
            if name not in file.keys():  # noqa: SIM118 (no mapping)
                raise KeyError(name)
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        with open_whole(self.path) as file:
            return iter(list(file.keys()))

    def __len__(self) -> int:
        with open_whole(self.path) as file:
            return len(file.keys())


def _in_threads(function: Callable[[T], R], items: Sequence[T], what: str) -> list[R]:
    """Apply a function to each item, in order; on a CPU as many run at once as torch has threads."""
    threads = torch.get_num_threads()
    bar: dict[str, Any] = {"desc": what, "total": len(items), "unit": "site", "leave": False}
    if threads == 1 or torch.cuda.is_available():
        return [function(item) for item in tqdm(items, **bar)]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(tqdm(pool.map(function, items), **bar))
    finally:
        torch.set_num_threads(threads)
