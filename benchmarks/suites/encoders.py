"""Encoders with float weights, compressed or in few bits: what is left of their features.

MiniLM reads sentences of film reviews (Rotten Tomatoes; mean of the last hidden states), DINOv2 pictures of
clothes (Fashion-MNIST at 98 × 98 pixels; the class token). ``compression``: plain SVD, LoRD with uniform
ranks and by loss, MoDeGPT by loss; *ratio* is the share of the parameters in blocks that was removed.
``features``: linear layers in 3 and 2 bits (blocks of 64), with factors of rank 8 where a method has them.
Both see training inputs and no labels. A logistic regression tells what is left: *refit* fits it on the
changed encoder's features, *kept* takes the one fitted on the dense encoder's, as an application would that
has stored features.

``finetune``: MiniLM with a new head learns to tell fresh from rotten (an epoch, batches of 32, the same
order for all), its linear layers in 2.5, 3 and 4 bits, scales and factors of rank 4 included, and in full
precision.

    python scripts/prepare_encoders.py .cache/assets
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import lowrank_ft
from benchmarks.measuring import timed
from benchmarks.pictures import as_dinov2, clothes
from benchmarks.quantizers import bits_of, quantise
from benchmarks.suite import Key, Lab, Measured, Row, Suite
from benchmarks.tables import Table, value
from benchmarks.training import drawn, one_cycle, train, trainable
from lowrank_ft import engine
from lowrank_ft.engine.counting import count
from lowrank_ft.recipes import models

BATCH, CALIBRATION_BATCH, CALIBRATION, LENGTH = 64, 16, 256, 64
PEAK_RATE = 1e-3
COMPRESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain SVD": ("lord", {"objective": "weight"}),
    "LoRD, uniform": ("lord", {"objective": "output"}),
    "LoRD, by loss": ("lord", {}),
    "MoDeGPT, by loss": ("modegpt", {}),
}
QUANTISERS = ("NF, to nearest", "signed, to nearest", "LQ-LoRA, no data", "LQ-LoRA, Fisher",
              "LQ-LoRA, activation", "LQ-LoRA, loss")  # fmt: skip
TUNED = ("QLoRA, program", "LQ-LoRA, Fisher", "LQ-LoRA, loss", "full precision")
Batch = dict[str, Tensor]
Labelled = list[tuple[Batch, Tensor]]  # inputs in batches, and their labels


@dataclass(frozen=True)
class Encoder:
    """An encoder, and the inputs that it is calibrated and probed on."""

    load: Callable[[], nn.Module]
    pool: Callable[[Any, Batch], Tensor]
    calibration: list[Batch]
    train: Labelled
    test: Labelled

    def features(self, model: nn.Module, rows: Labelled) -> Tensor:
        """Return one vector for each input."""
        with torch.no_grad():
            return torch.cat([self.pool(model(**batch), batch) for batch, _ in rows])

    def probe(self, model: nn.Module) -> Any:
        """Return a logistic regression that is fitted on the features."""
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        return classifier.fit(self.features(model, self.train).numpy(), labels_of(self.train))


def labels_of(rows: Labelled) -> Any:
    """Return all labels."""
    return torch.cat([labels for _, labels in rows]).numpy()


@cache
def reviews(lab: Lab, part: str) -> list[dict[str, Any]]:
    """Return film reviews, each with its label."""
    lines = (lab.assets / f"rotten-tomatoes/{part}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: lab.size(10**6, 96)]]


def encoded(lab: Lab, rows: list[dict[str, Any]], size: int) -> Labelled:
    """Turn reviews into padded batches."""
    tokenizer = AutoTokenizer.from_pretrained(lab.assets / "minilm")
    batches = []
    for chunk in (rows[i : i + size] for i in range(0, len(rows), size)):
        texts, labels = [row["text"] for row in chunk], torch.tensor([row["label"] for row in chunk])
        out = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        batches.append(({name: out[name] for name in ("input_ids", "attention_mask")}, labels))
    return batches


def by_length(lab: Lab, part: str) -> Labelled:
    """Put reviews of like length into a batch, which saves padding."""
    return encoded(lab, sorted(reviews(lab, part), key=lambda row: len(row["text"])), BATCH)


def first_reviews(lab: Lab) -> Labelled:
    """Return the reviews to calibrate on, the first ones, whose order is random."""
    return encoded(lab, reviews(lab, "train")[:CALIBRATION], CALIBRATION_BATCH)


def minilm(lab: Lab) -> Encoder:
    """Return MiniLM on all reviews, without its pooler: features that are means never pass it."""

    def mean_of_tokens(output: Any, batch: Batch) -> Tensor:
        mask = batch["attention_mask"][..., None].float()
        return torch.as_tensor((output.last_hidden_state * mask).sum(1) / mask.sum(1))

    load = partial(
        AutoModel.from_pretrained, lab.assets / "minilm", dtype=torch.float32, add_pooling_layer=False
    )
    train, test = by_length(lab, "train"), by_length(lab, "heldout")
    return Encoder(load, mean_of_tokens, [batch for batch, _ in first_reviews(lab)], train, test)


def dinov2(lab: Lab) -> Encoder:
    """Return DINOv2 on the first pictures of each file, whose order is random."""
    splits = []
    for name, number in (("train", 2000), ("t10k", 1000)):
        pictures = clothes(lab, name, lab.size(number, 96), as_dinov2)
        parts = zip(torch.split(pictures.pixels, BATCH), torch.split(pictures.classes, BATCH), strict=True)
        splits.append([({"pixel_values": pixels.contiguous()}, classes) for pixels, classes in parts])
    first = torch.cat([batch["pixel_values"] for batch, _ in splits[0][:2]])
    calibration = [{"pixel_values": part.contiguous()} for part in torch.split(first, CALIBRATION_BATCH)]
    load = partial(AutoModel.from_pretrained, lab.assets / "dinov2", dtype=torch.float32)
    return Encoder(load, lambda output, batch: output.pooler_output, calibration, *splits)


ENCODERS = {"minilm": minilm, "dinov2": dinov2}


@cache
def dense(lab: Lab, name: str) -> tuple[Encoder, Tensor, Any, float]:
    """Return an encoder as it is: its features of the test set, a probe, and that probe's accuracy."""
    encoder = ENCODERS[name](lab)
    model = encoder.load()
    features, probe = encoder.features(model, encoder.test), encoder.probe(model)
    return encoder, features, probe, float(probe.score(features.numpy(), labels_of(encoder.test)))


