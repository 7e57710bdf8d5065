"""Options that recipes share: which model, and how to train."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The names are those of transformers' TrainingArguments."""

    learning_rate: float = 2e-4
    """Peak learning rate of AdamW."""
    num_train_epochs: float = 1.0
    """Passes over the training data, where `max_steps` does not say otherwise."""
    max_steps: int = -1
    """Optimiser steps; -1 means `num_train_epochs`."""
    per_device_train_batch_size: int = 4
    """Sequences or images of a step on each device."""
    gradient_accumulation_steps: int = 1
    """Batches added up before an optimiser step."""
    per_device_eval_batch_size: int = 4
    """Sequences or images of an evaluation batch."""
    lr_scheduler_type: str = "cosine"
    """How the learning rate falls."""
    warmup_steps: float = 0.03
    """Steps over which it rises first; below 1, the share of all steps."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    bf16: bool = False
    """Compute in bfloat16 under autocast. With model.dtype=bfloat16 it is not needed."""
    gradient_checkpointing: bool = False
    """Keep one activation a block and compute the rest again: less memory, a third more time."""
    logging_steps: int = 5
    """Steps between points of the training curve."""
    eval_steps: int | None = None
    """Steps between points of the held-out curve; a tenth of the run by default."""
    save_steps: int | None = None
    """Steps between checkpoints to resume from; none by default."""
    save_total_limit: int | None = 2
    """Checkpoints to keep."""
    resume: bool = False
    """Go on from the last checkpoint in the output directory."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Any other field of TrainingArguments."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model."""

    path: str
    """A directory, or a name on the hub."""
    dtype: str = "auto"
    """"auto" (as saved), "float32", "bfloat16" or "float16"."""
