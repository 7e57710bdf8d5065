"""The examples run as they are, on a tiny model, and what each one shows is true."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
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


def lines_of_code(path: Path) -> int:
    """Count the lines that hold code: no docstring, no comment, no blank line."""
    source = path.read_text(encoding="utf-8")
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, with_docstring)]
    docstrings = [node.body[0] for node in nodes if ast.get_docstring(node)]
    prose = {line for node in docstrings for line in range(node.lineno, (node.end_lineno or 0) + 1)}
    lines = enumerate(map(str.strip, source.splitlines()), start=1)
    return sum(bool(line) and not line.startswith("#") and i not in prose for i, line in lines)


@pytest.fixture
def text(texts: Path) -> str:  # noqa: F811
    return str(texts / "train.jsonl")


def test_finetune(base: Path, text: str, tmp_path: Path) -> None:  # noqa: F811
    losses = load("finetune").main(str(base), text, str(tmp_path / "out"), steps=24)
    assert losses["after"] < losses["before"]


def test_qlora(base: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    losses = load("qlora").main(str(base), text, str(tmp_path / "out"), steps=24)
    assert losses["trained"] < losses["in 4 bits"]
    assert losses["in 4 bits"] != losses["dense"]
    assert (tmp_path / "out-dense" / "model.safetensors").exists()
    dense, packed = re.findall(r"([\d.]+) MB", capsys.readouterr().out)
    assert float(packed) < float(dense)


def test_compress_recover(base: Path, text: str, tmp_path: Path) -> None:  # noqa: F811
    losses = load("compress_recover").main(str(base), text, str(tmp_path / "out"), steps=24, length=12)
    assert losses["recovered"] < losses["compressed"]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_stack(base: Path, text: str, tmp_path: Path) -> None:  # noqa: F811
    stages = load("stack").main(str(base), text, str(tmp_path / "out"), length=12)
    sizes = {stage: size for stage, (size, _) in stages.items()}
    assert sizes["dense"] > sizes["factored"] > sizes["in 4 bits"]
    assert stages["adapted"][1] < stages["in 4 bits"][1]


def test_own_method(base: Path, tmp_path: Path) -> None:  # noqa: F811
    try:
        losses = load("own_method").main(str(base), str(tmp_path / "out"))
        assert "gain" in registry.methods
        assert losses[-1] < losses[0]
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
    losses = load("trl_sft").main(str(base), text, str(tmp_path / "out"), steps=10, length=12)
    assert losses["after"] < losses["before"]


def test_several_processes(base: Path, text: str, tmp_path: Path) -> None:  # noqa: F811
    """Two gloo processes, as the README's command for machines without a GPU starts them."""
    more = tmp_path / "more.jsonl"
    more.write_text(Path(text).read_text() * 4)  # at 64 tokens a row, for ten steps of two processes
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["ACCELERATE_USE_CPU"] = "true"  # also where the tests run beside a GPU
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", "0"]  # any free one: tests may run side by side
    arguments = [str(base), str(more), str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / "several_processes.py"), *arguments],
        env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [(processes, before, after)] = re.findall(r"(\d+) processes: held-out loss (\S+) → (\S+)", done.stdout)
    assert processes == "2"
    assert float(after) < float(before)
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
        assert lines_of_code(EXAMPLES / f"{name}.py") <= 60, name
