"""The fine-tuning recipe: load, wrap, measure, train with Trainer, measure again, save, report."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lowrank_ft import checkpoint, engine
from lowrank_ft import config as configs
from lowrank_ft.algorithms.base import AdapterConfig, MethodConfig
from lowrank_ft.algorithms.lora import LoRA
from lowrank_ft.anatomy import layouts
from lowrank_ft.calibration import texts
from lowrank_ft.checkpoint import files, loading, native, verify
from lowrank_ft.engine.counting import count
from lowrank_ft.errors import ConfigError, did_you_mean
from lowrank_ft.recipes import data, evaluation, plots, reporting, tasks
from lowrank_ft.recipes.callbacks import AdapterCheckpoint, StopOnNonFinite, in_float32
from lowrank_ft.recipes.data import DataConfig
from lowrank_ft.recipes.settings import ModelConfig, TrainConfig
from lowrank_ft.structure import registry


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a model with an adapter, and report the result."""

    model: ModelConfig
    """The base model."""
    data: DataConfig
    """The text or the images."""
    output: str
    """Directory for the adapter, the report and the checkpoints."""
    task: Literal["causal-lm", "sequence-classification", "image-classification"] = "causal-lm"
    """What is learnt."""
    method: MethodConfig = field(default_factory=LoRA)
    """The adapter and its options."""
    stages: tuple[dict[str, Any], ...] = ()
    """What to do to the base first, in order: `method` and its options (compress, quantise)."""
    targets: str | tuple[str, ...] = "all-linear"
    """Layers to adapt: "all-linear", names, name endings, globs, "re:…"."""
    exclude: tuple[str, ...] = ()
    """Layers to leave out."""
    layers: tuple[int, ...] | None = None
    """Indices of the blocks to adapt; all by default."""
    adapter_name: str = "default"
    """Name of the adapter."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How to train."""
    calibration_data: str | None = None
    """Text for methods that look at data (CorDA); the training data by default."""
    keep: dict[str, str] = field(default_factory=dict)
    """Held-out text of what is not to be forgotten, by name: its perplexity is measured before and after."""
    keep_windows: int = 16
    """Windows of each such text, spread evenly over it."""
    keep_window: int = 512
    """Tokens of a window."""
    check_reload: bool = True
    """Load the saved adapter in a fresh process and compare its logits before calling it done."""
    seed: int = 0
    """Seed of the data order, dropout and new heads."""


@dataclass(frozen=True)
class FinetuneResult:
    """What the recipe measured.

    Attributes:
        before: held-out loss of the base model, as it is after ``stages``; of the start, where part of the
            weights lies in the adapter.
        after: held-out loss with the trained adapter.
        kept: by name of a text in ``keep``, its loss in nats per token before and after.
        steps: optimiser steps.
        tokens_per_second: training tokens over training time (evaluation and checkpoints left out); None for
            images.
        images_per_second: the same of images; None for text.
        train_seconds: that time.
        peak_memory_bytes: of the process (CPU) or the device (GPU), model included.
        trainable_parameters: numbers that were trained.
        total_parameters: numbers in the model, adapter included.
        adapter_bytes: of the tensors and the index in the saved adapter directory.
        saves_base: whether the base is among them: one that was changed is saved whole.
        reload_difference: largest difference between the model's logits and those of the saved adapter in a
            fresh process; None where that was not asked for.
        curve: what Trainer logged.
        classes: names of the classes, in the order of ``before.confusion`` and ``after.confusion``; empty for
            language modelling.
    """

    before: evaluation.Loss
    after: evaluation.Loss
    kept: dict[str, tuple[float, float]]
    steps: int
    tokens_per_second: float | None
    images_per_second: float | None
    train_seconds: float
    peak_memory_bytes: int
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    saves_base: bool
    reload_difference: float | None
    curve: list[dict[str, float]]
    classes: list[str]


