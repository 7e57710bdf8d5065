"""Linear probes on compressed encoders: plain SVD, LoRD with uniform ranks and by loss, and MoDeGPT by loss.

MiniLM reads sentences of film reviews (Rotten Tomatoes; mean of the last hidden states), DINOv2 pictures of
clothes (Fashion-MNIST at 98 × 98 pixels; the class token). Compression sees training inputs and no labels. A
logistic regression on the features tells how much of what the encoder knew is left: *refit* fits it on the
compressed encoder's features, *kept* takes the one fitted on the dense encoder's, as an application would
that has stored features or a trained head. ``ratio`` is the share of the parameters in blocks that was
removed. Rows that are in the results file already are not run again.

    python scripts/prepare_encoders.py .cache/assets
    python scripts/bench_encoders.py
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import lowrank_ft
from lowrank_ft.pipeline import count

Batch = dict[str, Tensor]
LENGTH = 64  # tokens of a sentence
PIXELS = 98
TRAIN_IMAGES, TEST_IMAGES = 2000, 1000
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained
BATCH = 64
CALIBRATION_BATCH = 16
OPTIONS: dict[str, dict[str, Any]] = {
    "plain SVD": {"method": "lord", "objective": "weight"},
    "LoRD, uniform": {"method": "lord", "objective": "output"},
    "LoRD, by loss": {"method": "lord"},
    "MoDeGPT, by loss": {"method": "modegpt"},
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    encoder: str
    method: str
    ratio: float


@dataclass(frozen=True)
class Split:
    """Inputs in batches, and their labels in the same order."""

    batches: list[Batch]
    labels: list[int]


@dataclass(frozen=True)
class Task:
    """An encoder and the data that it is calibrated and probed on."""

    load: Callable[[], nn.Module]
    pool: Callable[[Any, Batch], Tensor]
    calibration: list[Batch]
    train: Split
    test: Split


@dataclass(frozen=True)
class Dense:
    """What the encoder is before compression: features of the test set, a probe, and its parameters."""

    test: Tensor
    probe: Any
    blocks: int


def rows(encoder: str) -> Iterator[Row]:
    """All rows of an encoder."""
    yield Row(encoder, "dense", 0.0)
    for ratio in (0.2, 0.4):
        for method in OPTIONS:
            yield Row(encoder, method, ratio)


def main() -> None:
    """Run what is missing and print the table."""
    parser = common.parser(__doc__, Path("docs/results/encoders.jsonl"))
    parser.add_argument("--encoder", choices=list(TASKS), help="one of them only")
    parser.add_argument("--gradient-samples", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()  # loading without the pooler is meant
    done = common.read(args.results)
    for encoder in [args.encoder] if args.encoder else list(TASKS):
        keys = [{**asdict(row), "gradient samples": args.gradient_samples} for row in rows(encoder)]
        missing = [key for key in keys if not common.is_done(key, done)]
        if not missing:
            continue
        task = TASKS[encoder](args.assets)
        dense = dense_of(task)
        for key in missing:
            done.append({**key, **measure(key, task, dense)})
            common.append(args.results, done[-1:])
            print(done[-1], flush=True)
    print(table(done))


def dense_of(task: Task) -> Dense:
    """Measure the encoder as it is, once for all rows."""
    model = task.load()
    probe = fitted(features(model, task, task.train), task.train)
    return Dense(features(model, task, task.test), probe, count(model).blocks)


def measure(key: dict[str, Any], task: Task, dense: Dense) -> dict[str, Any]:
    """Compress as the row says, and probe."""
    test, refit, blocks, seconds = dense.test, dense.probe, dense.blocks, 0.0
    if key["method"] != "dense":
        model = task.load()
        options = OPTIONS[key["method"]]
        data = None if options.get("objective") == "weight" else task.calibration
        settings = {"gradient_samples": key["gradient samples"]}
        started = time.perf_counter()
        lowrank_ft.wrap(model, ratio=key["ratio"], data=data, calibration=settings, **options)
        seconds = time.perf_counter() - started
        test, blocks = features(model, task, task.test), count(model).blocks
        refit = fitted(features(model, task, task.train), task.train)
    return {
        "removed of blocks": 1 - blocks / dense.blocks,
        "seconds": round(seconds, 1),
        "accuracy refit": float(refit.score(test.numpy(), task.test.labels)),
        "accuracy kept": float(dense.probe.score(test.numpy(), task.test.labels)),
        "relative error": ((test - dense.test).norm() / dense.test.norm()).item(),
    }


def features(model: nn.Module, task: Task, split: Split) -> Tensor:
    """Return one vector for each input, in the order of the labels."""
    with torch.no_grad():
        return torch.cat([task.pool(model(**batch), batch) for batch in split.batches])


def fitted(vectors: Tensor, split: Split) -> Any:
    """Fit a linear probe on features."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return probe.fit(vectors.numpy(), split.labels)


