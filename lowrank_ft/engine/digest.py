"""Digests of a model's weights, of its calibration data and of adapters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ft.calibration import batches as batching
from lowrank_ft.calibration.batches import Batch
from lowrank_ft.engine.state import adapter_names, hosts, stock_tensors
from lowrank_ft.errors import CheckpointError
from lowrank_ft.modules.delta import digest_of


def digests(model: nn.Module) -> dict[str, str]:
    """Return by adapter a digest of what it depends on but checkpoints do not store, if there is any."""
    by_adapter, carriers = {}, hosts(model)
    for name in adapter_names(model):
        digest = digest_of({path: host.parts[name] for path, host in carriers.items() if name in host.parts})
        if digest is not None:
            by_adapter[name] = digest
    return by_adapter


def check_digest(name: str, digest: str | None, expected: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` if an adapter's random bases differ from those that it was saved with."""
    if digest != expected.get(name):
        raise CheckpointError(
            f"The adapter {name!r} was saved with other random bases than this package makes for it, so its "
            f"coefficients mean nothing here: use the release it was saved with."
        )


_SAMPLE = 1 << 16  # at most this many elements of each tensor are hashed one by one


def digest_of_values(tensors: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over the values of the base's floating-point tensors, rounded to bfloat16.

    For each tensor it covers the sum of the bit patterns of all elements (so that every element counts) and
    up to 65,536 evenly spaced elements (so that their order counts). Because of the rounding, a base has the
    same digest in float32 and in bfloat16. It is a checksum against mistakes, not against an adversary.
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.is_floating_point():
            bits = tensor.to(torch.bfloat16).contiguous().view(torch.int16).flatten()
            step = max(1, -(-bits.numel() // _SAMPLE))
            sample = bits[::step].cpu().contiguous().numpy().tobytes()
            total.update(f"{name} {_sum(bits)} ".encode())
            total.update(sample)
    return total.hexdigest()


def _sum(bits: Tensor) -> int:
    """The sum in 64 bits; on the CPU NumPy computes it, eight times as fast as torch."""
    return int(bits.numpy().sum(dtype="int64") if bits.device.type == "cpu" else bits.sum(dtype=torch.int64))


CACHE_SCHEMA = 5  # version of the cache's format; raising it makes older caches be ignored


def key_of(model: nn.Module, batches: Sequence[Batch]) -> str:
    """Return a hash of a model and its calibration data, under which statistics are stored."""
    tensors = {k: t for k, t in stock_tensors(model).items() if t.is_floating_point()}
    dtypes = sorted({str(t.dtype) for t in tensors.values()})
    config: Any = getattr(model, "config", None)
    options = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
    left_out = {"quantization_config", "_name_or_path", "dtype", "torch_dtype", "transformers_version"}
    return digest_of_json(
        {
            "schema": CACHE_SCHEMA,
            "model": digest_of_values(tensors),
            "config": {name: value for name, value in options.items() if name not in left_out},
            "dtypes": dtypes,
            "data": batching.fingerprint(batches),
        }
    )


def digest_of_json(content: Any) -> str:
    """Return a short hash of plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]