def finetune(config: FinetuneConfig) -> FinetuneResult:
    """Run the fine-tuning recipe: load, wrap, measure, train, measure, save, report.

    Writes to ``config.output``: ``adapter/`` (for :func:`lowrank_ft.load`), ``report.json``,
    ``learning_curve.png``, for a classifier ``confusion.png``, and Trainer's checkpoints. Under a launcher
    with several processes the first one writes and prints.

    Raises:
        ConfigError: bad options, before anything is loaded where that can be known.
        NonFiniteError: the training diverged; the last checkpoint is intact.
    """
    from transformers import Trainer, set_seed

    arguments = training_arguments(config)
    set_seed(config.seed)
    with arguments.main_process_first(
        desc="preparing the data"
    ):  # the other processes read it from the cache
        prepared, keep = _prepare(config)
    model = prepared.model
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=prepared.train,
        eval_dataset=prepared.held_out,
        data_collator=prepared.collate,
        processing_class=prepared.processor,
        callbacks=[clock := _Clock(), AdapterCheckpoint(), StopOnNonFinite()],
    )

    def measure(when: str) -> tuple[evaluation.Loss, dict[str, float]]:
        size, what = config.train.per_device_eval_batch_size, f"Held-out loss {when}"
        loss = evaluation.mean_loss(
            model, prepared.held_out, prepared.collate, size, what, classes=len(prepared.classes)
        )
        kept = {name: evaluation.window_loss(model.eval(), rows, name) for name, rows in keep.items()}
        return loss, kept

    with nullcontext() if engine.carries(model) else engine.disable(model):
        before, kept_before = measure("before")
    with in_float32(model):
        trainer.train(resume_from_checkpoint=True if config.train.resume else None)
    # Trainer leaves its autocast around the forward; from here on the plain model is measured.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    after, kept_after = measure("after")

    speeds = _speeds(config, clock, len(prepared.train), arguments)
    result = FinetuneResult(
        before=before,
        after=after,
        kept={name: (loss, kept_after[name]) for name, loss in kept_before.items()},
        steps=trainer.state.global_step,
        **speeds,
        train_seconds=clock.seconds,
        peak_memory_bytes=reporting.peak_memory_bytes(),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=count(model).total,
        adapter_bytes=0,
        saves_base=False,
        reload_difference=None,
        curve=[dict(entry) for entry in trainer.state.log_history],
        classes=prepared.classes,
    )
    if arguments.should_save:
        result = _write(config, prepared, result)
        print(table(result))
    trainer.accelerator.wait_for_everyone()
    return result


