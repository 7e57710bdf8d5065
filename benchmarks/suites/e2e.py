"""Adapters of SmolLM2 on E2E: what their bytes buy (``sizes``), and FLoRA beside LoRA (``flora``).

Attributes of a restaurant are turned into a sentence; the loss is that of the sentence's tokens, in nats,
on sets of attributes that training has not seen. Every run has 80 steps of 8 examples, in the order of its
seed, on all linear layers. A method's rate is the best of those listed by its first seed. A NOLA is trained
once and measured at several bits a coefficient; "4 trained" trained rounded. Bytes are those of the saved
adapter with its metadata, without the model card. ``flora`` compares at equal numbers, at the rates best
for a LoRA: on a linear layer a Tucker update reaches no more than a LoRA of the smaller of its ranks, and
pays for a core.

    python scripts/prepare_assets.py .cache/assets --e2e
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import lowrank_ft
from benchmarks import language
from benchmarks.contestants import Contestant, Contestants, Ours, ours, sweep, trained_numbers
from benchmarks.peers.peft_adapters import TINYLORA, UNILORA, VERA
from benchmarks.suite import Key, Lab, Measured, Row, Suite
from benchmarks.tables import Columns, Plot, Table, at_best_rate, count, lowest, mean, ordered
from benchmarks.training import cosine, drawn, train, trainable
from lowrank_ft import engine

BATCH, STEPS, BITS, IGNORED = 8, 80, (32, 8, 4), -100
Example = dict[str, Tensor]


def nola(bases: int, *rates: float, seeds: int = 1, **options: object) -> Contestant:
    """Return a NOLA of rank 16."""
    return Contestant(ours("nola", rank=16, bases=bases, **options), rates or (3e-2,), seeds)


NUMBERS = 1_221_120  # of a LoRA of rank 4
CONTESTANTS: dict[str, Contestants] = {
    "sizes": {
        "LoRA r=1": Contestant(ours("lora", rank=1), (1e-3, 3e-3, 1e-2, 3e-2), seeds=3),
        "LoRA r=4": Contestant(ours("lora", rank=4), (3e-3, 1e-2)),
        "LoRA r=16": Contestant(ours("lora", rank=16), (3e-3, 1e-2)),
        "NOLA k=8": nola(8),
        "NOLA k=16": nola(16),
        "NOLA k=32": nola(32),
        "NOLA k=64": nola(64, seeds=3),
        "NOLA k=128": nola(128, 1e-2, 3e-2, 1e-1, seeds=3),
        "NOLA k=128, 4 trained": nola(128, bits=4, train_rounded=True),
        "NOLA k=256": nola(256),
        "NOLA k=727": nola(727, 1e-2, 3e-2),
        "VeRA r=256 (PEFT)": Contestant(VERA, (1e-2, 3e-2)),
        "Uni-LoRA d=53760 (PEFT)": Contestant(UNILORA, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
        "TinyLoRA r=2, u=64 (PEFT)": Contestant(TINYLORA, (1e-3, 3e-3, 1e-2, 3e-2)),
    },
    "flora": {
        "LoRA r=4": Contestant(ours("lora", rank=4), (1e-2,), seeds=2),
        "FLoRA": Contestant(ours("flora", budget=NUMBERS), (1e-2,), seeds=2),
        "FLoRA, paper's start": Contestant(
            ours("flora", budget=NUMBERS, init="kaiming-normal"), (3e-3, 1e-2)
        ),
    },
}


def jobs(rows: Sequence[Row]) -> Iterator[Key]:
    """Yield both comparisons' sweeps."""
    for comparison, contestants in CONTESTANTS.items():
        yield from sweep(contestants, rows, lowest("loss"), {"comparison": comparison})


def measure(job: Key, lab: Lab) -> Measured:
    """Train a fresh model; yield a row for each number of bits."""
    wrap = CONTESTANTS[job["comparison"]][job["method"]].wrap
    model = wrap(language.load(lab), job["seed"])
    trained = trained_numbers(model)
    fit(model, lab, job["rate"], job["seed"])
    stored: tuple[int, ...] = (32,)
    if isinstance(wrap, Ours) and wrap.method == "nola":
        stored = (wrap.options["bits"],) if "bits" in wrap.options else BITS
    for bits in stored:
        if isinstance(wrap, Ours) and bits < stored[0]:
            store_in(model, bits, job["seed"], wrap)
        figures = {"loss": held_out_loss(model, lab), "before": loss_before(lab), "trained": trained}
        yield {"bits": bits}, {**figures, "bytes": bytes_of(model)}


def store_in(model: nn.Module, bits: int, seed: int, nola: Ours) -> None:
    """Put the trained coefficients on again, kept in fewer bits, and make them the active ones."""
    first, name = {n: p for n, p in model.named_parameters() if ".default." in n}, f"bits{bits}"
    lowrank_ft.wrap(model, "nola", name=name, seed=seed, bits=bits, **nola.options)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                parameter.copy_(first[key.replace(f".{name}.", ".default.")])


