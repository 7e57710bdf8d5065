"""FLoRA on convolutions: what a Tucker update of a real network's convolutions buys, at equal numbers.

A network with a new head learns Fashion-MNIST from 2000 pictures in 3 epochs, and is tested on 2000 others.

* EfficientNet-Lite0 (96 × 96 pixels): 1×1 and depthwise convolutions. Each adapter has at most as many
  numbers as a LoRA of rank 4 on the 33 convolutions without groups, the head's left out. PEFT's LoRA cannot
  act on the 16 depthwise ones, so that *33 layers* says what a method does without them. Batch norms keep
  their statistics.
* A ResNet for faces (104 × 104 pixels): 28 convolutions of 3×3 and one of 7×7, at most as many numbers as a
  LoRA of rank 4.

Each method's rate is the best of those listed on 500 further pictures, by its first seed. *Head* trains
nothing else; *full* everything.

    python scripts/prepare_encoders.py .cache/assets --face-resnet
    python scripts/bench_flora.py --part 0/2 & python scripts/bench_flora.py --part 1/2; wait
    python scripts/bench_flora.py --cost      # step time and memory, on a quiet machine

Rows that are in the results file are not run again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import common
import face_resnet
import torch
from bench_encoders import read_idx
from bench_training import saved_bytes
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification
from transformers.utils import logging

import lowrank_ft

CLASSES, BATCH, EPOCHS = 10, 32, 3
TRAIN, VALIDATION, TEST = 2000, 500, 2000
RATES = (3e-3, 1e-2)
Wrap = Callable[[nn.Module, int], nn.Module]


@dataclass(frozen=True)
class Contestant:
    """A method, the rates to try, and for how many seeds it runs."""

    wrap: Wrap
    rates: tuple[float, ...] = RATES
    seeds: int = 1


@dataclass(frozen=True)
class Pictures:
    """Pixels ``(n, 3, height, width)`` and classes."""

    pixels: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Network:
    """A network, its input, and who adapts it.

    Attributes:
        load: from the assets, with a new head, in evaluation mode even in training: nothing is dropped, and
            batch norms keep their statistics.
        logits: of a batch of pictures.
        pixels: of a side.
        normalised: turns pictures from 0 … 255 into what it takes.
        contestants: by name.
    """

    load: Callable[[Path], nn.Module]
    logits: Callable[[nn.Module, Tensor], Tensor]
    pixels: int
    normalised: Callable[[Tensor], Tensor]
    contestants: dict[str, Contestant]


def ours(method: str, **options: Any) -> Wrap:
    """One of ours, by default on all convolutions."""

    def wrap(model: nn.Module, seed: int) -> nn.Module:
        where = {"targets": "all-conv", "modules_to_save": ["classifier"], **options}
        return lowrank_ft.wrap(model, method, seed=seed, **where)

    return wrap


def theirs(config: type[Any], **options: Any) -> Wrap:
    """PEFT's, on the convolutions without groups."""

    def wrap(model: nn.Module, seed: int) -> nn.Module:
        found = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
        targets = [name for name in found if "squeeze_excite" not in name]
        torch.manual_seed(seed)
        where = {"target_modules": targets, "modules_to_save": ["classifier"]}
        return get_peft_model(model, config(**where, **options))  # type: ignore[no-any-return]

    return wrap


def head(model: nn.Module, seed: int) -> nn.Module:
    """Train the new head alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    return model


def full(model: nn.Module, seed: int) -> nn.Module:
    """Train everything."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("squeeze_excite" not in name)
    return model


def efficientnet() -> Network:
    """EfficientNet-Lite0, whose gates are the identity and no target."""
    every: dict[str, Any] = {"exclude": ["*squeeze_excite*"]}
    some: dict[str, Any] = {"exclude": ["*squeeze_excite*", "*depthwise_conv"]}
    tucker: dict[str, Any] = {"method": "flora", "budget": 91_372}  # a LoRA of rank 4 on 33 layers
    paper: dict[str, Any] = {**tucker, "init": PAPER}
    contestants = {
        "FLoRA": Contestant(ours(**tucker, **every), seeds=3),
        "LoRA": Contestant(ours("lora", rank=3, rank_pattern={"*depthwise_conv": 2}, **every), seeds=3),
        "FLoRA, paper's start": Contestant(ours(**paper, **every), seeds=3),
        "FLoRA, the paper": Contestant(ours(**paper, **every, rank_kernel=3, full_modes="factor")),
        "FLoRA, paper's start, scale 4": Contestant(ours(**paper, **every, scale=4.0)),
        "FLoRA, HOSVD factors": Contestant(ours(**tucker, **every, init="hosvd")),
        "FLoRA, 33 layers": Contestant(ours(**tucker, **some)),
        "LoRA, 33 layers": Contestant(ours("lora", rank=4, **some)),
        "LoRA (PEFT), 33 layers": Contestant(theirs(LoraConfig, r=4, lora_alpha=4)),
        "LoHa (PEFT), 33 layers": Contestant(theirs(LoHaConfig, r=2, alpha=2)),
        "LoKr (PEFT), 33 layers": Contestant(theirs(LoKrConfig, r=16, alpha=16, decompose_factor=4)),
        "head": Contestant(head),
        "full": Contestant(full, rates=(3e-4, 1e-3)),
    }

    def load(assets: Path) -> nn.Module:
        path = assets / "efficientnet-lite0"
        model: nn.Module = AutoModelForImageClassification.from_pretrained(
            path, num_labels=CLASSES, ignore_mismatched_sizes=True
        )
        return model.eval()

    def logits(model: nn.Module, pixels: Tensor) -> Tensor:
        found: Tensor = model(pixel_values=pixels).logits
        return found

    return Network(load, logits, 96, lambda pixels: (pixels - 127) / 128, contestants)