def leave_process_group() -> None:
    """End torch's process group, if there is one, so that the process can exit.

    Gloo's threads may still hold tensors of the last collective. Unless they are joined first, one that
    lets go of a tensor while the interpreter shuts down aborts the process.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # DistributedDataParallel is part of a cycle and keeps the group's threads alive
        torch.distributed.destroy_process_group()


def training_arguments(config: FinetuneConfig) -> Any:
    """Return transformers' TrainingArguments for a recipe.

    Raises:
        ConfigError: a field in ``train.extra`` that they do not have.
    """
    from transformers import TrainingArguments

    field_names = {f.name for f in dataclasses.fields(TrainingArguments)}
    for name in config.train.extra:
        if name not in field_names:
            raise ConfigError(f"TrainingArguments has no field {name!r}.{did_you_mean(name, field_names)}")
    c = config.train
    own = {"eval_steps", "save_steps", "resume", "extra", "gradient_checkpointing"}
    options = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name not in own}
    options.update(_checkpointing(field_names) if c.gradient_checkpointing else {})
    options.update(
        output_dir=str(Path(config.output) / "checkpoints"),
        seed=config.seed,
        eval_strategy="steps",
        eval_steps=0.1 if c.eval_steps is None else c.eval_steps,
        save_strategy="no" if c.save_steps is None else "steps",
        save_steps=500 if c.save_steps is None else c.save_steps,
        prediction_loss_only=True,
        use_cpu=not torch.accelerator.is_available(),
        logging_nan_inf_filter=False,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        include_num_input_tokens_seen="no" if config.task == "image-classification" else "non_padding",
        remove_unused_columns=False,
    )
    options.update(config.train.extra)
    return TrainingArguments(**options)


def _checkpointing(field_names: set[str]) -> dict[str, Any]:
    """Activation checkpointing under the name that this version of transformers has for it."""
    name = (
        "activation_checkpointing" if "activation_checkpointing" in field_names else "gradient_checkpointing"
    )
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _prepare(config: FinetuneConfig) -> tuple[tasks.Prepared, dict[str, Tensor]]:
    """Load the data and the model, and wrap the model; return them, and windows of what is to be kept."""
    if not engine.trains(config.method):
        raise ConfigError(
            f"{type(config.method).__name__} leaves nothing to train: name an adapter as the method, and "
            f"what compresses or quantises in stages."
        )
    loading.check_path(config.model.path)
    if config.task != "causal-lm":
        if config.keep:
            raise ConfigError(
                "keep measures the perplexity of text, which a classifier has none of: leave it out."
            )
        if config.task == "image-classification" and config.calibration_data is not None:
            raise ConfigError(
                "calibration_data is text, and this task is on images: leave it out, and the method looks at "
                "the training images."
            )
    train_rows, eval_rows = data.load(config.data, config.seed)
    prepare = tasks.TASKS[config.task]
    prepared = prepare(config.model.path, config.model.dtype, config.data, train_rows, eval_rows)
    if config.data.max_eval_examples is not None:
        count = min(len(prepared.held_out), config.data.max_eval_examples)
        prepared = dataclasses.replace(prepared, held_out=prepared.held_out.select(range(count)))
    keep = {
        name: evaluation.windows_of(path, prepared.processor, config.keep_window, config.keep_windows)
        for name, path in config.keep.items()
    }
    where: dict[str, Any] = {"targets": config.targets, "exclude": config.exclude, "layers": config.layers}
    method = _with_head(config.method, prepared.model) if prepared.classes else config.method
    chain = [*(parse_stage(entry) for entry in config.stages), method]
    if config.calibration_data is not None and not any(engine.calibration_of(step) for step in chain):
        raise ConfigError("The method looks at no data: leave out calibration_data.")
    for step in chain:
        looks = _calibration(step, config, prepared)
        engine.wrap(prepared.model, step, name=config.adapter_name, **where, **looks)
    return prepared, keep


def parse_stage(entry: Mapping[str, Any]) -> MethodConfig:
    """Return the config of a stage from its entry in a recipe: ``method``, and its options.

    Raises:
        ConfigError: no method, or an option that it lacks.
        RegistryError: no such method.
    """
    options = dict(entry)
    name = options.pop("method", None)
    if not isinstance(name, str):
        raise ConfigError(f"A stage needs a method, but has {sorted(options)}.")
    config: MethodConfig = configs.parse(registry.methods[name].Config, options, what=f"The stage {name!r}")
    return config


def _calibration(method: MethodConfig, config: FinetuneConfig, prepared: tasks.Prepared) -> dict[str, Any]:
    """Return what ``wrap`` needs for a method that looks at data: text of its own, or the training data."""
    settings = engine.calibration_of(method)
    if settings is None:
        return {}
    if config.calibration_data is not None:
        return {"data": texts.read(config.calibration_data, None, "train"), "tokenizer": prepared.processor}
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(prepared.train), generator=generator).tolist()
    rows = prepared.train.select(order[: settings.samples])
    return {"data": list(data.batches(rows, prepared.collate, settings.batch_size))}


def _with_head(method: MethodConfig, model: nn.Module) -> MethodConfig:
    """Train a classifier's new head in full, as PEFT does."""
    if not isinstance(method, AdapterConfig):
        return method
    heads = sorted(layouts.head_names(model) - set(method.modules_to_save))
    return dataclasses.replace(method, modules_to_save=(*method.modules_to_save, *heads))


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Counts steps, their tokens and their seconds; time between steps is left out."""

    def __init__(self) -> None:
        self.steps = 0
        self.tokens = 0
        self.seconds = 0.0
        self._began = 0.0
        self.earlier_steps = 0  # of the run that is resumed
        self._earlier_tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.earlier_steps = self.steps = int(state.global_step)
        self._earlier_tokens = int(state.num_input_tokens_seen)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.steps = int(state.global_step)
        self.tokens = int(state.num_input_tokens_seen) - self._earlier_tokens


def _speeds(config: FinetuneConfig, clock: _Clock, examples: int, arguments: Any) -> dict[str, float | None]:
    """Return the tokens or images that were trained on a second, under the names of the result's fields."""
    seconds = max(clock.seconds, 1e-9)
    if config.task != "image-classification":
        return {"tokens_per_second": clock.tokens / seconds, "images_per_second": None}
    batch: int = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size

    def seen(steps: int) -> int:
        epochs, rest = divmod(steps, math.ceil(examples / batch))
        return epochs * examples + min(rest * batch, examples)  # the last batch of an epoch may be short

    images = seen(clock.steps) - seen(clock.earlier_steps)
    return {"tokens_per_second": None, "images_per_second": images / seconds}


