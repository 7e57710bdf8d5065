"""What adapters buy on pictures of clothes (Fashion-MNIST), against PEFT's, a new head alone and full tuning.

``EfficientNet-Lite0`` (96 × 96 pixels; 1×1 and depthwise convolutions) and a ``ResNet`` for faces (104 ×
104; 28 convolutions of 3×3): a Tucker update (FLoRA) of the convolutions at equal numbers, 2000 pictures in
3 epochs, 2000 to test on. Each adapter of the first has at most as many numbers as a LoRA of rank 4 on the
33 convolutions without groups; PEFT's methods cannot act on the 16 depthwise ones, so that *33 layers* says
what a method does without them; of the second, as a LoRA of rank 4. ``cost``: a step's time over full
tuning's, interleaved, and what backward keeps.

``5 shots``, ``10 shots``: DINOv2 ViT-S (98 × 98 pixels) learns from as many pictures of each class,
adapters on all linear layers, 1000 pictures to test on: NOLA's claim, as good as a LoRA at its size or half
of it.

Batch norms keep their statistics, and nothing is dropped. A method's rate is the best of those listed on
other pictures by the first seed, which draws the head's start, the order and the shots.

    python scripts/prepare_encoders.py .cache/assets --face-resnet
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from benchmarks import face_resnet
from benchmarks.contestants import Contestant, Contestants, ours, sweep, trained_numbers
from benchmarks.measuring import interleaved, saved_bytes, timed
from benchmarks.peers import peft_adapters as peft
from benchmarks.pictures import CLASSES, Pictures, as_dinov2, channels_last, clothes, enlarged
from benchmarks.suite import Key, Lab, Measured, Row, Suite
from benchmarks.tables import Columns, Table, at_best_rate, count, highest, mean, ordered, value
from benchmarks.training import Groups, cosine, drawn, train

HEAD_RATE = 1e-2  # of few shots, for all methods


@dataclass(frozen=True)
class Task:
    """A network with a new head, its data, and who adapts it."""

    load: Callable[[Lab], nn.Module]
    prepared: Callable[[Tensor], Tensor]  # turns grey pictures from 0 … 255 into the network's input
    counts: tuple[int, int, int]  # pictures to train on (or to draw from), to choose the rate by, to test on
    batch: int
    steps: int
    contestants: Contestants
    shots: int = 0  # pictures of each class to train on; 0 for all


def head(model: nn.Module, seed: int) -> nn.Module:
    """Train the new head alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("classifier" in name)
    return model


def full(model: nn.Module, seed: int) -> nn.Module:
    """Train everything but EfficientNet-Lite's gates, which are the identity."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("squeeze_excite" not in name)
    return model


def classifier(name: str, lab: Lab) -> nn.Module:
    """Return one of transformers' image classifiers with a new head."""
    model: nn.Module = AutoModelForImageClassification.from_pretrained(
        lab.assets / name, num_labels=CLASSES, ignore_mismatched_sizes=True
    )
    return model


def on_convolutions(
    method: str, *rates: float, seeds: int = 1, exclude: Sequence[str] = (), **options: Any
) -> Contestant:
    """Return a method on all convolutions, or all but some."""
    where = {"targets": "all-conv", "exclude": exclude, "modules_to_save": ["classifier"]}
    return Contestant(ours(method, **where, **options), rates, seeds)


def on_linear(method: str, *rates: float, seeds: int, **options: Any) -> Contestant:
    """Return a method on all linear layers."""
    where = {"exclude": "classifier", "modules_to_save": ["classifier"]}
    return Contestant(ours(method, **where, **options), rates, seeds)


