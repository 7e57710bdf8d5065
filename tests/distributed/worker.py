"""One of two gloo processes: runs the recipe and checks that it was not alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from lowrank_ft import cli
from lowrank_ft.modules.quantized import Quantized
from lowrank_ft.recipes import training


def main() -> None:
    expected, output, *args = sys.argv[1:]
    seen: list[Any] = []
    original = Trainer.train

    def train(self: Any, *positional: Any, **named: Any) -> Any:
        result = original(self, *positional, **named)
        seen.append((self.model, self.model_wrapped))
        return result

    Trainer.train = train
    training.finetune(cli.parse(training.FinetuneConfig, args, "finetune"))
    ((model, wrapped),) = seen

    world = dist.get_world_size() if dist.is_initialized() else 1
    assert world == int(expected), f"{world} processes instead of {expected}"
    assert world == 1 or isinstance(wrapped, DistributedDataParallel)
    if world > 1:  # a packed base is sent once, and not with every forward
        sent = {id(buffer) for buffer in wrapped.modules_buffers}
        packed = [t for m in model.modules() if isinstance(m, Quantized) for t in m.packed.values()]
        assert not sent & {id(tensor) for tensor in packed}
        own = torch.cat([tensor.view(torch.uint8) for tensor in packed]) if packed else torch.zeros(1)
        first = own.clone()
        dist.broadcast(first, 0)
        assert torch.equal(own, first), "the processes hold other packed weights"
    flat = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    if world > 1:
        gathered = [torch.empty_like(flat) for _ in range(world)]
        dist.all_gather(gathered, flat)
        assert all(torch.equal(gathered[0], other) for other in gathered), "the processes hold other weights"
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(flat, Path(output))  # the test's own file
    del model, wrapped
    seen.clear()
    training.leave_process_group()


if __name__ == "__main__":
    main()
