"""The compression recipe end to end on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowrank_ft
from lowrank_ft import cli
from lowrank_ft.engine.counting import count
from lowrank_ft.errors import ConfigError
from tests.recipes.conftest import run


@pytest.fixture
def recipe(compression: dict[str, Any]) -> dict[str, Any]:
    return compression | {
        "stages": [
            {"method": "lord", "ratio": 0.25, "align": 1, "calibration": {"length": 16, "samples": 24}},
            {"method": "lora", "rank": 2,
             "train": {"max_steps": 3, "learning_rate": 0.01, "extra": {"disable_tqdm": True}}},
        ],
    }  # fmt: skip


def test_corda_recovers_what_was_compressed(recipe: dict[str, Any], tmp_path: Path) -> None:
    looks = {"length": 16, "samples": 12}
    recipe["stages"][1] |= {"method": "corda", "calibration": looks}
    report = run("compress", recipe, tmp_path / "recipe.yaml")
    assert [step["stage"] for step in report["steps"]] == ["dense", "lord 25%", "corda r=2"]
    assert report["reload_difference"] == 0.0


@pytest.mark.parametrize("method", ["lord", "modegpt"])
def test_compress_and_recover(
    method: str, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["stages"][0]["method"] = method
    report = run("compress", recipe, tmp_path / "recipe.yaml")
    dense, compressed, recovered = report["steps"]
    assert [step["stage"] for step in report["steps"]] == ["dense", f"{method} 25%", "lora r=2"]
    removed = 1 - compressed["parameters"]["blocks"] / dense["parameters"]["blocks"]
    assert 0.25 <= removed < 0.27
    assert recovered["losses"]["held-out"] < compressed["losses"]["held-out"]
    assert report["reload_difference"] == 0.0
    for row in report["layers"]:
        if row["rank"] is not None:
            assert row["parameters"] < row["parameters before"]
            if row["role"] not in ("q-k", "v-o"):
                assert 0 < row["output error"] < 1
                assert 0 < row["measured error"] < 2
    rows = sum(row["parameters before"] - row["parameters"] for row in report["layers"])
    assert rows == dense["parameters"]["blocks"] - compressed["parameters"]["blocks"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert f"{method} 25%" in page
    out = capsys.readouterr().out
    assert "logits equal to the last bit" in out
    assert f"| {method} 25%" in out

    directory = tmp_path / "out" / "model"
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert count(model).total == recovered["parameters"]["total"]
    assert method in (directory / "README.md").read_text()
    cli.main(["inspect", str(directory)])
    assert {"lord": "lowrank", "modegpt": "resized"}[method] in capsys.readouterr().out
    assert {"lord": "rank", "modegpt": "in_features"}[method] in str(lowrank_ft.report(model))


def test_bad_stages(recipe: dict[str, Any], tmp_path: Path) -> None:
    from lowrank_ft.config import parse
    from lowrank_ft.recipes.compression import CompressConfig, compress

    for stages, message in (
        ([], "has no stages"),
        ([{"ratio": 0.2}], "needs a method"),
        ([{"method": "lrod"}], "no method 'lrod'. Did you mean"),
        ([{"method": "lord", "ratoi": 0.2}], "has no option 'ratoi'. Did you mean 'ratio'"),
        ([{"method": "lord", "train": {"max_steps": 2}}], "trains nothing"),
        ([{"method": "lora", "train": {"steps": 2}}], "train has no option 'steps'"),
    ):
        with pytest.raises((ConfigError, LookupError), match=message):
            compress(parse(CompressConfig, {**recipe, "stages": stages}))
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_calibrates_on_nothing_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"text": ""}) + "\n")
    with pytest.raises(SystemExit, match="no tokens"):
        run("compress", {**recipe, "data": str(empty)}, tmp_path / "recipe.yaml")


def test_compressors_in_a_row(recipe: dict[str, Any], tmp_path: Path) -> None:
    first = {**recipe["stages"][0], "method": "modegpt", "recipe": "paper", "ratio": 0.15}
    report = run("compress", {**recipe, "stages": [first, recipe["stages"][0]]}, tmp_path / "recipe.yaml")
    assert [step["stage"] for step in report["steps"]] == ["dense", "modegpt 15%", "lord 25%"]
    assert report["reload_difference"] == 0.0


def test_smaller_mlps_for_any_tool(recipe: dict[str, Any], tmp_path: Path) -> None:
    stage = {**recipe["stages"][0], "method": "modegpt", "allocation": "uniform", "ratio": 0.1, "align": 4}
    report = run(
        "compress",
        {**recipe, "stages": [stage], "targets": ["gate_proj", "up_proj", "down_proj"]},
        tmp_path / "r",
    )
    directory = str(tmp_path / "out" / "model")
    cli.main(["export", "--model", directory, "--output", str(tmp_path / "small"), "--format", "hf-uniform"])
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert not hasattr(small.config, "quantization_config")
    assert count(small).total == report["steps"][-1]["parameters"]["total"]


def test_speed_of_the_export(recipe: dict[str, Any], tmp_path: Path) -> None:
    """`export --format dense` of the compressed model is stock, and computes the same."""
    recipe["stages"] = recipe["stages"][:1]
    run("compress", recipe, tmp_path / "recipe.yaml")
    directory = str(tmp_path / "out" / "model")
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    cli.main(["export", "--model", directory, "--output", str(tmp_path / "dense"), "--format", "dense"])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    ids = torch.arange(3, 13)[None]
    # One float32 product in place of two, in 14 layers: rounding of 1e-7 relative, amplified a little.
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
