"""Load a checkpoint in a fresh process and compare its logits, to prove that it is complete."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_ft.checkpoint import loading
from lowrank_ft.errors import CheckpointError

# Environment variables of launchers; the fresh process must not join a group.
_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def reload_difference(
    model: nn.Module, base: str | None, directory: Path, inputs: Mapping[str, Tensor]
) -> float:
    """Return the largest difference between a model's logits and those of its checkpoint, loaded afresh.

    On one kind of machine with one number of threads it is 0: the checkpoint holds every bit.

    Args:
        model: the model that was saved, in memory.
        base: where its base model is loaded from, a directory or a hub name; None where ``directory`` holds
            the whole model.
        directory: what was saved.
        inputs: keyword arguments of the model.

    Raises:
        CheckpointError: the fresh process could not load the checkpoint.
    """
    device, dtype = next(model.parameters()).device, str(_base_dtype(model)).removeprefix("torch.")
    was_training = model.training
    with torch.no_grad():
        here = model.eval()(**{k: v.to(device) for k, v in inputs.items()}).logits.float().cpu()
    model.train(was_training)
    environment = {
        k: v for k, v in os.environ.items() if k not in _LAUNCHER and not k.startswith("TORCHELASTIC")
    }
    with tempfile.TemporaryDirectory() as scratch:
        given, written = Path(scratch) / "inputs.safetensors", Path(scratch) / "logits.safetensors"
        save_file({k: v.contiguous() for k, v in inputs.items()}, given)
        threads = str(torch.get_num_threads())
        arguments = [base or "", str(directory), dtype, str(device), threads, str(given), str(written)]
        command = [sys.executable, "-m", "lowrank_ft.checkpoint.verify", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
            raise CheckpointError(f"A fresh process could not load {directory}: {reason[0]}")
        there = load_file(written)["logits"]
    return float((here - there).abs().max())


def _base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that most of the base is in; adapters may be in a wider one."""
    frozen = [p.dtype for p in model.parameters() if not p.requires_grad]
    return frozen[0] if frozen else next(model.parameters()).dtype


def main() -> None:
    """Run the fresh process."""
    base, directory, dtype, device, threads, given, written = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = loading.load_any(base, directory, dtype)[0] if base else loading.load_whole(directory, dtype)
    inputs = {k: v.to(device) for k, v in load_file(given).items()}
    with torch.no_grad():
        logits = model.to(device).eval()(**inputs).logits
    save_file({"logits": logits.float().cpu().contiguous()}, written)


if __name__ == "__main__":
    main()
