"""The compression recipe: stages in order, measured before and after each, saved, reloaded, reported."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from lowrank_ft import checkpoint, engine
from lowrank_ft import config as configs
from lowrank_ft.algorithms.base import Counts, Family, MethodConfig
from lowrank_ft.anatomy.sites import stock_modules
from lowrank_ft.calibration import texts
from lowrank_ft.checkpoint import files, verify
from lowrank_ft.engine.counting import bytes_of, count
from lowrank_ft.errors import CheckpointError, ConfigError
from lowrank_ft.modules.lowrank import LowRank
from lowrank_ft.modules.resized import Resized
from lowrank_ft.recipes import callbacks, data, evaluation, models, plots, reporting, training
from lowrank_ft.recipes.data import DataConfig
from lowrank_ft.recipes.settings import ModelConfig, TrainConfig
from lowrank_ft.recipes.training import FinetuneConfig
from lowrank_ft.structure import registry


@dataclass(frozen=True)
class CompressConfig:
    """Compress a model stage by stage, and report what each stage cost and saved."""

    model: ModelConfig
    """The model."""
    data: str
    """Text to calibrate on, and to recover with: a file, a directory that `datasets` wrote, or a hub name."""
    stages: tuple[dict[str, Any], ...]
    """What to do, in order: `method` and its options; for an adapter also `train`, as in finetune."""
    output: str
    """Directory for the model, the report and its plots."""
    eval: dict[str, str] = field(default_factory=dict)
    """Held-out text by name, to measure perplexity on."""
    windows: int = 24
    """Windows of held-out text, spread evenly over each corpus."""
    window: int = 512
    """Tokens of a window."""
    targets: str | tuple[str, ...] = "all-linear"
    """Layers to compress: "all-linear", names, name endings, globs, "re:…"."""
    exclude: tuple[str, ...] = ()
    """Layers to leave out."""
    layers: tuple[int, ...] | None = None
    """Indices of the blocks to compress; all by default."""
    check_reload: bool = True
    """Load what was saved in a fresh process and compare its logits before calling it done."""
    seed: int = 0
    """Seed of training stages."""


@dataclass(frozen=True)
class Measurement:
    """Measurements of a model before the first stage or after a stage.

    Attributes:
        stage: the last stage.
        losses: mean held-out loss by corpus, in nats per token.
        parameters: all of them, and those in blocks.
        bytes: of all parameters and persistent buffers.
        tokens_per_second: forward, one sequence of ``window`` tokens, median of three.
        seconds: duration of the stage.
    """

    stage: str
    losses: dict[str, float]
    parameters: Counts
    bytes: int
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class CompressResult:
    """What the recipe measured; ``report.json`` holds the same.

    Attributes:
        steps: the dense model, then one for each stage.
        layers: for each compressed layer its rank, sizes, ridge, and predicted and measured errors.
        reload_difference: largest difference of logits after a reload in a fresh process.
    """

    steps: list[Measurement]
    layers: list[dict[str, Any]]
    reload_difference: float | None


@dataclass(frozen=True)
class Stage:
    """One parsed entry of ``stages``."""

    config: MethodConfig
    name: str
    train: TrainConfig | None


def compress(config: CompressConfig) -> CompressResult:
    """Run the compression recipe.

    Writes to ``config.output``: ``model/`` (for plain ``from_pretrained``), ``report.json``, and
    ``report.html`` with plots.

    Raises:
        ConfigError: bad options, before anything is loaded where that can be known.
        CheckpointError: what was written does not load, or has another number of parameters.
    """
    stages = [parse_stage(entry) for entry in config.stages]
    if not stages:
        raise ConfigError("The recipe has no stages.")
    output = Path(config.output)
    model, tokenizer = models.load_causal_lm(config.model.path, config.model.dtype, "auto")
    model.eval()
    corpora = {
        name: evaluation.windows_of(path, tokenizer, config.window, config.windows)
        for name, path in config.eval.items()
    }
    steps = [measure("dense", model, corpora, config, 0.0)]
    for stage in stages:
        started = time.perf_counter()
        _run(stage, model, tokenizer, config)
        steps.append(measure(_describe(stage), model, corpora, config, time.perf_counter() - started))
        print(table(steps))
    checkpoint.save(model, output / "model", tokenizer=tokenizer, figures=_figures(steps))
    _check_size(model, output / "model")
    rows = [row for stage in engine.stages_of(model) for row in stage["layers changed"]]
    probe = next(iter(corpora.values()))[:1] if corpora else None
    layers = _with_measured_errors(rows, model, config, probe)
    difference = None
    if config.check_reload and probe is not None:
        difference = verify.reload_difference(model, None, output / "model", {"input_ids": probe})
    result = CompressResult(steps, layers, difference)
    (output / "report.json").write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    plots.compression_page(asdict(result), output)
    print(table(steps, difference))
    return result


def parse_stage(entry: Mapping[str, Any]) -> Stage:
    """Return a stage from its entry in a recipe.

    Raises:
        ConfigError: no method, an option that the method lacks, or ``train`` for a compressor.
        RegistryError: no such method.
    """
    options = dict(entry)
    given = options.pop("train", None)
    config = training.parse_stage(options)
    cls = registry.methods[options["method"]]
    if given is not None and not cls.trains:
        raise ConfigError(f"The stage {cls.name!r} trains nothing: leave out train.")
    # A quantised model whose correction could train is whole without training.
    trains = cls.family is Family.ADAPTER or given is not None
    return Stage(config, cls.name, configs.parse(TrainConfig, given or {}, what="train") if trains else None)


def _describe(stage: Stage) -> str:
    ratio = getattr(stage.config, "ratio", None)
    choice = getattr(stage.config, "ranks", ())
    rank = f"{min(choice)}…{max(choice)}" if choice else getattr(stage.config, "rank", None)
    budget, bits = getattr(stage.config, "budget", None), getattr(stage.config, "bits", None)
    unit = "bits" if getattr(stage.config, "budget_of", "") == "bits" else "MB"
    stored = "" if bits is None else f" {budget:g} {unit}" if budget is not None else f" {bits} bits"
    share = "" if ratio is None else f" {ratio:.0%}"
    return f"{stage.name}{share}{stored}" + (f" r={rank}" if rank else "")


def _run(stage: Stage, model: nn.Module, tokenizer: Any, config: CompressConfig) -> None:
    where: dict[str, Any] = {"targets": config.targets, "exclude": config.exclude, "layers": config.layers}
    needs = engine.calibration_of(stage.config) is not None
    looks = {"data": texts.read(config.data, None, "train"), "tokenizer": tokenizer} if needs else {}
    engine.wrap(model, stage.config, **where, **looks)
    if stage.train is not None:
        _train(model, tokenizer, stage.train, config)


def _train(model: nn.Module, tokenizer: Any, train: TrainConfig, config: CompressConfig) -> None:
    """Recover: train the adapter on the calibration text, on the next token."""
    from transformers import Trainer, set_seed

    text = DataConfig(train=config.data, eval_fraction=0.05, max_length=config.window)
    recipe = FinetuneConfig(
        model=config.model, data=text, output=str(Path(config.output) / "recovery"), train=train,
        seed=config.seed,
    )  # fmt: skip
    arguments = dataclasses.replace(training.training_arguments(recipe), eval_strategy="no")
    set_seed(config.seed)
    rows, _ = data.load(text, config.seed)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data.tokenize_for_generation(rows, text, tokenizer),
        data_collator=data.Collator(tokenizer.pad_token_id),
        callbacks=[callbacks.AdapterCheckpoint(), callbacks.StopOnNonFinite()],
    )
    with callbacks.in_float32(model):
        trainer.train()
    model.eval()


# Measuring --------------------------------------------------------------------------------------------------


def measure(
    stage: str, model: nn.Module, corpora: Mapping[str, Tensor], config: CompressConfig, seconds: float
) -> Measurement:
    """Measure a model as it is now."""
    return Measurement(
        stage=stage,
        losses={name: evaluation.window_loss(model, tokens, name) for name, tokens in corpora.items()},
        parameters=count(model),
        bytes=bytes_of([model]),
        tokens_per_second=_speed(model, config.window),
        seconds=seconds,
    )


def _speed(model: nn.Module, length: int) -> float:
    ids = torch.ones(1, length, dtype=torch.long, device=next(model.parameters()).device)
    times = []
    with torch.no_grad():
        for _ in range(4):
            started = time.perf_counter()
            model(input_ids=ids)
            if ids.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
    return length / sorted(times[1:])[1]  # the first run warms up


def _with_measured_errors(
    rows: Sequence[Mapping[str, Any]], model: nn.Module, config: CompressConfig, probe: Tensor | None
) -> list[dict[str, Any]]:
    """Add the relative output error on held-out text, on the dense model's inputs, where it is defined.

    It is defined for factors of stock layers, and for MLPs, whose channels are a subset of the dense ones.
    """
    errors: dict[str, float] = {}
    now = stock_modules(model)
    mlps = {row["layers"][-1] for row in rows if row["role"] == "mlp"}
    ours = {
        name: module
        for name, module in now.items()
        if isinstance(module, (LowRank, Resized))
        and module.rows is None
        and (module.columns is None or name in mlps)
    }
    if probe is not None and ours:
        dense, _ = models.load_causal_lm(config.model.path, config.model.dtype, "auto")
        for name, module in ours.items():
            dense.get_submodule(name).register_forward_hook(_comparison(errors, name, module))
        with torch.no_grad():
            dense.eval()(input_ids=probe.to(next(dense.parameters()).device))
    heads = ("q-k", "v-o", "attention")
    return [
        {**row, "measured error": None if row["role"] in heads else errors.get(row["layers"][-1])}
        for row in rows
    ]


def _comparison(errors: dict[str, float], name: str, ours: nn.Module) -> Any:
    def compare(module: nn.Module, args: Any, output: Tensor) -> None:
        columns = getattr(ours, "columns", None)
        x = args[0] if columns is None else args[0][..., columns]
        difference = (ours(x) - output).double()
        errors[name] = float(difference.norm() / output.double().norm().clamp_min(1e-300))

    return compare


def _check_size(model: nn.Module, directory: Path) -> None:
    """Assert that the files hold as many numbers as the model has parameters and persistent buffers."""
    expected = sum({t.data_ptr(): t.numel() for t in model.state_dict().values() if t.numel()}.values())
    stored = reporting.stored_numbers(directory, files.read_index(directory)["files"])
    if stored != expected:
        raise CheckpointError(
            f"{directory} holds {stored:,} numbers, but the model has {expected:,}: it was not written whole."
        )


# Reporting --------------------------------------------------------------------------------------------------


def _figures(steps: Sequence[Measurement]) -> dict[str, Any]:
    first, last = steps[0], steps[-1]
    figures: dict[str, Any] = {"parameters": f"{first.parameters.total:,} → {last.parameters.total:,}"}
    for name in last.losses:
        before, after = (math.exp(step.losses[name]) for step in (first, last))
        figures[f"perplexity, {name}"] = f"{before:.2f} → {after:.2f}"
    return figures


def table(steps: Sequence[Measurement], reload_difference: float | None = None) -> str:
    """Return the closing table: one line for the dense model and for each stage."""
    dense = steps[0].parameters
    lines = []
    for step in steps:
        now = step.parameters
        line = {
            "after": step.stage,
            "parameters": f"{now.total:,}",
            "of total": f"{now.total / dense.total:.1%}",
            "of blocks": f"{now.blocks / dense.blocks:.1%}",
            "MB": f"{step.bytes / 1e6:.0f}",
            "tokens/s": f"{step.tokens_per_second:.0f}",
            "seconds": f"{step.seconds:.0f}",
        }
        line.update({f"ppl {name}": f"{math.exp(loss):.2f}" for name, loss in step.losses.items()})
        lines.append(line)
    text = tabulate(lines, "keys", "github", disable_numparse=True)
    if reload_difference is not None:
        how = "equal to the last bit" if reload_difference == 0 else f"max |Δ| = {reload_difference:.2e}"
        text += f"\n\nReloaded in a fresh process with plain from_pretrained: logits {how}."
    return text
