"""Trainer and TRL's SFTTrainer take the wrapped model as it is, and resume exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.errors import CheckpointError, NonFiniteError, StateError
from lowrank_ft.recipes import data
from tests.recipes.conftest import sentence
from tests.tiny import TINY, logits, perturb

STEPS, STOP = 8, 4


def rows(tokenizer: Any) -> datasets.Dataset:
    ids = [tokenizer(sentence(i))["input_ids"] for i in range(40)]
    return datasets.Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])


def arguments(cls: Any, directory: Path, **changes: Any) -> Any:
    return cls(
        **{
            "output_dir": str(directory),
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": STOP,
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            "seed": 3,
            "use_cpu": True,
            **changes,
        }
    )


def adapted() -> nn.Module:
    """With dropout, so that a lost random state would show."""
    return lowrank_ft.wrap(TINY["llama"].model(), "lora", rank=2, dropout=0.2)


def make_trainer(kind: str, model: nn.Module, tokenizer: Any, directory: Path, **changes: Any) -> Any:
    callbacks = [lowrank_ft.AdapterCheckpoint(), lowrank_ft.StopOnNonFinite()]
    if kind == "sft":
        from trl import SFTConfig, SFTTrainer

        texts = datasets.Dataset.from_list([{"text": sentence(i)} for i in range(40)])
        args = arguments(SFTConfig, directory, max_length=32, **changes)
        return SFTTrainer(
            model, args=args, train_dataset=texts, processing_class=tokenizer, callbacks=callbacks
        )
    args = arguments(TrainingArguments, directory, remove_unused_columns=False, **changes)
    collator = data.Collator(tokenizer.pad_token_id)
    return Trainer(model, args, collator, rows(tokenizer), callbacks=callbacks)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it
@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_resuming_equals_never_having_stopped(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    whole = make_trainer(kind, adapted(), tokenizer, tmp_path / "whole")
    whole.train()
    stopped = make_trainer(kind, adapted(), tokenizer, tmp_path / "parts")
    stopped.add_callback(StopAt())
    stopped.train()
    assert stopped.state.global_step == STOP
    resumed = make_trainer(kind, adapted(), tokenizer, tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)

    assert losses(whole)[STOP:] == losses(resumed)[STOP:]
    assert len(losses(whole)) == STEPS
    assert losses(whole)[-1] < losses(whole)[0]
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert type(whole.model).__name__ == "LlamaForCausalLM"  # taken as it is, not wrapped again


from transformers import TrainerCallback  # noqa: E402


class StopAt(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= STOP


def test_checkpoints_hold_the_adapter_alone(tokenizer: Any, tmp_path: Path) -> None:
    model = adapted()
    trainer = make_trainer("trainer", model, tokenizer, tmp_path)
    trainer.train()
    step = tmp_path / f"checkpoint-{STEPS}"
    held = load_file(step / "model.safetensors")
    assert not [key for key in held if ".base." in key or "embed_tokens" in key or "norm" in key]
    assert sum(t.numel() for t in held.values()) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )

    batch = TINY["llama"].inputs()
    fresh = lowrank_ft.load(TINY["llama"].model(), step / "adapter")
    assert torch.equal(logits(fresh, batch), logits(model.eval(), batch))
    with pytest.raises(
        CheckpointError, match=r"written during training with adapters alone, load\(\) its adapter"
    ):
        AutoModelForCausalLM.from_pretrained(step)

    trainer.save_model(str(tmp_path / "whole"))  # after training the whole model is saved again
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"), batch), logits(model, batch)
    )


def test_without_the_callback_trainers_own_checkpoints_reload(tokenizer: Any, tmp_path: Path) -> None:
    model = adapted()
    args = arguments(TrainingArguments, tmp_path, remove_unused_columns=False, max_steps=2, save_steps=2)
    Trainer(model, args, data.Collator(tokenizer.pad_token_id), rows(tokenizer)).train()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    batch = TINY["llama"].inputs()
    assert torch.equal(logits(reloaded, batch), logits(model.eval(), batch))
    trained_further = (
        Trainer(  # and a reloaded model trains: transformers does not take it for a quantised one
            reloaded, args, data.Collator(tokenizer.pad_token_id), rows(tokenizer)
        )
    )
    trained_further.train()


def test_the_callback_needs_an_adapter(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(
        StateError, match=r"AdapterCheckpoint needs a model with an adapter: wrap\(\) it before"
    ):
        make_trainer("trainer", TINY["llama"].model(), tokenizer, tmp_path)


def test_a_non_finite_loss_stops_before_the_weights_are_touched(tokenizer: Any, tmp_path: Path) -> None:
    model = perturb(adapted())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.parts["default"].B[0, 0] = math.inf
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer("trainer", model, tokenizer, tmp_path, logging_nan_inf_filter=False)
    with pytest.raises(
        NonFiniteError, match=r"became NaN or infinite at step 1 .*parts.default.*Lower the learning"
    ):
        trainer.train()
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


def test_nola_projects_once_for_each_step(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two micro-batches, before clipping; and the steps are those of projecting both."""
    from lowrank_ft.basis import combination

    def nola() -> nn.Module:
        return lowrank_ft.wrap(TINY["llama"].model(), "nola", rank=2, bases=4)

    projected = 0
    project = combination.basis.project

    def counted(*args: Any) -> Tensor:
        nonlocal projected
        projected += 1
        return project(*args)

    monkeypatch.setattr(combination.basis, "project", counted)
    once = make_trainer("trainer", model := nola(), tokenizer, tmp_path / "a", max_grad_norm=0.01)
    once.train()
    assert projected == STEPS * 2 * len(engine.hosts(model))
    monkeypatch.setattr(combination, "_synchronizes", lambda: True)
    each = make_trainer("trainer", other := nola(), tokenizer, tmp_path / "b", max_grad_norm=0.01)
    each.train()
    assert projected == 3 * STEPS * 2 * len(engine.hosts(model))
    # The same sums in another order, in float32, eight steps long.
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert losses(once)[-1] < losses(once)[0]


def test_gradient_checkpointing_trains_the_same(tokenizer: Any, tmp_path: Path) -> None:
    plain = make_trainer("trainer", adapted(), tokenizer, tmp_path / "a")
    plain.train()
    saving = make_trainer(
        "trainer", adapted(), tokenizer, tmp_path / "b",
        activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    saving.train()
    assert losses(plain) == losses(saving)


def test_bf16_autocast_trains(tokenizer: Any, tmp_path: Path) -> None:
    trainer = make_trainer("trainer", adapted(), tokenizer, tmp_path, bf16=True)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_the_checkpoints_of_two_adapters_hold_both(tokenizer: Any, tmp_path: Path) -> None:
    model = perturb(lowrank_ft.wrap(TINY["llama"].model(), "lora", name="a", rank=2))
    lowrank_ft.wrap(model, "lora", name="b", rank=2)
    make_trainer("trainer", model, tokenizer, tmp_path).train()
    fresh = lowrank_ft.load(TINY["llama"].model(), tmp_path / f"checkpoint-{STEPS}" / "adapter")
    assert engine.adapter_names(fresh) == ("a", "b")
    state = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS
