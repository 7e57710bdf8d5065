"""Run a model over the data block by block, keeping only the hidden states between two blocks.

To run one block, the model's own forward runs and computes the block's masks, positions and other arguments.
Each earlier block is replaced by a module that returns its recorded output, and an exception ends the forward
after the block. Compared with a plain forward, the embedding runs once more for each block.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowrank_ft.calibration.batches import Batch


class _ReachedError(Exception):
    """Carries a block's output out of the model's forward."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class _Ran(nn.Module):
    """Replaces a block that has run, and returns its recorded output."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not a child module, but its attributes can still be read
        self.output: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)


class Chain:
    """A model in which each block takes the output of the previous block as its input.

    Attributes:
        model: the model.
        name: the name of the ModuleList with the blocks.
        blocks: the ModuleList.
        shelf: directory for the hidden states between blocks; None keeps them in memory.
    """

    def __init__(self, model: nn.Module, name: str, blocks: nn.ModuleList, shelf: Path | None = None) -> None:
        self.model, self.name, self.blocks, self.shelf = model, name, blocks, shelf

    def __len__(self) -> int:
        return len(self.blocks)

    def block_of(self, module: str) -> int | None:
        """Return the index of the block that contains a module, or None."""
        if not module.startswith(f"{self.name}."):
            return None
        return int(module.removeprefix(f"{self.name}.").partition(".")[0])

    def run(self, index: int, batch: Batch, before: Any) -> Any:
        """Run one block on the output of the previous block, and return its output.

        Args:
            index: the block's index; ``len(self)`` runs the modules after the last block, and returns the
                model's output.
            batch: the model's inputs.
            before: output of block ``index − 1``; None for block 0.
        """
        if index == len(self):
            return self.resume(index, batch, before)

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            raise _ReachedError(output)

        handle = self.blocks[index].register_forward_hook(stop)
        try:
            with self._stand_ins(index, before):
                forward(self.model, batch)
        except _ReachedError as reached:
            return reached.output
        finally:
            handle.remove()
        raise RuntimeError(f"The forward never reached block {index} of {self.name}.")

    def resume(self, index: int, batch: Batch, before: Any) -> Any:
        """Run everything from block ``index`` on, and return the model's output."""
        with self._stand_ins(index, before):
            return forward(self.model, batch)

    @contextmanager
    def _stand_ins(self, upto: int, output: Any) -> Iterator[None]:
        real = list(self.blocks)
        try:
            for i in range(upto):
                stand_in = _Ran(real[i])
                stand_in.output = output
                self.blocks._modules[str(i)] = stand_in
            yield
        finally:
            for i in range(upto):
                self.blocks._modules[str(i)] = real[i]


def find_chain(model: nn.Module, batch: Batch, shelf: Path | None = None) -> Chain | None:
    """Return the model's chain of blocks, or None if it has none.

    The candidate is the outermost ``ModuleList`` with the most parameters. One forward checks that each block
    takes the output of the previous one.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        is_nested = any(name.startswith(f"{other}.") for other in lists)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not is_nested:
            lists[name] = module
    if not lists:
        return None
    name = max(lists, key=lambda n: sum(p.numel() for p in lists[n].parameters()))
    blocks = lists[name]
    inputs: dict[int, Any] = {}
    outputs: dict[int, Any] = {}
    handles = []
    for i, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(_recorder(inputs, i), with_kwargs=True))
        handles.append(block.register_forward_hook(lambda m, a, out, i=i: outputs.setdefault(i, out)))
    with hooks(handles), torch.no_grad():
        forward(model, {key: value[:1] for key, value in batch.items()})
    if len(inputs) != len(blocks) or len(outputs) != len(blocks):
        return None
    chained = all(hidden_of(outputs[i]) is inputs[i + 1] for i in range(len(blocks) - 1))
    return Chain(model, name, blocks, shelf) if chained else None


def _recorder(inputs: dict[int, Any], index: int) -> Callable[[Any, Any, Any], None]:
    def record(module: Any, args: Any, kwargs: Any) -> None:
        inputs[index] = hidden_argument(args, kwargs)

    return record


def hidden_argument(args: Any, kwargs: Any) -> Any:
    """Return the hidden states among a block's arguments."""
    return args[0] if args else kwargs.get("hidden_states")


def hidden_of(output: Any) -> Tensor:
    """Return the hidden states in a block's output."""
    return output if isinstance(output, Tensor) else output[0]


def forward(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch, on the model's device, without computing its loss and without a KV cache."""
    parameter = next(model.parameters())
    inputs = {
        key: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for key, value in batch.items()
        if key != "labels"
    }
    config = getattr(model, "config", None)
    if getattr(config, "use_cache", None):
        inputs["use_cache"] = False  # type: ignore[assignment]
    return model(**inputs)


class _Shelved:
    """A block's output on disk, deleted when nothing refers to it."""

    def __init__(self, output: Any, shelf: Path) -> None:
        leaves, self._spec = pytree.tree_flatten(output)
        self._rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        handle, name = tempfile.mkstemp(dir=shelf, suffix=".safetensors")
        os.close(handle)
        self._path = Path(name)
        save_file({str(i): t.contiguous() for i, t in enumerate(leaves) if isinstance(t, Tensor)}, self._path)

    def read(self) -> Any:
        tensors = load_file(self._path)
        leaves = [tensors[str(i)].clone() if str(i) in tensors else r for i, r in enumerate(self._rest)]
        return pytree.tree_unflatten(leaves, self._spec)

    def __del__(self) -> None:
        self._path.unlink(missing_ok=True)


def offload(output: Any, shelf: Path | None) -> Any:
    """Detach a block's output and move it to the CPU, or to a file in the directory ``shelf``."""
    on_cpu = pytree.tree_map(lambda t: t.detach().cpu() if isinstance(t, Tensor) else t, output)
    return on_cpu if shelf is None else _Shelved(on_cpu, shelf)


def onload(output: Any, device: torch.device, *, leaf: bool = False) -> Any:
    """Undo :func:`offload`; with ``leaf`` the hidden states require a gradient."""
    if isinstance(output, _Shelved):
        output = output.read()
    moved = pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, output)
    if leaf:
        hidden = hidden_of(moved).detach().requires_grad_(True)
        return hidden if isinstance(moved, Tensor) else (hidden, *moved[1:])
    return moved


@contextmanager
def hooks(handles: Sequence[Any]) -> Iterator[None]:
    """Run the block, then remove these hooks."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def by_block(chain: Chain | None, names: Sequence[str]) -> Mapping[int | None, list[str]]:
    """Group module names by the index of the block that contains them; None for those outside all blocks."""
    groups: dict[int | None, list[str]] = {}
    for name in names:
        groups.setdefault(None if chain is None else chain.block_of(name), []).append(name)
    return groups
