"""Measuring: loss and accuracy on a dataset, perplexity of long text, lm-eval's tasks."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_ft.calibration import texts
from lowrank_ft.errors import ConfigError, NonFiniteError
from lowrank_ft.recipes import data, models


@dataclass(frozen=True)
class Loss:
    """Mean loss over what has labels.

    Attributes:
        loss: nats per token (per example, for classification).
        count: tokens (examples) it is the mean of.
        accuracy: share of examples classified right; None for language modelling.
        confusion: how many examples of a class (row) were taken for which (column); None for language
            modelling.
    """

    loss: float
    count: int
    accuracy: float | None = None
    confusion: list[list[int]] | None = None

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text, with all that is needed to compare it.

    Attributes:
        perplexity: ``exp`` of the mean negative log-likelihood.
        loss: that mean, in nats per token.
        tokens: tokens scored, each once.
        window: tokens the model sees at a time.
        stride: tokens between windows; a token has at least ``window − stride`` before it, the first
            window's excepted.
        tokens_per_second: speed of this evaluation.
    """

    perplexity: float
    loss: float
    tokens: int
    window: int
    stride: int
    tokens_per_second: float


def mean_loss(
    model: nn.Module, dataset: Any, collate: data.Collate, batch_size: int, what: str, classes: int = 0
) -> Loss:
    """Return the exact mean loss of a dataset: every label counts the same, whatever the batches.

    Under distributed training each process takes a share and all get the same result.

    Args:
        model: a language model or a classifier.
        dataset: what ``collate`` makes batches of.
        collate: makes keyword arguments of the model, ``labels`` among them.
        batch_size: examples at a time.
        what: named in errors and on the progress bar.
        classes: of a classifier; 0 for language modelling.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    rank, world = _rank_and_world()
    shard = dataset.shard(world, rank) if world > 1 else dataset
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # loss, count
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    progress = tqdm(total=math.ceil(len(shard) / batch_size), desc=what, disable=rank > 0, leave=False)
    with torch.no_grad():
        for batch in data.batches(shard, collate, batch_size):
            inputs = {key: value.to(device) for key, value in batch.items()}
            labels = inputs.pop("labels")
            logits = model(**inputs).logits.float()
            sums += _sums(logits, labels)
            if classes:
                pairs = (labels * classes + logits.argmax(-1)).cpu()
                confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
            progress.update()
    progress.close()
    model.train(was_training)
    if world > 1:
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(confusion)
    loss, count = sums.tolist()
    if count == 0:
        raise ConfigError("The evaluation data has no labels to score.")
    if not math.isfinite(loss):
        raise NonFiniteError(f"The loss in '{what}' is {loss / count}: the model or the data is broken.")
    if not classes:
        return Loss(loss / count, int(count))
    return Loss(loss / count, int(count), int(confusion.trace()) / count, confusion.tolist())


def spread_windows(ids: Tensor, length: int, count: int) -> Tensor:
    """Cut a row of token ids into windows and return ``count`` of them, spread evenly, or all.

    Args:
        ids: ``(tokens,)``.
        length: tokens of a window; what is left over at the end is dropped.
        count: at most so many.

    Returns:
        ``(windows, length)``; no windows where there is too little text for one.
    """
    blocks = ids[: len(ids) // length * length].view(-1, length)
    return blocks if count >= len(blocks) else blocks[torch.linspace(0, len(blocks) - 1, count).long()]


def windows_of(path: str, tokenizer: Any, length: int, count: int) -> Tensor:
    """Return windows spread evenly over a text, ``(count, length)``, or fewer where there is less.

    Args:
        path: as in :func:`lowrank_ft.calibration.texts.read`; its column ``text``.
        tokenizer: turns text into tokens.
        length: tokens of a window.
        count: at most so many.

    Raises:
        ConfigError: too little text for one window.
    """
    ids = texts.text_ids(texts.read(path, None, "train")["text"], tokenizer)
    if len(ids) < length:
        raise ConfigError(f"{path} has {len(ids)} tokens, too few for a window of {length}.")
    return spread_windows(ids, length, count)


def window_loss(model: nn.Module, windows: Tensor, what: str, batch_size: int = 4) -> float:
    """Return the mean loss over windows of text, in nats per token; a window's first token is not scored.

    Args:
        model: in eval mode.
        windows: token ids, ``(windows, tokens)``.
        what: named in errors and on the progress bar.
        batch_size: windows that run at a time.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    device, total = next(model.parameters()).device, 0.0
    with torch.no_grad():
        for batch in tqdm(torch.split(windows, batch_size), desc=f"Loss on {what}", leave=False):
            ids = batch.to(device)
            loss, _ = _sums(model(input_ids=ids).logits.float(), ids).tolist()
            total += loss
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    if not math.isfinite(mean):
        raise NonFiniteError(f"The loss on {what} is {mean}: the model or the data is broken.")
    return mean


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of losses, and number of labels."""
    if logits.dim() == 3:  # each position predicts the next token
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    loss = nn.functional.cross_entropy(logits, labels, ignore_index=data.IGNORED, reduction="sum")
    return torch.stack([loss.double().cpu(), (labels != data.IGNORED).sum().double().cpu()])


def perplexity(
    model: nn.Module, input_ids: Tensor, *, window: int = 1024, stride: int | None = None, batch_size: int = 1
) -> Perplexity:
    """Return the perplexity of one long text, scored in overlapping windows, each token once.

    Args:
        model: a causal language model.
        input_ids: ``(tokens,)``.
        window: tokens the model sees at a time.
        stride: tokens to move on; ``window // 2`` by default. With ``window`` the windows do not overlap, and
            the first token of each is not scored.
        batch_size: windows at a time.

    Raises:
        ConfigError: a stride outside ``1..window``, or too little text.
        NonFiniteError: the likelihood is NaN or infinite.
    """
    stride = window // 2 if stride is None else stride
    if not 1 <= stride <= window:
        raise ConfigError(f"The stride must lie in 1..window = {window}, but is {stride}.")
    if len(input_ids) < 2:
        raise ConfigError("The text has fewer than two tokens, so there is nothing to predict.")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, count, start_time = 0.0, 0, time.perf_counter()
    rows = _windows(input_ids, window, stride)
    progress = tqdm(total=len(input_ids) - 1, desc="Perplexity", unit=" tokens", leave=False)
    with torch.no_grad():
        for group in _grouped(rows, batch_size):
            ids = torch.stack([ids for ids, _ in group]).to(device)
            logits = model(input_ids=ids).logits[:, :-1].float()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            for row, (_, scored) in zip(losses.view(len(group), -1), group, strict=True):
                total += row[-scored:].double().sum().item()
                count += scored
                progress.update(scored)
    progress.close()
    model.train(was_training)
    loss = total / count
    if not math.isfinite(loss):
        raise NonFiniteError(f"The model's loss on this text is {loss}.")
    speed = len(rows) * min(window, len(input_ids)) / (time.perf_counter() - start_time)
    return Perplexity(math.exp(loss), loss, count, window, stride, speed)


def _windows(input_ids: Tensor, window: int, stride: int) -> list[tuple[Tensor, int]]:
    """The windows, each with the number of its last tokens that it scores."""
    rows, scored_to, start = [], 1, 0  # the first token of the text has no context
    while scored_to < len(input_ids):
        end = min(start + window, len(input_ids))
        ids = input_ids[max(0, end - window) : end]
        rows.append((ids, min(end - scored_to, len(ids) - 1)))
        scored_to, start = end, start + stride
    return rows


def _grouped(rows: Sequence[tuple[Tensor, int]], size: int) -> list[list[tuple[Tensor, int]]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def _rank_and_world() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


# The recipe -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a model: perplexity of a text, and lm-eval tasks."""

    model: str
    """A model directory (stock, or one of ours), or a name on the hub."""
    adapter: str | None = None
    """An adapter directory (ours or PEFT's) to put on it."""
    dtype: str = "auto"
    """"auto" (as saved), "float32", "bfloat16" or "float16"."""
    device: str = "auto"
    """"auto" (the GPU if there is one), "cpu", "cuda"…"""
    text: str | None = None
    """File or hub dataset whose text to measure the perplexity of."""
    text_split: str = "test"
    """Split of a hub dataset."""
    text_column: str = "text"
    """Column of the text."""
    window: int = 1024
    """Tokens the model sees at a time."""
    stride: int | None = None
    """Tokens between windows; half a window by default."""
    max_tokens: int | None = None
    """At most so many tokens of the text."""
    batch_size: int = 1
    """Windows (and lm-eval requests) at a time."""
    tasks: tuple[str, ...] = ()
    """lm-eval tasks, by name."""
    task_dir: str | None = None
    """Directory of lm-eval task files of your own."""
    limit: int | None = None
    """At most so many examples of each task."""
    output: str | None = None
    """Where to write the figures as JSON."""


