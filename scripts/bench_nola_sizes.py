"""What an adapter's size on disk buys: held-out loss against bytes, on SmolLM2 and E2E.

Attributes of a restaurant are turned into a sentence; the loss is that of the sentence's tokens, in nats, on
sets of attributes that training has not seen. Every run has the same steps and the same examples in the order
of its seed. Each method's rate is the best of those listed, by its first seed; methods on the frontier have
two more. A NOLA is trained once and measured at several bits a coefficient; ``4 trained`` trained rounded.
Bytes are those of the saved adapter with its metadata (values and config), without the model card.

Rows that are in the results file are not run again; several processes can share the work (``--part``).

    python scripts/bench_nola_sizes.py --part 0/2 & python scripts/bench_nola_sizes.py --part 1/2; wait
    python scripts/bench_nola_sizes.py --plot docs/nola_sizes.png
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common
import torch
from peft import TinyLoraConfig, UniLoraConfig, VeraConfig, get_peft_model
from tabulate import tabulate
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft

BATCH, RANK = 8, 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Contestant:
    """A method at one size.

    Attributes:
        name: in the tables.
        rates: learning rates to try.
        wrap: puts it on a model and returns the model.
        bits: at which a NOLA is measured.
        frontier: whether it gets three seeds.
    """

    name: str
    rates: tuple[float, ...]
    wrap: Callable[[nn.Module, int], nn.Module]
    bits: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    frontier: bool = True


def lora(rank: int) -> Contestant:
    rates = (1e-3, 3e-3, 1e-2, 3e-2) if rank == 1 else (3e-3, 1e-2)

    def wrap(model: nn.Module, seed: int) -> nn.Module:
        return lowrank_ft.wrap(model, "lora", rank=rank, seed=seed)

    return Contestant(f"LoRA r={rank}", rates, wrap, frontier=rank == 1)


def nola(bases: int, trained_bits: int = 32) -> Contestant:
    options: dict[str, Any] = {"rank": RANK, "bases": bases}
    if trained_bits < 32:
        options.update(bits=trained_bits, train_rounded=True)

    def wrap(model: nn.Module, seed: int) -> nn.Module:
        return lowrank_ft.wrap(model, "nola", seed=seed, **options)

    known = {128: (1e-2, 3e-2, 1e-1), 727: (1e-2, 3e-2)}
    rates = known.get(bases, (3e-2,)) if trained_bits == 32 else (3e-2,)
    name = f"NOLA k={bases}" + (f", {trained_bits} trained" if trained_bits < 32 else "")
    bits = (32, 8, 4) if trained_bits == 32 else (trained_bits,)
    return Contestant(name, rates, wrap, bits, options, frontier=bases in (64, 128) and trained_bits == 32)


def theirs(name: str, config: Callable[[int], Any], rates: tuple[float, ...]) -> Contestant:
    def wrap(model: nn.Module, seed: int) -> nn.Module:
        return get_peft_model(model, config(seed))  # type: ignore[no-any-return]

    return Contestant(name, rates, wrap, frontier=False)


def vera(seed: int) -> VeraConfig:
    return VeraConfig(r=256, target_modules=PROJECTIONS, projection_prng_key=seed, save_projection=False)


def unilora(seed: int) -> UniLoraConfig:
    return UniLoraConfig(r=4, theta_d_length=53760, target_modules=PROJECTIONS, proj_seed=seed)


def tinylora(seed: int) -> TinyLoraConfig:
    return TinyLoraConfig(r=2, u=64, target_modules=PROJECTIONS, projection_seed=seed, save_projection=False)


CONTESTANTS = [
    lora(1), nola(128),
    lora(4), nola(64),
    theirs("VeRA r=256 (PEFT)", vera, (1e-2, 3e-2)), nola(32),
    nola(256), theirs("Uni-LoRA d=53760 (PEFT)", unilora, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    theirs("TinyLoRA r=2, u=64 (PEFT)", tinylora, (1e-3, 3e-3, 1e-2, 3e-2)), nola(128, 4),
    lora(16), nola(16),
    nola(8), nola(727),
]  # fmt: skip


def main() -> None:
    """Run what is missing, and print the table."""
    parser = common.parser(__doc__, Path("docs/results/nola_sizes.jsonl"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", default="0/1", help="which share of the runs to do, such as 0/2")
    parser.add_argument("--plot", type=Path, help="write the plot here, and run nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.plot is None:
        part, parts = (int(n) for n in args.part.split("/"))
        for contestant in CONTESTANTS[part::parts]:
            for rate in contestant.rates:
                ensure(contestant, rate, 0, args)
            for seed in range(1, args.seeds if contestant.frontier else 1):
                ensure(contestant, best_rate(contestant, common.read(args.results)), seed, args)
    rows = common.read(args.results)
    print(table(rows))
    if args.plot is not None:
        plot(rows, args.plot)


def best_rate(contestant: Contestant, rows: list[dict[str, Any]]) -> float:
    """Return the rate of the lowest loss with the first seed."""
    first = [r for r in rows if r["method"] == contestant.name and r["seed"] == 0]
    return float(min(first, key=lambda row: float(row["loss"]))["rate"])


def ensure(contestant: Contestant, rate: float, seed: int, args: argparse.Namespace) -> None:
    """Train and measure once, unless that was done, and append the rows."""
    key = {"method": contestant.name, "rate": rate, "seed": seed, "steps": args.steps}
    if not common.is_done(key, common.read(args.results)):
        found = [{**key, **row} for row in run(contestant, rate, seed, args)]
        common.append(args.results, found)
        print(found, flush=True)


def run(contestant: Contestant, rate: float, seed: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train a fresh model; yield a row for each number of bits."""
    model = AutoModelForCausalLM.from_pretrained(args.assets / "smollm2", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.assets / "smollm2")
    train, held_out = (examples(args.assets / "e2e" / f"{p}.jsonl", tokenizer) for p in ("train", "heldout"))
    held_out = held_out[::2]
    known = common.read(args.results)
    before = known[0]["before"] if known else loss_of(model, held_out)
    model = contestant.wrap(model, seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fit(model, train, rate, seed, args.steps)
    for bits in contestant.bits or (32,):
        if bits != 32 and not contestant.options.get("train_rounded"):
            rounded(model, bits, seed, contestant.options)
        loss = loss_of(model, held_out)
        size = bytes_of(model)
        yield {"bits": bits, "loss": loss, "before": before, "trained": trained, "bytes": size}


def rounded(model: nn.Module, bits: int, seed: int, options: dict[str, Any]) -> None:
    """Put the trained coefficients on again, kept in fewer bits, and make them the active ones."""
    first, name = {n: p for n, p in model.named_parameters() if ".default." in n}, f"bits{bits}"
    lowrank_ft.wrap(model, "nola", name=name, seed=seed, bits=bits, **options)
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
            (active,) = lowrank_ft.engine.active_adapters(model)
            lowrank_ft.save(model, Path(directory) / "a", name=active)
        files = [f for f in Path(directory).rglob("*") if f.is_file() and f.suffix != ".md"]
        return sum(f.stat().st_size for f in files)


def examples(path: Path, tokenizer: Any) -> list[Batch]:
    """Return tokens and labels; the prompt has none."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor(prompt + answer)
        found.append({"input_ids": ids, "labels": torch.tensor([-100] * len(prompt) + answer)})
    return found


def collated(rows: list[Batch]) -> Batch:
    """Pad on the right; a causal model does not look there."""
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([r["input_ids"] for r in rows], batch_first=True, padding_value=0),
        "labels": pad([r["labels"] for r in rows], batch_first=True, padding_value=-100),
    }


def fit(model: nn.Module, rows: list[Batch], rate: float, seed: int, steps: int) -> None:
    """Train under bf16 autocast: AdamW, a short warm-up, then a cosine to zero."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    order = [i for _ in range(-(-steps * BATCH // len(rows)))
             for i in torch.randperm(len(rows), generator=generator).tolist()]  # fmt: skip
    for step in tqdm(range(steps), leave=False):
        warm, left = min(1.0, (step + 1) / 10), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * warm * left
        batch = collated([rows[i] for i in order[step * BATCH : (step + 1) * BATCH]])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def loss_of(model: nn.Module, rows: list[Batch]) -> float:
    """Return the mean loss in nats per token of the answers."""
    total = count = 0.0
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    model.eval()
    for start in range(0, len(rows), 16):
        batch = collated(by_length[start : start + 16])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        total, count = total + float(loss), count + int((labels != -100).sum())
    return total / count


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each method and number of bits, at its best rate, the smallest first."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        rate = min((r for r in own if r["seed"] == 0), key=lambda row: float(row["loss"]))["rate"]
        for bits in dict.fromkeys(row["bits"] for row in own):
            runs = [r for r in own if r["rate"] == rate and r["bits"] == bits]
            losses = [r["loss"] for r in runs]
            spread = statistics.stdev(losses) if len(losses) > 1 else None
            same = {key: runs[0][key] for key in ("method", "bits", "rate", "bytes", "trained", "before")}
            found.append({**same, "seeds": len(runs), "loss": statistics.mean(losses), "spread": spread})
    return sorted(found, key=lambda row: int(row["bytes"]))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table, by size."""
    found = summary(rows)
    reference = next((r for r in found if r["method"] == "LoRA r=1"), None)
    lines = []
    for row in found:
        gain = row["before"] - row["loss"]
        of_lora = f"{gain / (reference['before'] - reference['loss']):.1%}" if reference else "–"
        spread = f" ± {row['spread']:.3f}" if row["spread"] is not None else ""
        lines.append(
            {
                "method": row["method"], "bits": row["bits"], "bytes": f"{row['bytes']:,}",
                "trained": f"{row['trained']:,}", "loss": f"{row['loss']:.3f}{spread}",
                "of LoRA r=1's gain": of_lora, "rate": f"{row['rate']:g}", "seeds": row["seeds"],
            }
        )  # fmt: skip
    return tabulate(lines, "keys", "github", disable_numparse=True)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Write loss against bytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = summary(rows)
    figure, axes = plt.subplots(figsize=(7, 4.5))
    kinds = {"NOLA, 32 bits": "o-", "NOLA, 8 bits": "s-", "NOLA, 4 bits": "^-", "LoRA": "D-"}
    for kind, style in kinds.items():
        family, _, bits = kind.partition(", ")
        own = [r for r in found if r["method"].startswith(family) and "trained" not in r["method"]]
        own = [r for r in own if not bits or r["bits"] == int(bits.split()[0])]
        errors = [r["spread"] or 0 for r in own]
        axes.errorbar([r["bytes"] for r in own], [r["loss"] for r in own], errors, fmt=style, label=kind,
                      capsize=3)  # fmt: skip
    for row in found:
        if "PEFT" in row["method"]:
            axes.plot(row["bytes"], row["loss"], "x", label=row["method"])
    axes.axvline(64 * 1024, color="grey", linestyle=":", label="64 KB")
    axes.set(xscale="log", xlabel="adapter on disk, bytes, metadata included", ylabel="held-out loss (nats)")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
