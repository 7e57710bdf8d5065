"""Two gloo processes train what one process with twice the batch trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.recipes.conftest import base, texts, tokenizer  # noqa: F401

WORKER = Path(__file__).with_name("worker.py")


def launch(
    processes: int, directory: Path, recipe: Path, batch: int
) -> tuple[torch.Tensor, dict[str, object]]:
    directory.mkdir()
    weights = directory / "weights.pt"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    environment["HF_DATASETS_CACHE"] = str(directory / "cache")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(processes),
        "--standalone",
    ]
    arguments = [str(processes), str(weights), "--config", str(recipe), "--output", str(directory / "out")]
    arguments += ["--train.per_device_train_batch_size", str(batch)]
    done = subprocess.run(
        [*command, str(WORKER), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("| figure") == 1  # one process prints
    report = json.loads((directory / "out" / "report.json").read_text())
    return torch.load(weights, weights_only=True), report


LOOKS = {"samples": 24, "gradient_samples": 8, "length": 16}
METHODS = {
    "lora": {"name": "lora", "rank": 2},
    "nola": {"name": "nola", "rank": 2, "bases": 8, "bits": 8},
    "lq_lora": {"name": "lq_lora", "rank": 2, "bits": 3, "calibration": LOOKS},
}


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(method: str, base: Path, texts: Path, tmp_path: Path) -> None:  # noqa: F811
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": {"path": str(base), "dtype": "float32"},
                "data": {
                    "train": str(texts / "train.jsonl"),
                    "eval": str(texts / "heldout.jsonl"),
                    "max_length": 16,
                },
                "method": METHODS[method],
                "train": {"max_steps": 5, "learning_rate": 0.01, "extra": {"disable_tqdm": True}},
                "output": "unused",
            }
        )
    )
    one, report_one = launch(1, tmp_path / "one", recipe, batch=4)
    two, report_two = launch(2, tmp_path / "two", recipe, batch=2)
    # The same eight sequences a step, averaged in another order: float32 rounding, amplified by Adam's
    # division where a gradient is near zero (one step moves a weight by at most the learning rate).
    assert (one - two).abs().max() < 1e-3
    assert (one - two).abs().mean() < 1e-5
    a, b = (report["before"] for report in (report_one, report_two))
    assert a["count"] == b["count"]  # each process measured its share, and the shares were added
    assert abs(a["loss"] - b["loss"]) < 1e-6
    assert report_two["after"]["loss"] < b["loss"]
    assert report_two["reload_difference"] == 0.0