@dataclass(frozen=True)
class Evaluation:
    """What the evaluate recipe measured."""

    perplexity: Perplexity | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Run the evaluate recipe and print its table.

    Raises:
        ConfigError: neither text nor tasks.
    """
    if config.text is None and not config.tasks:
        raise ConfigError("Nothing to measure: give text=… for perplexity, tasks=… for lm-eval, or both.")
    model, tokenizer = models.load_causal_lm(config.model, config.dtype, config.device, config.adapter)
    result = Evaluation(
        _measure_text(model, tokenizer, config) if config.text is not None else None,
        run_lm_eval(model, tokenizer, config) if config.tasks else {},
    )
    print(table(result))
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    return result


def _measure_text(model: nn.Module, tokenizer: Any, config: EvaluateConfig) -> Perplexity:
    assert config.text is not None
    rows = texts.read(config.text, None, config.text_split)
    if config.text_column not in rows.column_names:
        raise ConfigError(f"{config.text} has no column {config.text_column!r}: {rows.column_names}.")
    ids = texts.text_ids(rows[config.text_column], tokenizer, config.max_tokens)
    return perplexity(model, ids, window=config.window, stride=config.stride, batch_size=config.batch_size)


def run_lm_eval(model: nn.Module, tokenizer: Any, config: EvaluateConfig) -> dict[str, dict[str, float]]:
    """Run lm-eval's tasks on the model object as it is, and return their metrics.

    Raises:
        ConfigError: lm-eval is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("lm-eval is not installed: pip install 'lowrank_ft[eval]'.") from error
    results = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size),
        tasks=list(config.tasks),
        task_manager=TaskManager(include_path=config.task_dir),
        limit=config.limit,
        bootstrap_iters=0,
    )
    return {
        task: {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float))}
        for task, metrics in results["results"].items()
    }


def table(result: Evaluation) -> str:
    """Return the recipe's closing table."""
    from tabulate import tabulate

    rows: list[tuple[str, Any]] = []
    if result.perplexity is not None:
        p = result.perplexity
        rows += [
            ("perplexity", f"{p.perplexity:.4f}"),
            ("loss (nats/token)", f"{p.loss:.5f}"),
            ("tokens scored", p.tokens),
            ("window / stride", f"{p.window} / {p.stride}"),
            ("tokens/s", f"{p.tokens_per_second:.0f}"),
        ]
    for task, metrics in result.tasks.items():
        rows += [(f"{task}: {name.removesuffix(',none')}", f"{value:.4f}") for name, value in metrics.items()]
    return tabulate(rows, ("figure", "value"), "github", disable_numparse=True)
