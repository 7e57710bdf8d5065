"""Callbacks for any Trainer, and a context in which half-precision factors train in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from lowrank_ft import checkpoint, engine
from lowrank_ft.errors import NonFiniteError, StateError
from lowrank_ft.modules.quantized import Quantized


class AdapterCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Makes a Trainer's (or SFTTrainer's) checkpoints contain the adapters only, and resume exactly.

    From the trainer's creation to the end of training, ``checkpoint-*`` directories get the adapters, the
    optimiser, the scheduler and the random states, but not the frozen base; ``trainer.train(resume_from_
    checkpoint=True)`` reads them back. Beside Trainer's own files each has an ``adapter`` directory that
    :func:`lowrank_ft.load` reads. After training, ``save_pretrained`` writes the whole model again.

    Where several processes train, packed weights are sent once, when the trainer is made.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Set which tensors transformers' checkpoints leave out and DDP does not broadcast."""
        if not engine.hosts(model):
            raise StateError(
                "AdapterCheckpoint needs a model with an adapter: wrap() it before the Trainer is made."
            )
        always = getattr(type(model), "_keys_to_ignore_on_save", None) or ()
        model._keys_to_ignore_on_save = sorted(engine.frozen_keys(model).union(always))
        _share_packed(model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put an adapter directory beside Trainer's files."""
        if args.should_save:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter"
            ignored = model.__dict__.pop("_keys_to_ignore_on_save", None)  # a compressed base is saved whole
            try:
                checkpoint.save(model, directory)
            finally:
                if ignored is not None:
                    model._keys_to_ignore_on_save = ignored

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Let ``save_pretrained`` write everything again."""
        model.__dict__.pop("_keys_to_ignore_on_save", None)


def _share_packed(model: nn.Module) -> None:
    """Give every process the first one's packed weights, and keep DDP from sending them with every forward.

    They are buffers, all of which DistributedDataParallel broadcasts before each forward: the whole base.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    packed = {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if isinstance(module, Quantized)
        for key, tensor in module.packed.items()
    }
    for tensor in packed.values():
        # As bytes, since not every backend supports every dtype.
        torch.distributed.broadcast(tensor.view(torch.uint8), 0)
    if packed:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(packed))  # type: ignore[no-untyped-call]


class StopOnNonFinite(TrainerCallback):  # type: ignore[misc]
    """Stops training before a NaN or infinite gradient reaches the weights."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Check all gradients with one reduction.

        Raises:
            NonFiniteError: naming the first parameter at fault.
        """
        if args.fp16:
            return  # the loss scaler overflows on purpose and skips such steps itself
        named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
        if torch.nn.utils.get_total_norm([g for _, g in named]).isfinite():
            return
        culprit = next((n for n, g in named if not torch.isfinite(g).all()), named[0][0])
        raise NonFiniteError(
            f"The loss became NaN or infinite at step {state.global_step + 1} (seen in the gradient of "
            f"{culprit}). The weights still hold step {state.global_step}. Lower the learning rate, add "
            f"warm-up, train in float32, or look at the data of this step."
        )


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Hold factors that are kept in half precision in float32 while they train; round them at the end.

    In half precision most of an optimiser's steps would be rounded away.
    """
    kept = {
        name: dtype
        for host in engine.hosts(model).values()
        for name, node in host.nodes.items()
        if (dtype := getattr(node, "dtype", None)) in ("bfloat16", "float16")
    }
    for name in kept:
        engine.cast_adapters(model, "float32", name)
    yield
    for name, dtype in kept.items():
        engine.cast_adapters(model, dtype, name)