GATES, SOME, PAPER = ["*squeeze_excite*"], ["*squeeze_excite*", "*depthwise_conv"], "kaiming-normal"
R = (3e-3, 1e-2)
every, some = partial(on_convolutions, exclude=GATES), partial(on_convolutions, exclude=SOME)
flora = partial(every, "flora", *R, budget=91_372)  # a LoRA of rank 4 on 33 layers
EFFICIENTNET: Contestants = {
    "FLoRA": flora(seeds=3),
    "LoRA": every("lora", *R, rank=3, rank_pattern={"*depthwise_conv": 2}, seeds=3),
    "FLoRA, paper's start": flora(init=PAPER, seeds=3),
    "FLoRA, the paper": flora(init=PAPER, rank_kernel=3, full_modes="factor"),
    "FLoRA, paper's start, scale 4": flora(init=PAPER, scale=4.0),
    "FLoRA, HOSVD factors": flora(init="hosvd"),
    "FLoRA, 33 layers": some("flora", *R, budget=91_372),
    "LoRA, 33 layers": some("lora", *R, rank=4),
    "LoRA (PEFT), 33 layers": Contestant(peft.CONVOLUTION_LORA, R),
    "LoHa (PEFT), 33 layers": Contestant(peft.CONVOLUTION_LOHA, R),
    "LoKr (PEFT), 33 layers": Contestant(peft.CONVOLUTION_LOKR, R),
    "head": Contestant(head, R),
    "full": Contestant(full, (3e-4, 1e-3)),
}
R3 = (1e-3, 3e-3, 1e-2)
RESNET: Contestants = {
    "FLoRA": on_convolutions("flora", *R3, budget=133_452, seeds=3),  # a LoRA of rank 4
    "LoRA": on_convolutions("lora", *R3, rank=4, seeds=3),
    "FLoRA, paper's start": on_convolutions("flora", *R3, budget=133_452, init=PAPER, seeds=3),
    "LoRA (PEFT)": Contestant(peft.CONVOLUTION_LORA, R3),
    "LoHa (PEFT)": Contestant(peft.CONVOLUTION_LOHA, R3),
    "LoKr (PEFT)": Contestant(peft.CONVOLUTION_LOKR_EFFECTIVE, R3),
    "head": Contestant(head, R),
    "full": Contestant(full, (1e-4, 3e-4, 1e-3)),
}


def few_shots(shots: int, seeds: int) -> Task:
    """Return DINOv2 on a few pictures of each class; a LoRA of rank 1 has 82,944 numbers there."""
    contestants = {
        "head": Contestant(head, (0.0,), seeds),
        "LoRA r=1": on_linear("lora", *R3, rank=1, seeds=seeds),
        "LoRA r=4": on_linear("lora", *R3, rank=4, seeds=seeds),
        "NOLA, LoRA r=1's size": on_linear("nola", *R, 3e-2, rank=4, bases=576, seeds=seeds),
        "NOLA, half of it": on_linear("nola", *R, 3e-2, rank=4, bases=288, seeds=seeds),
    }
    return Task(partial(classifier, "dinov2"), as_dinov2, (5000, 300, 1000), 10, 100, contestants, shots)


SIZES, FACES = (2000, 500, 2000), "face-resnet/model.safetensors"
TASKS = {
    "EfficientNet-Lite0": Task(
        load=partial(classifier, "efficientnet-lite0"),
        prepared=lambda grey: (enlarged(grey, 96) - 127) / 128,
        counts=SIZES, batch=32, steps=187, contestants=EFFICIENTNET,
    ),
    "ResNet": Task(
        load=lambda lab: face_resnet.FaceResNet.load(lab.assets / FACES, CLASSES),
        prepared=lambda grey: face_resnet.normalised(enlarged(grey, 104)),
        counts=SIZES, batch=32, steps=187, contestants=RESNET,
    ),
    "5 shots": few_shots(5, seeds=3),
    "10 shots": few_shots(10, seeds=1),
}  # fmt: skip


def jobs(rows: Sequence[Row]) -> Iterator[Key]:
    """Yield each task's sweep, and the costs on the convolutional networks."""
    for name, task in TASKS.items():
        yield from sweep(task.contestants, rows, highest("validation"), {"part": "accuracy", "task": name})
        if not task.shots:
            yield {"part": "cost", "task": name}


@cache
def data(lab: Lab, name: str) -> tuple[Pictures, Pictures, Pictures]:
    """Return pictures to train on, to choose the rate by, and to test on; few for a quick run."""
    task = TASKS[name]
    first, validation, test = (lab.size(number, 96) for number in task.counts)
    first = task.counts[0] if task.shots else first
    pool = clothes(lab, "train", first + validation, task.prepared)
    return pool[:first], pool[first:], clothes(lab, "t10k", test, task.prepared)


def wrapped(task: Task, contestant: Contestant, seed: int, lab: Lab) -> nn.Module:
    """Return the network with a new head and the method on it, as it evaluates."""
    torch.manual_seed(seed)  # the new head's start
    return channels_last(contestant.wrap(channels_last(task.load(lab).eval()), seed)).eval()


