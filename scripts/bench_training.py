"""Time and memory of a LoRA training step: ours, PEFT's, and the floor.

The floor is the frozen model with gradients for its inputs alone: what any adapter must pay. All three run
in one process, interleaved round by round, so that a machine that slows down slows all of them; the table
gives medians, and the median of the rounds' ratios to the floor. On a CPU only the ratios mean anything.

Saved activations are the bytes of all distinct storages that the graph behind the loss keeps for backward,
parameters and buffers left out, found by walking the graph. (Counting with saved-tensor hooks gives the same
for the floor and PEFT, but makes ours keep the SwiGLU product, which it otherwise multiplies again.)

    python scripts/bench_training.py --dtype float32 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import torch
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowrank_ft


def main() -> None:
    """Measure each dtype and print one table."""
    args = arguments()
    torch.set_num_threads(args.threads)
    rows = [row for dtype in args.dtype for row in measure(args, getattr(torch, dtype))]
    print(tabulate(rows, "keys", "github", floatfmt=".3f"))
    common.append(args.results, rows, **machine(args))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--model", help="another model than the assets' SmolLM2")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.dtype = args.dtype or ["float32", "bfloat16"]
    return args


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """Say what the figures were measured on."""
    on_gpu = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {args.threads} thread(s)",
        "tokens": f"{args.batch} x {args.length}",
        "rank": args.rank,
        "torch": torch.__version__,
    }


def measure(args: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return a row each for the floor, ours and PEFT's."""
    steps = contestants(args, dtype)
    saved = {name: saved_bytes(step(), model) for name, (model, step) in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(args.rounds + 2):
        for name, (model, step) in steps.items():
            seconds = timed(step, args.device)
            model.zero_grad(set_to_none=True)
            if round_number >= 2:  # the first rounds warm up
                times[name].append(seconds)
    floor = times["floor"]
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "step": name,
            "median ms": 1e3 * statistics.median(times[name]),
            "time / floor": statistics.median(t / f for t, f in zip(times[name], floor, strict=True)),
            "saved MB": saved[name] / 1e6,
            "saved / floor": saved[name] / saved["floor"],
        }
        for name in steps
    ]


def contestants(
    args: argparse.Namespace, dtype: torch.dtype
) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """Return each model with a function that runs its forward and returns the loss."""
    generator = torch.Generator().manual_seed(0)

    def base() -> Any:
        model = AutoModelForCausalLM.from_pretrained(args.model or args.assets / "smollm2", dtype=dtype).to(
            args.device
        )
        return model.requires_grad_(False).train()

    floor = base()
    ids = torch.randint(0, floor.config.vocab_size, (args.batch, args.length), generator=generator).to(
        args.device
    )

    def floor_step() -> Tensor:
        inputs = floor.get_input_embeddings()(ids).detach().requires_grad_(True)
        return floor(inputs_embeds=inputs, labels=ids).loss  # type: ignore[no-any-return]

    ours = lowrank_ft.wrap(base(), "lora", rank=args.rank, alpha=2 * args.rank)
    config = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear")
    theirs = get_peft_model(base(), config).train()
    return {
        "floor": (floor, floor_step),
        "lowrank_ft": (ours, lambda: ours(input_ids=ids, labels=ids).loss),
        "PEFT": (theirs, lambda: theirs(input_ids=ids, labels=ids).loss),
    }


def timed(step: Callable[[], Tensor], device: str) -> float:
    """Return the seconds of one forward and backward."""
    synchronize(device)
    start = time.perf_counter()
    step().backward()  # type: ignore[no-untyped-call]
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def saved_bytes(loss: Tensor, model: nn.Module) -> int:
    """Return the bytes that the graph behind ``loss`` keeps and the model does not own."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved_tensors(loss)}
    return sum(size for pointer, size in kept.items() if pointer not in own)


def saved_tensors(loss: Tensor) -> Iterator[Tensor]:
    """Yield every tensor that a node of the graph keeps."""
    stack: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        kept += list(getattr(node, "saved_tensors", ()))
        for value in kept:
            yield from (
                t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, Tensor)
            )
        stack += [parent for parent, _ in node.next_functions]


if __name__ == "__main__":
    main()
