"""Atomic directories, checksums, and an index that contains its own checksum."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors

from lowrank_ft.errors import CheckpointError

INDEX = "lowrank_ft.json"
SCHEMA = 1


# Writing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield an empty directory that replaces ``target`` in one step when the block succeeds.

    Everything is synced before. If the block or the disk fails, nothing is left behind and ``target`` is
    unchanged. Files that users put beside an old checkpoint are carried over.

    Raises:
        CheckpointError: ``target`` exists and is not a checkpoint of this package; the disk is full,
            read-only…
    """
    target = Path(os.path.abspath(target))
    _check_replaceable(target)
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        staging.chmod(0o777 & ~_umask())
        yield staging
        for file in staging.rglob("*"):
            _sync(file)
        _sync(staging)
        _swap(staging, target)
        _sync(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"Could not save to {target}: {reason}. Nothing was written there; what was there is unchanged."
        ) from error
    finally:
        if staging is not None and staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


def write_index(directory: Path, content: Mapping[str, Any], files: list[str]) -> None:
    """Write ``lowrank_ft.json``: the content, a SHA-256 for each file, and one for itself. Call it last."""
    sums = {
        name: {"sha256": sha256(directory / name), "bytes": (directory / name).stat().st_size}
        for name in files
    }
    index = {"schema": SCHEMA, **content, "files": sums}
    index["checksum"] = _self_checksum(index)
    (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file: choose a directory.")
    if any(target.iterdir()) and not (target / INDEX).is_file():
        raise CheckpointError(
            f"{target} is not empty and holds no checkpoint of lowrank_ft: it would be overwritten. "
            f"Choose another directory, or empty it."
        )


def _swap(staging: Path, target: Path) -> None:
    """Move ``staging`` to ``target``, and then delete the old ``target``."""
    if not target.exists():
        os.rename(staging, target)
        return
    owned = _listed_files(target)
    if not _exchange(staging, target):  # two steps, where the system has no atomic exchange
        aside = target.with_name(f"{staging.name}.old")
        os.rename(target, aside)
        try:
            os.rename(staging, target)
        except OSError:
            os.rename(aside, target)
            raise
        os.rename(aside, staging)
    for entry in staging.iterdir():  # `staging` now holds the old checkpoint
        if entry.name not in owned and not (target / entry.name).exists():
            os.rename(entry, target / entry.name)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories atomically (Linux ``renameat2``); return False where that is not possible."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_cwd, exchange = -100, 2
    return renameat2 is not None and renameat2(at_cwd, os.fsencode(a), at_cwd, os.fsencode(b), exchange) == 0


def _listed_files(directory: Path) -> set[str]:
    """The index and the files that it names; the index alone where it cannot be read."""
    try:
        return {INDEX, *json.loads((directory / INDEX).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {INDEX}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# Reading ----------------------------------------------------------------------------------------------------


def read_index(directory: Path) -> dict[str, Any]:
    """Return the content of ``lowrank_ft.json`` after checking it and every file it names.

    Raises:
        CheckpointError: no index, an index that was changed, a file that is missing, truncated or changed,
            an unsafe path, a schema this version does not know.
    """
    path = directory / INDEX
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no {INDEX}: it is not a checkpoint of lowrank_ft, or its copy is incomplete."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(index, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    schema = index.get("schema")
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        raise CheckpointError(
            f"{path} has schema {schema!r}; this version reads up to {SCHEMA}. Upgrade lowrank_ft."
        )
    if index.get("checksum") != _self_checksum(index):
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content.")
    files = index.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path} is damaged: it lists no files.")
    for name, facts in files.items():
        _check_file(directory, name, facts)
    return index


def _check_file(directory: Path, name: Any, facts: Any) -> None:
    if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
        raise CheckpointError(
            f"{directory / INDEX} names a file {name!r} outside its directory; refusing to read it."
        )
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete.")
    size = path.stat().st_size
    expected = facts if isinstance(facts, dict) else {}
    if size != expected.get("bytes"):
        raise CheckpointError(
            f"{path} has {size} bytes instead of {expected.get('bytes')}: it was truncated or changed."
        )
    if sha256(path) != expected.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its SHA-256 does not match the one recorded.")


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _self_checksum(index: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