def bytes_of(model: nn.Module) -> int:
    """Return the size of the saved adapter that is active, without the model card."""
    with tempfile.TemporaryDirectory() as directory:
        if hasattr(model, "peft_config"):
            model.save_pretrained(directory)  # type: ignore[operator]
        else:
            lowrank_ft.save(model, Path(directory) / "a", name=engine.active_adapters(model)[0])
        return sum(f.stat().st_size for f in Path(directory).rglob("*") if f.is_file() and f.suffix != ".md")


@cache
def examples(lab: Lab, part: str) -> list[Example]:
    """Return tokens and labels of the part ``train`` or ``heldout``; the prompt has no labels."""
    tokenizer, rows = language.tokenizer_of(lab), []
    for line in (lab.assets / f"e2e/{part}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([IGNORED] * len(prompt) + answer)
        rows.append({"input_ids": torch.tensor(prompt + answer), "labels": labels})
    return rows


def collated(rows: list[Example]) -> Example:
    """Pad on the right; a causal model does not look there."""
    padding = {"input_ids": 0, "labels": IGNORED}
    return {
        name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def fit(model: nn.Module, lab: Lab, rate: float, seed: int) -> None:
    """Train under bf16 autocast on batches in the seed's order."""
    rows, steps = examples(lab, "train"), lab.size(STEPS, 2)

    def loss_of(part: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = model(**collated([rows[i] for i in part.tolist()])).loss
        return loss

    model.train()
    losses = (partial(loss_of, part) for part in drawn(len(rows), BATCH, steps, seed))
    train(trainable(model, rate), losses, cosine(steps), clip=1.0)


def held_out_loss(model: nn.Module, lab: Lab) -> float:
    """Return the mean loss in nats per token of the held-out answers."""
    rows = examples(lab, "heldout")[::2][: lab.size(10**6, 16)]
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    total, count = 0.0, 0
    for start in range(0, len(rows), 16):
        batch = collated(rows[start : start + 16])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model.eval()(input_ids=batch["input_ids"]).logits[:, :-1].float()
        labels = batch["labels"][:, 1:].flatten()
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return total / count


@cache
def loss_before(lab: Lab) -> float:
    """Return the held-out loss of the model as it comes."""
    return held_out_loss(language.load(lab), lab)


def with_gains(rows: Sequence[Row]) -> Sequence[Row]:
    """Return the rows at the best rates, with their gain over the mean gain of a LoRA of rank 1."""
    best = at_best_rate(lowest("loss"), "method")(rows)
    gains = [row["before"] - row["loss"] for row in best if row["method"] == "LoRA r=1"]
    reference = sum(gains) / max(1, len(gains)) or float("nan")
    shares = [(row["before"] - row["loss"]) / reference for row in best]
    return [replace(r, figures={**r.figures, "gain": share}) for r, share in zip(best, shares, strict=True)]


LOSS, GAIN = {"held-out loss": mean("loss")}, {"of LoRA r=1's gain": mean("gain", ".1%", spread=False)}
RATE: Columns = {"rate": "g", "seeds": count("loss")}
SUMMARY = (("NOLA k=64", 4), ("NOLA k=128", 4), ("LoRA r=1", 32))


def kind(row: Row) -> str:
    """Return the line of the plot that a row is on."""
    family = row["method"].split()[0]
    return f"NOLA, {row['bits']} bits" if family == "NOLA" else "LoRA" if family == "LoRA" else row["method"]


SIZES = Table(
    by=("method", "bits"),
    columns={"method": "", "bits": "", "bytes": ",", "trained": ",", **LOSS, **GAIN, **RATE},
    where={"comparison": ["sizes"]},
    prepare=with_gains,
    order=lambda row: row["bytes"],
)
FEW = replace(
    SIZES,
    columns={"method": "", "bits": "", "bytes": ",", **LOSS, **GAIN},
    prepare=lambda rows: [row for row in with_gains(rows) if (row["method"], row["bits"]) in SUMMARY],
)
FLORA = Table(
    by=("method",),
    columns={"method": "", "trained": ",", **LOSS, **RATE},
    where={"comparison": ["flora"]},
    prepare=at_best_rate(lowest("loss"), "method"),
    order=ordered("method", CONTESTANTS["flora"]),
)
PLOT = Plot(
    file="nola_sizes.png",
    x=lambda row: float(row["bytes"]),
    y=lambda row: float(row["loss"]),
    label=kind,
    axes={
        "xscale": "log",
        "xlabel": "adapter on disk, bytes, metadata included",
        "ylabel": "held-out loss (nats)",
    },
    prepare=lambda rows: [
        row
        for row in with_gains([r for r in rows if r["comparison"] == "sizes"])
        if "trained" not in row["method"]
    ],
)
QUICK = {"comparison": "sizes", "method": "NOLA k=128", "seed": 0, "rate": 3e-2}
SUITE = Suite(jobs, measure, {"sizes": SIZES, "summary": FEW, "flora": FLORA}, QUICK, PLOT)