def resnet() -> Network:
    """The ResNet for faces."""
    tucker: dict[str, Any] = {"method": "flora", "budget": 133_452}  # a LoRA of rank 4
    rates = (1e-3, 3e-3, 1e-2)
    lokr = {"r": 16, "alpha": 16, "decompose_factor": 4, "use_effective_conv2d": True}
    contestants = {
        "FLoRA": Contestant(ours(**tucker), rates, seeds=3),
        "LoRA": Contestant(ours("lora", rank=4), rates, seeds=3),
        "FLoRA, paper's start": Contestant(ours(**tucker, init=PAPER), rates, seeds=3),
        "LoRA (PEFT)": Contestant(theirs(LoraConfig, r=4, lora_alpha=4), rates),
        "LoHa (PEFT)": Contestant(theirs(LoHaConfig, r=2, alpha=2), rates),
        "LoKr (PEFT)": Contestant(theirs(LoKrConfig, **lokr), rates),
        "head": Contestant(head, (3e-3, 1e-2)),
        "full": Contestant(full, (1e-4, 3e-4, 1e-3)),
    }

    def load(assets: Path) -> nn.Module:
        return face_resnet.FaceResNet.load(assets / "face-resnet" / "model.safetensors", CLASSES).eval()

    def logits(model: nn.Module, pixels: Tensor) -> Tensor:
        found: Tensor = model(pixels)
        return found

    return Network(load, logits, 104, face_resnet.normalised, contestants)


PAPER = "kaiming-normal"  # with the core at zero
NETWORKS = {"EfficientNet-Lite0": efficientnet(), "ResNet": resnet()}


def main() -> None:
    """Run what is missing, and print the table."""
    parser = common.parser(__doc__, Path("docs/results/flora.jsonl"))
    parser.add_argument("--part", default="0/1", help="which share of the runs to do, such as 0/2")
    parser.add_argument("--cost", action="store_true", help="measure step time and memory, and train nothing")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each method that are timed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()  # a new head is meant
    for name, network in NETWORKS.items():
        if args.cost:
            common.append(args.results, costs(network, args), network=name)
        else:
            run_missing(name, network, args)
    for name in NETWORKS:
        print(f"{name}\n\n{table(name, common.read(args.results))}\n")


def run_missing(network_name: str, network: Network, args: argparse.Namespace) -> None:
    """Train this part's contestants: every rate with the first seed, the best with the others."""
    pool = pictures(network, args.assets, "train", TRAIN + VALIDATION)
    train = Pictures(pool.pixels[:TRAIN], pool.classes[:TRAIN])
    validation = Pictures(pool.pixels[TRAIN:], pool.classes[TRAIN:])
    held_out = {"validation": validation, "test": pictures(network, args.assets, "t10k", TEST)}
    part, parts = (int(n) for n in args.part.split("/"))
    for name, contestant in list(network.contestants.items())[part::parts]:
        for seed in range(contestant.seeds):
            tried = (
                contestant.rates if seed == 0 else (best_rate(network_name, name, common.read(args.results)),)
            )
            for rate in tried:
                key = {"network": network_name, "method": name, "seed": seed, "rate": rate}
                if not common.is_done(key, common.read(args.results)):
                    row = {**key, **run(network, contestant, rate, seed, train, held_out, args)}
                    common.append(args.results, [row])
                    print(row, flush=True)


def best_rate(network: str, name: str, rows: list[dict[str, Any]]) -> float:
    """Return the rate that was best on the validation pictures, by the first seed."""
    own = [r for r in rows if r["network"] == network and r["method"] == name]
    return float(max((r for r in own if r.get("seed") == 0), key=lambda r: float(r["validation"]))["rate"])


def pictures(network: Network, assets: Path, name: str, number: int) -> Pictures:
    """Read the first pictures of an IDX file, whose order is random, as the network takes them."""
    raw, classes = read_idx(assets / "fashion-mnist", name, number)
    size = (network.pixels, network.pixels)
    large = nn.functional.interpolate(raw.float(), size=size, mode="bilinear")
    return Pictures(network.normalised(large.expand(-1, 3, -1, -1)), classes)


def wrapped(network: Network, contestant: Contestant, seed: int, assets: Path) -> nn.Module:
    """Return the network with a new head and the method on it, in the memory layout that is fast on a CPU."""
    torch.manual_seed(seed)  # the new head's start
    return channels_last(contestant.wrap(channels_last(network.load(assets)), seed))


def channels_last(model: nn.Module) -> nn.Module:
    """Lay the weights of convolutions out as a CPU reads them fastest."""
    return cast(Any, model).to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def trained_numbers(model: nn.Module) -> int:
    """Return how many numbers are trained, the head's left out."""
    named = model.named_parameters()
    return sum(p.numel() for n, p in named if p.requires_grad and "classifier" not in n)


def run(
    network: Network,
    contestant: Contestant,
    rate: float,
    seed: int,
    train: Pictures,
    held_out: dict[str, Pictures],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Train and measure."""
    model = wrapped(network, contestant, seed, args.assets)
    start = time.perf_counter()
    fit(network, model, train, rate, seed)
    seconds = time.perf_counter() - start
    measured = {name: accuracy(network, model, part) for name, part in held_out.items()}
    return {"trained": trained_numbers(model), "seconds": seconds, **measured}


def fit(network: Network, model: nn.Module, rows: Pictures, rate: float, seed: int) -> None:
    """Train: AdamW, a short warm-up, then a cosine to zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    count = len(rows.classes)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(EPOCHS)])
    steps = len(order) // BATCH
    for step in tqdm(range(steps), leave=False):
        share = min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * share
        part = order[step * BATCH : (step + 1) * BATCH]
        loss = loss_of(network, model, rows.pixels[part], rows.classes[part])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def loss_of(network: Network, model: nn.Module, pixels: Tensor, classes: Tensor) -> Tensor:
    """Return the mean loss of a batch."""
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    return nn.functional.cross_entropy(network.logits(model, pixels), classes)


def accuracy(network: Network, model: nn.Module, rows: Pictures) -> float:
    """Return the share of pictures put into their class."""
    right = 0
    parts = (torch.split(tensor, 100) for tensor in (rows.pixels, rows.classes))
    for pixels, classes in zip(*parts, strict=True):
        with torch.no_grad():
            right += int((network.logits(model, pixels).argmax(1) == classes).sum())
    return right / len(rows.classes)


def costs(network: Network, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return each method's step time and what backward keeps; methods take turns."""
    models = {name: wrapped(network, who, 0, args.assets) for name, who in network.contestants.items()}
    pixels = torch.randn(BATCH, 3, network.pixels, network.pixels)
    classes = torch.zeros(BATCH, dtype=torch.long)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in tqdm(range(args.rounds + 2)):
        for name, model in models.items():
            start = time.perf_counter()
            loss_of(network, model, pixels, classes).backward()  # type: ignore[no-untyped-call]
            times[name].append(time.perf_counter() - start)
            model.zero_grad(set_to_none=True)
    full_time = times["full"][2:]
    return [
        {
            "method": name,
            "step / full": statistics.median(t / f for t, f in zip(times[name][2:], full_time, strict=True)),
            "saved MB": saved_bytes(loss_of(network, model, pixels, classes), model) / 1e6,
        }
        for name, model in models.items()
    ]


def table(network: str, rows: list[dict[str, Any]]) -> str:
    """One line for each method: mean and standard deviation over seeds."""
    lines = []
    for name in NETWORKS[network].contestants:
        own = [r for r in rows if r["network"] == network and r["method"] == name]
        trained, cost = ([r for r in own if key in r] for key in ("test", "saved MB"))
        if not trained:
            continue
        rate = best_rate(network, name, rows)
        best = [r for r in trained if r["rate"] == rate]
        found = [float(r["test"]) for r in best]
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        lines.append(
            {
                "method": name,
                "trained": f"{best[0]['trained']:,}",
                "accuracy": f"{statistics.mean(found):.3f}{spread}",
                "rate": f"{rate:g}",
                "seeds": len(found),
                "step / full": f"{cost[-1]['step / full']:.2f}" if cost else "",
                "kept for backward (MB)": f"{cost[-1]['saved MB']:.0f}" if cost else "",
            }
        )
    return tabulate(lines, "keys", "github", disable_numparse=True)


if __name__ == "__main__":
    main()