def _write(config: FinetuneConfig, prepared: tasks.Prepared, result: FinetuneResult) -> FinetuneResult:
    """Save the adapter, prove that it loads, and write the report."""
    output, model = Path(config.output), prepared.model
    checkpoint.save(model, output / "adapter", tokenizer=prepared.processor, figures=dict(rows(result)))
    index = files.read_index(output / "adapter")
    size = sum(f["bytes"] for name, f in index["files"].items() if name.endswith(".safetensors"))
    size += (output / "adapter" / files.INDEX).stat().st_size
    difference = None
    if config.check_reload:
        probe = prepared.collate([prepared.held_out[0]])
        probe.pop("labels")
        difference = verify.reload_difference(model, config.model.path, output / "adapter", probe)
    result = dataclasses.replace(
        result,
        adapter_bytes=size,
        saves_base=native.ADAPTER_FILE not in index["files"],
        reload_difference=difference,
    )
    facts = dataclasses.asdict(result)
    (output / "report.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    plots.plot_curve(result.curve, output / "learning_curve.png")
    if result.after.confusion is not None:
        plots.plot_confusion(result.after.confusion, result.classes, output / "confusion.png")
    return result


def rows(result: FinetuneResult) -> list[tuple[str, str]]:
    """Return the figures of the closing table."""
    before, after = result.before, result.after
    unit = "example" if before.accuracy is not None else "token"
    lines = [(f"held-out loss (nats/{unit})", f"{before.loss:.4f} → {after.loss:.4f}")]
    if before.accuracy is not None and after.accuracy is not None:
        lines.append(("held-out accuracy", f"{before.accuracy:.4f} → {after.accuracy:.4f}"))
    else:
        lines.append(("held-out perplexity", f"{before.perplexity:.3f} → {after.perplexity:.3f}"))
    for name, (loss_before, loss_after) in result.kept.items():
        kept = f"{math.exp(loss_before):.3f} → {math.exp(loss_after):.3f}"
        lines.append((f"perplexity of {name}, to be kept", kept))
    speed = [
        (f"training {what}/s", f"{value:.0f}")
        for what, value in (("tokens", result.tokens_per_second), ("images", result.images_per_second))
        if value is not None
    ]
    saved = f"{'model' if result.saves_base else 'adapter'} on disk"
    share = 100 * result.trainable_parameters / result.total_parameters
    return [
        *lines,
        (f"held-out {unit}s", f"{before.count}"),
        ("steps", f"{result.steps}"),
        *speed,
        ("training time", f"{result.train_seconds:.0f} s"),
        ("peak memory", f"{result.peak_memory_bytes / 2**20:.0f} MiB"),
        ("trainable parameters", f"{result.trainable_parameters:,} ({share:.3f} %)"),
        *([(saved, f"{result.adapter_bytes:,} bytes")] if result.adapter_bytes else []),
        *(
            [("reloaded in a fresh process", _reloaded(result))]
            if result.reload_difference is not None
            else []
        ),
    ]


def _reloaded(result: FinetuneResult) -> str:
    equal = result.reload_difference == 0
    return "logits equal to the last bit" if equal else f"logits differ by {result.reload_difference:.2e}"


def table(result: FinetuneResult) -> str:
    """Return the recipe's closing table."""
    from tabulate import tabulate

    return tabulate(rows(result), ("figure", "value"), "github", disable_numparse=True)