def logits_of(model: nn.Module, task: Task, pixels: Tensor) -> Tensor:
    """Run the model; under bf16 autocast for few shots."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(task.shots)):
        out = model(pixel_values=pixels.contiguous(memory_format=torch.channels_last))
    logits: Tensor = getattr(out, "logits", out)
    return logits


def loss_of(model: nn.Module, task: Task, pictures: Pictures) -> Tensor:
    """Return the mean loss of a batch."""
    return nn.functional.cross_entropy(logits_of(model, task, pictures.pixels).float(), pictures.classes)


def measure(job: Key, lab: Lab) -> Measured:
    """Train and measure, or measure the costs."""
    task = TASKS[job["task"]]
    if job["part"] == "cost":
        yield from costs(task, lab)
        return
    shown, validation, test = data(lab, job["task"])
    model, seed = wrapped(task, task.contestants[job["method"]], job["seed"], lab), job["seed"]
    if task.shots:
        order = torch.randperm(len(shown), generator=torch.Generator().manual_seed(seed))
        shown = shown[torch.cat([order[shown.classes[order] == c][: task.shots] for c in range(CLASSES)])]
    steps = lab.size(task.steps, 3)
    batches = (shown[part] for part in drawn(len(shown), task.batch, steps, seed))
    losses = (partial(loss_of, model, task, batch) for batch in batches)
    seconds, _ = timed(lambda: train(groups(model, task, job["rate"]), losses, cosine(steps)))
    accuracies = {"validation": accuracy(model, task, validation), "test": accuracy(model, task, test)}
    yield {}, {"trained": trained_numbers(model), "seconds": seconds, **accuracies}


def groups(model: nn.Module, task: Task, rate: float) -> Groups:
    """Return what trains; with few shots the head has a rate of its own."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not task.shots:
        return [([p for _, p in named], rate)]
    halves = [([p for n, p in named if ("classifier" in n) is on_head], on_head) for on_head in (True, False)]
    return [(part, HEAD_RATE if on_head else rate) for part, on_head in halves if part]


def accuracy(model: nn.Module, task: Task, pictures: Pictures) -> float:
    """Return the share of pictures put into their class."""
    with torch.no_grad():
        logits = torch.cat([logits_of(model, task, part) for part in torch.split(pictures.pixels, 100)])
    return int((logits.argmax(1) == pictures.classes).sum()) / len(pictures)


def costs(task: Task, lab: Lab) -> Measured:
    """Yield each method's step time and what backward keeps."""
    names = list(task.contestants)[: lab.size(100, 2)]
    models = {
        name: wrapped(task, task.contestants[name], 0, lab) for name in {**dict.fromkeys(names), "full": None}
    }
    pixels = task.prepared(torch.zeros(task.batch, 1, 28, 28))
    batch = Pictures(torch.randn(pixels.shape), torch.zeros(task.batch, dtype=torch.long))

    def step(model: nn.Module) -> None:
        torch.autograd.backward(loss_of(model, task, batch))
        model.zero_grad(set_to_none=True)

    times = interleaved(
        {name: partial(step, model) for name, model in models.items()}, lab.size(15, 1), warm_up=2
    )
    for name, model in models.items():
        saved = saved_bytes(loss_of(model, task, batch), model)
        yield {"method": name}, {"step / full": times.ratio(name, "full"), "saved MB": saved / 1e6}


BEST, SHOTS = at_best_rate(highest("validation"), "task", "method"), ("5 shots", "10 shots")


def of_network(name: str) -> Table:
    """Return a network's table: a line for each method, mean and deviation over seeds."""
    accuracies: Columns = {
        "method": "",
        "trained": ",",
        "accuracy": mean("test"),
        "rate": "g",
        "seeds": count("test"),
    }
    methods = list(TASKS[name].contestants)
    return Table(
        by=("method",),
        columns={**accuracies, "step / full": ".2f", "kept for backward (MB)": value("saved MB", ".0f")},
        where={"task": [name], "method": methods},
        prepare=BEST,
        order=ordered("method", methods),
    )


FEW = Table(
    by=("method",),
    columns={
        "method": "",
        "trained": ",",
        "{}": mean("test"),
        "rate, {}": value(lambda row: row["rate"] or None, "g"),
    },
    where={"task": SHOTS},
    across=("task", SHOTS),
    prepare=BEST,
)
TABLES = {"efficientnet": of_network("EfficientNet-Lite0"), "resnet": of_network("ResNet"), "shots": FEW}
QUICK = {"part": "accuracy", "task": "EfficientNet-Lite0", "method": "FLoRA", "seed": 0, "rate": 1e-2}
SUITE = Suite(jobs, measure, TABLES, QUICK)