# MiniLM -----------------------------------------------------------------------------------------------------


def minilm(assets: Path) -> Task:
    """Sentences of film reviews, fresh or rotten; all of them."""
    tokenizer = AutoTokenizer.from_pretrained(assets / "minilm")
    train, test = (reviews(assets / f"rotten-tomatoes/{name}.jsonl") for name in ("train", "heldout"))
    # In the file's random order, so that the gradients' share of the sentences is no special one.
    texts = [row["text"] for row in train[:256]]
    chunks = [texts[i : i + CALIBRATION_BATCH] for i in range(0, len(texts), CALIBRATION_BATCH)]
    return Task(
        # The pooler is another task's head; features that are means never pass it.
        load=lambda: loaded(assets / "minilm", add_pooling_layer=False),
        pool=mean_of_tokens,
        calibration=[encoded(chunk, tokenizer) for chunk in chunks],
        train=sentences(train, tokenizer),
        test=sentences(test, tokenizer),
    )


def reviews(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sentences(rows: Sequence[dict[str, Any]], tokenizer: Any) -> Split:
    """Put sentences of like length into a batch, which saves padding."""
    ordered = sorted(rows, key=lambda row: len(row["text"]))
    chunks = [ordered[i : i + BATCH] for i in range(0, len(ordered), BATCH)]
    return Split(
        [encoded([row["text"] for row in chunk], tokenizer) for chunk in chunks],
        [row["label"] for row in ordered],
    )


def encoded(texts: list[str], tokenizer: Any) -> Batch:
    """Turn sentences into one padded batch."""
    out = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    return {key: out[key] for key in ("input_ids", "attention_mask")}


def mean_of_tokens(output: Any, batch: Batch) -> Tensor:
    """Return the mean of the last hidden states, padding apart."""
    mask = batch["attention_mask"][..., None].float()
    return torch.as_tensor((output.last_hidden_state * mask).sum(1) / mask.sum(1))


# DINOv2 -----------------------------------------------------------------------------------------------------


def dinov2(assets: Path) -> Task:
    """Pictures of clothes, of ten kinds; the first of each file, whose order is random."""
    train = pictures(assets / "fashion-mnist", "train", TRAIN_IMAGES)
    return Task(
        load=lambda: loaded(assets / "dinov2"),
        pool=lambda output, batch: output.pooler_output,
        calibration=batched(torch.cat([b["pixel_values"] for b in train.batches[:2]]), CALIBRATION_BATCH),
        train=train,
        test=pictures(assets / "fashion-mnist", "t10k", TEST_IMAGES),
    )


def pictures(folder: Path, name: str, number: int) -> Split:
    """Read IDX files, and make their pictures what DINOv2 takes; it interpolates its positions itself."""
    raw, labels = read_idx(folder, name, number)
    grey = raw.float() / 255
    large = nn.functional.interpolate(grey, size=(PIXELS, PIXELS), mode="bilinear").expand(-1, 3, -1, -1)
    pixels = (large - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
    return Split(batched(pixels, BATCH), labels.tolist())


def read_idx(folder: Path, name: str, number: int) -> tuple[Tensor, Tensor]:
    """Return the first pictures of IDX files, ``(n, 1, 28, 28)`` from 0 to 255, and their labels."""
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        raw = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)[:number]
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)[:number]
    return torch.from_numpy(raw.copy()), torch.from_numpy(labels.copy()).long()


def batched(pixels: Tensor, size: int) -> list[Batch]:
    """Cut pictures into batches."""
    return [{"pixel_values": part.contiguous()} for part in torch.split(pixels, size)]


# Both -------------------------------------------------------------------------------------------------------


TASKS: dict[str, Callable[[Path], Task]] = {"minilm": minilm, "dinov2": dinov2}


def loaded(path: Path, **options: Any) -> nn.Module:
    """Load an encoder."""
    model: nn.Module = AutoModel.from_pretrained(path, dtype=torch.float32, **options)
    return model.eval()


def table(done: list[dict[str, Any]]) -> str:
    """One line for each row: what is gone, and what is left."""
    lines = []
    order = list(TASKS)
    for row in sorted(done, key=lambda r: (order.index(r["encoder"]), r["ratio"], r["method"])):
        line = {key: row[key] for key in ("encoder", "method")}
        line["removed of blocks"] = f"{row['removed of blocks']:.1%}"
        for key in ("accuracy refit", "accuracy kept", "relative error"):
            line[key] = f"{row[key]:.3f}"
        line["seconds"] = f"{row['seconds']:.0f}"
        lines.append(line)
    return tabulate(lines, "keys", "github", disable_numparse=True)


if __name__ == "__main__":
    main()
