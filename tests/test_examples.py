"""The examples run as they are, on a tiny model, and what each one shows is true."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lowrank_ft.structure import registry
from tests.recipes.conftest import base, texts, tokenizer  # noqa: F401

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(texts: Path) -> str:  # noqa: F811
    return str(texts / "train.jsonl")


def test_finetune(base: Path, text: str, tmp_path: Path) -> None:  # noqa: F811
    losses = load("finetune").main(str(base), text, str(tmp_path / "out"), steps=12)
    assert losses[-1] < losses[0]


def test_qlora(base: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    losses = load("qlora").main(str(base), text, str(tmp_path / "out"), steps=12)
    assert losses[-1] < losses[0]
    assert (tmp_path / "out-dense" / "model.safetensors").exists()
    assert "MB now" in capsys.readouterr().out


def test_compress_recover(base: Path, text: str, tmp_path: Path) -> None:  # noqa: F811
    losses = load("compress_recover").main(str(base), text, str(tmp_path / "out"), steps=24, length=12)
    assert losses["recovered"] < losses["compressed"]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_stack(base: Path, text: str, tmp_path: Path) -> None:  # noqa: F811
    sizes = load("stack").main(str(base), text, str(tmp_path / "out"), length=12)
    assert sizes["dense"] > sizes["factored"] > sizes["in 4 bits"]


def test_own_method(base: Path, tmp_path: Path) -> None:  # noqa: F811
    try:
        load("own_method").main(str(base), str(tmp_path / "out"))
        assert "gain" in registry.methods
    finally:
        registry.methods.remove("gain")
        registry.nodes.remove("gain")


def test_own_loss() -> None:
    errors = load("own_loss").main()
    assert errors["for the loss"] < 0.5 * errors["for the weights"]


def test_several_adapters(base: Path, tmp_path: Path) -> None:  # noqa: F811
    losses = load("several_adapters").main(str(base), str(tmp_path / "out"))
    assert losses["up"][0] < losses["base"][0]
    assert losses["down"][1] < losses["base"][1]
    assert losses["up"][0] < losses["down"][0]


def test_trl_sft(base: Path, text: str, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("trl")
    assert load("trl_sft").main(str(base), text, str(tmp_path / "out"), steps=4, length=12) > 0


def test_several_processes(base: Path, text: str, tmp_path: Path) -> None:  # noqa: F811
    """Two gloo processes, as the README's command starts them."""
    environment: dict[str, str] = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    arguments = [str(base), text, str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / "several_processes.py"), *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes: loss") == 1
    index: dict[str, Any] = json.loads((tmp_path / "out" / "lowrank_ft.json").read_text())
    assert list(index["adapters"]) == ["default"]


def test_export_serve(base: Path, tmp_path: Path) -> None:  # noqa: F811
    assert load("export_serve").main(str(base), str(tmp_path / "out")) < 1e-4
    assert (tmp_path / "out" / "peft" / "adapter_config.json").exists()


def test_every_example_is_in_the_readme_and_tested_and_short() -> None:
    files = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert len(files) == 10
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in files:
        assert f"({name}.py)" in readme
        assert f"test_{name}" in globals()
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 90
