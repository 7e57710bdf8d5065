"""Quantised models through the recipes and the command line, end to end on a tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.errors import ConfigError
from lowrank_ft.modules.quantized import Quantized
from tests.recipes.conftest import run

TRAIN = {"max_steps": 6, "learning_rate": 0.02, "logging_steps": 1, "extra": {"disable_tqdm": True}}
LOOKS = {"samples": 24, "gradient_samples": 8, "length": 16}


@pytest.fixture
def finetune(base: Path, texts: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": {"path": str(base), "dtype": "float32"},
        "data": {"train": str(texts / "train.jsonl"), "eval": str(texts / "heldout.jsonl"), "max_length": 16},
        "train": {**TRAIN, "per_device_train_batch_size": 2, "eval_steps": 3},
        "output": str(tmp_path / "out"),
    }


def test_qlora(finetune: dict[str, Any], tmp_path: Path) -> None:
    finetune |= {"stages": [{"method": "nf", "bits": 4}], "method": {"name": "lora", "rank": 2}}
    report = run("finetune", finetune, tmp_path / "recipe.yaml")
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["reload_difference"] == 0.0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")
    assert sum(isinstance(m, Quantized) for m in model.modules()) == 14
    assert report["total_parameters"] == lowrank_ft.report(model).total_parameters
    plain = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(finetune["model"]["path"]).parameters()
    )
    assert report["total_parameters"] == plain + report["trainable_parameters"]
    saved = (tmp_path / "out" / "adapter" / name for name in ("model.safetensors", "lowrank_ft.json"))
    assert report["adapter_bytes"] == sum(file.stat().st_size for file in saved)
    assert report["saves_base"]
    lowrank_ft.unload(model)


@pytest.mark.parametrize("options", [{"bits": 3}, {"budget": 7.0, "ranks": [1, 2]}], ids=str)
def test_lq_lora(options: dict[str, Any], finetune: dict[str, Any], tmp_path: Path) -> None:
    method = {
        "name": "lq_lora",
        "calibration": LOOKS,
        **({"rank": 2} if "bits" in options else {}),
        **options,
    }
    report = run("finetune", finetune | {"method": method}, tmp_path / "recipe.yaml")
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["reload_difference"] == 0.0


def test_half_precision_factors_train_in_float32(finetune: dict[str, Any], tmp_path: Path) -> None:
    """Steps that bfloat16 would round away arrive, and a run that was stopped goes on exactly."""
    method = {"name": "lq_lora", "rank": 2, "bits": 3, "factors": "bfloat16", "calibration": LOOKS}
    finetune |= {"method": method, "train": {**finetune["train"], "learning_rate": 1e-4, "save_steps": 3}}
    report = run("finetune", finetune, tmp_path / "recipe.yaml")
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["reload_difference"] == 0.0
    checkpoints = tmp_path / "out" / "checkpoints"
    on_the_way = load_file(checkpoints / "checkpoint-3" / "adapter" / "model.safetensors")
    factors = [t for name, t in on_the_way.items() if name.endswith((".A", ".B"))]
    assert {t.dtype for t in factors} == {torch.float32}
    assert any((t != t.bfloat16()).any() for t in factors)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")
    assert {p.dtype for n, p in model.named_parameters() if n.endswith((".A", ".B"))} == {torch.bfloat16}

    shutil.rmtree(checkpoints / "checkpoint-6")
    finetune["train"]["resume"], finetune["check_reload"] = True, False
    assert run("finetune", finetune, tmp_path / "recipe.yaml")["after"] == report["after"]


def test_lq_lora_on_a_classifier_trains_its_head(
    finetune: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    finetune["data"]["label_column"] = "label"
    method = {"name": "lq_lora", "rank": 2, "bits": 3, "calibration": LOOKS}
    finetune |= {"task": "sequence-classification", "method": method}
    report = run("finetune", finetune, tmp_path / "recipe.yaml")
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["reload_difference"] == 0.0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "adapter")
    assert any(n.startswith("score.") for n in engine.hosts(model) for n in [f"{n}."])
    assert engine.carries(model)


def test_compress_quantise_recover(compression: dict[str, Any], tmp_path: Path) -> None:
    recipe = compression | {
        "stages": [
            {"method": "lord", "ratio": 0.25, "align": 1, "calibration": LOOKS},
            {"method": "nf", "budget": 5.0, "objective": "loss", "calibration": LOOKS},
            {"method": "lora", "rank": 2, "train": {**TRAIN, "max_steps": 3}},
        ],
    }
    report = run("compress", recipe, tmp_path / "recipe.yaml")
    assert [step["stage"] for step in report["steps"]] == ["dense", "lord 25%", "nf 5 bits", "lora r=2"]
    sizes = [step["bytes"] for step in report["steps"]]
    assert sizes[2] < sizes[1] < sizes[0]
    assert report["steps"][1]["parameters"]["total"] == report["steps"][2]["parameters"]["total"]
    assert report["reload_difference"] == 0.0
    assert (tmp_path / "out" / "report.html").stat().st_size > 5000


@pytest.mark.parametrize("train", [None, {**TRAIN, "max_steps": 3}], ids=["untrained", "trained"])
def test_lq_lora_as_a_stage(train: Any, compression: dict[str, Any], tmp_path: Path) -> None:
    stage: dict[str, Any] = {"method": "lq_lora", "rank": 2, "bits": 3, "calibration": LOOKS}
    recipe = compression | {
        "stages": [stage | ({} if train is None else {"train": train})],
    }
    report = run("compress", recipe, tmp_path / "recipe.yaml")
    assert [step["stage"] for step in report["steps"]] == ["dense", "lq_lora 3 bits r=2"]
    assert report["reload_difference"] == 0.0
    assert all(row["errors"] for row in report["layers"])


def test_chosen_ranks_are_named_and_reported(compression: dict[str, Any], tmp_path: Path) -> None:
    stage = {"method": "lq_lora", "ranks": [1, 2, 3], "budget": 6.0, "calibration": LOOKS}
    report = run("compress", compression | {"stages": [stage]}, tmp_path / "recipe.yaml")
    assert [step["stage"] for step in report["steps"]] == ["dense", "lq_lora 6 bits r=1…3"]
    assert {row["rank"] for row in report["layers"]} <= {1, 2, 3}


def test_a_stage_that_trains_nothing_is_told(compression: dict[str, Any], tmp_path: Path) -> None:
    recipe = compression | {"stages": [{"method": "nf", "train": {"max_steps": 3}}]}
    with pytest.raises((ConfigError, SystemExit), match="trains nothing"):
        run("compress", recipe, tmp_path / "recipe.yaml")


def test_finetuning_needs_something_to_train(finetune: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        (ConfigError, SystemExit), match="NF leaves nothing to train: name an adapter as the method"
    ):
        run("finetune", finetune | {"method": {"name": "nf"}}, tmp_path / "recipe.yaml")