def jobs(rows: Sequence[Row]) -> Iterator[Key]:
    """Yield all rows of the three parts."""
    for encoder in ENCODERS:
        yield {"part": "compression", "encoder": encoder, "method": "dense", "ratio": 0.0}
        for ratio in (0.2, 0.4):
            for method in COMPRESSORS:
                yield {"part": "compression", "encoder": encoder, "method": method, "ratio": ratio}
        for bits in (3, 2):
            for method in QUANTISERS:
                yield {"part": "features", "encoder": encoder, "method": method, "bits": bits}
    yield {"part": "finetune", "encoder": "minilm", "method": "full precision", "bits": 32}
    for budget in (3.0, 2.5, 4.0):
        for method in ("LQ-LoRA, loss", "QLoRA, program", "LQ-LoRA, Fisher"):
            yield {"part": "finetune", "encoder": "minilm", "method": method, "bits": budget}


def measure(job: Key, lab: Lab) -> Measured:
    """Do a job."""
    if job["part"] == "finetune":
        yield {}, finetuned(job["method"], job["bits"], lab)
        return
    encoder, before, probe, accuracy = dense(lab, job["encoder"])
    model, method = encoder.load(), job["method"]
    blocks, seconds = count(model).blocks, 0.0
    given: dict[str, Any] = {"data": encoder.calibration}
    if job["part"] == "features":
        seconds, _ = timed(lambda: quantise(model, method, given, rank=8, bits=job["bits"], budget=None))
    elif method != "dense":
        name, options = COMPRESSORS[method]
        given = {} if options.get("objective") == "weight" else given
        settings = {"gradient_samples": 64}
        wrap = partial(lowrank_ft.wrap, model, name, ratio=job["ratio"], calibration=settings)
        seconds, _ = timed(partial(wrap, **options, **given))
    after = encoder.features(model, encoder.test)
    kept = float(probe.score(after.numpy(), labels_of(encoder.test)))
    error = ((after - before).norm() / before.norm()).item()
    figures = {"seconds": seconds, "kept": kept, "dense": accuracy, "relative error": error}
    if job["part"] == "features":
        yield {}, {**bits_of(model), **figures}
    else:
        refit = encoder.probe(model).score(after.numpy(), labels_of(encoder.test))
        removed = 1 - count(model).blocks / blocks
        yield {}, {"removed of blocks": removed, "refit": float(refit), **figures}


def finetuned(method: str, budget: float, lab: Lab) -> dict[str, Any]:
    """Quantise MiniLM with a new head, train it, and return its accuracy on held-out reviews."""
    torch.manual_seed(0)  # of the new head
    padding = AutoTokenizer.from_pretrained(lab.assets / "minilm").pad_token_id
    model = models.load_classifier(str(lab.assets / "minilm"), "float32", ["rotten", "fresh"], padding)
    model.eval()  # without dropout: an epoch is short
    seconds = 0.0
    if method != "full precision":
        data = [{**batch, "labels": labels} for batch, labels in first_reviews(lab)]
        given = {"data": data, "modules_to_save": ("classifier",)}
        seconds, _ = timed(lambda: quantise(model, method, given, rank=4, bits=None, budget=budget))
    if not engine.hosts(model):
        lowrank_ft.wrap(model, "lora", rank=4, modules_to_save=("classifier",))
    lowrank_ft.cast_adapters(model, "float32")
    untrained, rows = accuracy(model, lab), reviews(lab, "train")

    def loss_of(part: Tensor) -> Tensor:
        ((batch, labels),) = encoded(lab, [rows[i] for i in part.tolist()], len(part))
        loss: Tensor = model(**batch, labels=labels).loss
        return loss

    steps = len(rows) // 32
    losses = (partial(loss_of, part) for part in drawn(len(rows), 32, steps))
    train(trainable(model, PEAK_RATE), losses, one_cycle(steps, PEAK_RATE), clip=1.0)
    lowrank_ft.cast_adapters(model, "bfloat16")
    figures = {"untrained": untrained, "accuracy": accuracy(model, lab)}
    return {**bits_of(model), "seconds": seconds, **figures}


def accuracy(model: nn.Module, lab: Lab) -> float:
    """Return the share of held-out reviews that are told right."""
    rows = by_length(lab, "heldout")
    with torch.no_grad():
        right = [int((model(**batch).logits.argmax(-1) == labels).sum()) for batch, labels in rows]
    return sum(right) / len(reviews(lab, "heldout"))


def place(row: Row) -> tuple[Any, ...]:
    """Return where a line stands: by encoder, ratio or bits, and method."""
    methods, by_ratio = ["dense", *COMPRESSORS, *QUANTISERS], row["part"] == "compression"
    amount = row["ratio"] if by_ratio else -row["bits"]
    return list(ENCODERS).index(row["encoder"]), amount, methods.index(row["method"])


NAMES = {"encoder": "", "method": ""}
COMPRESSION = Table(
    by=("encoder", "method", "ratio"),
    columns={**NAMES, "removed of blocks": ".0%", "refit": ".3f", "kept": ".3f", "relative error": ".3f"},
    where={"part": ["compression"]},
    order=place,
)
FEATURES = Table(
    by=("encoder", "method", "bits"),
    columns={**NAMES, "bits": value("stored bits", ".3f"), "relative error": ".3f", "kept": ".3f"},
    where={"part": ["features"]},
    order=place,
)
FINETUNE = Table(
    by=("bits",),
    columns={"bits": "g", "{}": value("accuracy", ".3f")},
    where={"part": ["finetune"]},
    across=("method", TUNED),
    order=lambda row: -row["bits"],
)
TABLES = {"compression": COMPRESSION, "features": FEATURES, "finetune": FINETUNE}
QUICK = {"part": "features", "encoder": "minilm", "method": "LQ-LoRA, loss", "bits": 2}
SUITE = Suite(jobs, measure, TABLES, QUICK)
