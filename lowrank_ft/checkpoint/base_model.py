"""Which base model an adapter belongs to: its name, its shapes, and a digest of its values."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_ft import engine
from lowrank_ft.errors import CheckpointError, StateError


def identify(model: nn.Module, replaced: Collection[str] = ()) -> dict[str, Any]:
    """Return what identifies the base of a (wrapped or plain) model, as JSON data.

    Args:
        model: the model.
        replaced: modules that the adapter stores whole. The base's weights there are ignored: a new
            classifier's head is random.
    """
    tensors = engine.stock_tensors(model)
    config = getattr(model, "config", None)
    inside = tuple(f"{name}." for name in replaced)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(inside)}
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}
    return {
        "class": type(model).__name__,
        "name_or_path": str(getattr(config, "_name_or_path", "") or ""),
        "revision": getattr(config, "_commit_hash", None),
        "parameters": sum(p.numel() for p in {id(t): t for t in tensors.values()}.values()),
        "dtype": "+".join(sorted(dtypes)),
        "structure": structure(tensors),
        "digest": None if any(t.is_meta for t in kept.values()) else engine.digest_of_values(kept),
        "labels": _labels(type(model).__name__, config),
    }


def _labels(name: str, config: Any) -> dict[str, str] | None:
    """A classifier's classes, whose number is needed to build its head again."""
    labels = getattr(config, "id2label", None) if "Classification" in name else None
    return {str(key): str(value) for key, value in labels.items()} if labels else None


def check(model: nn.Module, expected: Mapping[str, Any], replaced: Collection[str] = ()) -> None:
    """Raise ``CheckpointError`` unless the model's base is the one that was recorded."""
    present = identify(model, replaced)
    made_for = f"{expected.get('class')} {expected.get('name_or_path') or ''}".strip()
    if present["structure"] != expected.get("structure"):
        raise CheckpointError(
            f"The adapter was made for another model: {made_for}, {expected.get('parameters')} parameters. "
            f"This is a {present['class']} with {present['parameters']} parameters, or other names or shapes."
        )
    if present["digest"] is None:
        raise StateError(
            "Weights of the base model are on the meta device (offloaded, or not loaded), so it cannot be "
            "compared with the one the adapter was made for. Load them, or pass check_base=False."
        )
    if expected.get("digest") is not None and present["digest"] != expected["digest"]:
        hint = ""
        if present["dtype"] != expected.get("dtype"):
            hint = f" It was {expected.get('dtype')} and is {present['dtype']} now, which may be the reason."
        raise CheckpointError(
            f"The adapter was made for other weights of {made_for}: the digest of the base differs.{hint} "
            f"Load the base it was trained on, or pass check_base=False to put it on this one."
        )


def structure(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over the names and shapes of the base's tensors."""
    listing = "\n".join(f"{name} {tuple(tensors[name].shape)}" for name in sorted(tensors))
    return hashlib.sha256(listing.encode()).hexdigest()
