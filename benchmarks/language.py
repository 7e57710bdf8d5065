"""The language model of the suites, its texts, and what is done with it: losses, a short recovery."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.suite import Lab
from benchmarks.tables import Rows
from benchmarks.training import drawn, one_cycle, train, trainable
from lowrank_ft.calibration.texts import text_ids
from lowrank_ft.recipes import evaluation

LENGTH = 512  # tokens of a window
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MLP = PROJECTIONS[-3:]
WIKIPEDIA = "wikipedia/train.jsonl"
HELD_OUT = {
    "wikipedia": "wikipedia/heldout.jsonl", "brown": "brown/heldout.jsonl",
    "python": "code/heldout.jsonl", "humaneval": "code/humaneval.jsonl",
}  # fmt: skip


def load(lab: Lab, dtype: torch.dtype = torch.float32, quantization_config: Any = None) -> nn.Module:
    """Return SmolLM2 in eval mode, quantised by transformers where a config says so."""
    path, more = lab.assets / "smollm2", {"quantization_config": quantization_config}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **more)
    return model.to(lab.device).eval()


@cache
def tokenizer_of(lab: Lab) -> Any:
    """Return its tokenizer."""
    return AutoTokenizer.from_pretrained(lab.assets / "smollm2")


@cache
def texts(lab: Lab, path: str) -> list[str]:
    """Return the texts of a JSON-lines file among the assets."""
    lines = (lab.assets / path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@cache
def tokens(lab: Lab, path: str) -> Tensor:
    """Return a corpus as one row of tokens."""
    return text_ids(texts(lab, path), tokenizer_of(lab))


def windows(lab: Lab, path: str, count: int = 10**6, length: int = LENGTH) -> Tensor:
    """Return windows spread evenly over a corpus, ``(count, length)``; all of them by default."""
    return evaluation.spread_windows(tokens(lab, path), length, count)


def losses(model: nn.Module, lab: Lab, counts: Mapping[str, int]) -> dict[str, float]:
    """Return the loss in nats per token on so many held-out windows of each corpus, first tokens left out."""
    corpora = {name: windows(lab, HELD_OUT[name], lab.size(count, 1)) for name, count in counts.items()}
    return {f"loss {name}": evaluation.window_loss(model, ids, name) for name, ids in corpora.items()}


def against_dense(rows: Rows) -> Rows:
    """Return the rows with the rise of each loss over the dense model's, and the perplexity."""
    dense = {corpus: loss for row in rows if row["method"] == "dense" for corpus, loss in row.figures.items()}
    compared = []
    for row in rows:
        names = [name.removeprefix("loss ") for name in row.figures if name.startswith("loss ")]
        more = {f"rise {name}": row[f"loss {name}"] - dense[f"loss {name}"] for name in names}
        more.update({f"perplexity {name}": math.exp(row[f"loss {name}"]) for name in names})
        compared.append(replace(row, figures={**row.figures, **more}))
    return compared


def sequences(lab: Lab, count: int, batch: int = 4) -> list[dict[str, Tensor]]:
    """Return the first sequences of 512 tokens of Wikipedia's training articles, in batches."""
    tokenizer = tokenizer_of(lab)
    ids = [token for text in texts(lab, WIKIPEDIA)[:40] for token in tokenizer(text)["input_ids"]]
    rows = torch.tensor(ids[: count * LENGTH]).view(-1, LENGTH)
    return [{"input_ids": part} for part in torch.split(rows, batch)]


def forward(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """Run a model on batches, and nothing else."""
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)


def calibrated(lab: Lab, path: str = WIKIPEDIA, draw: int = 0, *, sequential: bool = False) -> dict[str, Any]:
    """Return what ``wrap`` takes to calibrate on a corpus: 128 sequences, 32 of them for gradients."""
    sizes = {"samples": lab.size(128, 4), "gradient_samples": lab.size(32, 2), "length": LENGTH, "seed": draw}
    settings = {**sizes, "sequential": sequential, "cache": str(lab.cache / "calibration")}
    return {"data": texts(lab, path), "tokenizer": tokenizer_of(lab), "calibration": settings}


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return a model's loss on windows."""
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def recover(model: nn.Module, lab: Lab, steps: int, rate: float) -> None:
    """Train what trains for a few steps of 4 × 256 tokens of Wikipedia."""
    rows = windows(lab, WIKIPEDIA, length=256)
    steps_losses = (partial(loss_of, model, rows[part]) for part in drawn(len(rows), 4, steps))
    model.train()
    train(trainable(model, rate), steps_losses, one_cycle(steps, rate), clip=1.0)
    model.eval()
