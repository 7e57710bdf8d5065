"""The registry: what it refuses, and what a new method costs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lowrank_ft.algorithms.lora import LoRA, LoRAMethod, LoRANode
from lowrank_ft.errors import ConfigError, RegistryError
from lowrank_ft.structure import registry
from tests.contract import cases, test_compressors, test_contract
from tests.tiny import TINY

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"


def toys() -> dict[str, str]:
    """The methods that CONTRIBUTING.md shows, by name: whoever copies one gets what is tested here."""
    blocks = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL)
    return {re.findall(r'name, family, Config = "([a-z-]+)"', block)[0]: block for block in blocks}


@pytest.fixture
def toy(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Register a toy method for one test."""
    name = request.param
    path = tmp_path / "toy_method.py"
    path.write_text(toys()[name])
    spec = importlib.util.spec_from_file_location("toy_method", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield name
    registry.methods.remove(name)
    if name in registry.nodes:
        registry.nodes.remove(name)


@pytest.mark.parametrize(("name", "most"), [("toy", 30), ("toy-svd", 42)])
def test_a_toy_method_takes_few_lines(name: str, most: int) -> None:
    assert len([line for line in toys()[name].splitlines() if line.strip()]) < most  # imports and all


def promises_of(module: ModuleType) -> list[Any]:
    """The tests of a contract that take a case."""
    functions = [getattr(module, name) for name in dir(module) if name.startswith("test_")]
    return [f for f in functions if "case" in f.__code__.co_varnames[: f.__code__.co_argcount]]


def call(test: Any, case: cases.Case, tmp_path: Path) -> None:
    options: dict[str, Any] = {"case": case, "tmp_path": tmp_path}
    for mark in getattr(test, "pytestmark", []):
        if mark.args[0] == "dtype":
            options["dtype"] = mark.args[1][0]
    wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
    test(**{name: options[name] for name in wanted})


@pytest.mark.parametrize("toy", ["toy"], indirect=True)
@pytest.mark.parametrize("test", promises_of(test_contract), ids=lambda t: t.__name__)
@pytest.mark.parametrize("model", TINY)
def test_the_contract_holds_for_a_toy_adapter(model: str, test: Any, toy: str, tmp_path: Path) -> None:
    (case,) = [c for c in cases.cases_of(toy) if c.model == model]
    call(test, case, tmp_path)


@pytest.mark.parametrize("toy", ["toy-svd"], indirect=True)
@pytest.mark.parametrize("test", promises_of(test_compressors), ids=lambda t: t.__name__)
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_the_contract_holds_for_a_toy_compressor(model: str, test: Any, toy: str, tmp_path: Path) -> None:
    (case,) = [c for c in cases.cases_of(toy) if c.model == model]
    call(test, case, tmp_path)


def test_a_duplicate_name_raises() -> None:
    class Other(LoRAMethod):
        name = "lora"

    with pytest.raises(RegistryError, match="method 'lora' is registered twice"):
        registry.register_method(Other)
    assert registry.methods["lora"] is LoRAMethod

    class OtherNode(LoRANode):
        kind = "lora"

    with pytest.raises(RegistryError, match="node kind 'lora' is registered twice"):
        registry.register_node(OtherNode)


def test_registering_the_same_class_again_is_no_harm() -> None:
    assert registry.register_method(LoRAMethod) is LoRAMethod


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(RegistryError, match="no method 'lorra'. Did you mean 'lora'"):
        registry.methods["lorra"]


def test_a_plugin_that_fails_to_import_raises_and_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_plugin.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("broken", "broken_plugin", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with pytest.raises(
        RegistryError, match=r"plugin 'broken'.*ModuleNotFoundError.*no_such_package.*Fix or uninstall"
    ):
        list(registry.methods)


def test_an_installed_plugin_is_found(tmp_path: Path) -> None:
    """A real distribution with an entry point, in a fresh process."""
    (tmp_path / "toy_method.py").write_text(toys()["toy"])
    info = tmp_path / "toy-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINT_GROUP}]\ntoy = toy_method\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lowrank_ft; print(lowrank_ft.methods())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'toy': 'Scale: one trained factor for each output.'" in done.stdout


def test_configs_are_checked_however_they_come() -> None:
    import lowrank_ft

    model = TINY["llama"].model()
    with pytest.raises(ConfigError, match="dropout must lie in"):
        LoRA(dropout=1.5)
    with pytest.raises(ConfigError, match="alpha must be positive"):
        LoRA(alpha=-1.0)
    with pytest.raises(ConfigError, match="option \"rank\": Expected a <class 'int'>. Got value: 2.5"):
        lowrank_ft.wrap(model, LoRA(rank=2.5))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Pass rank in the config object"):
        lowrank_ft.wrap(model, LoRA(), rank=3)
    with pytest.raises(ConfigError, match="list of methods is empty"):
        lowrank_ft.wrap(model, [])
    with pytest.raises(ConfigError, match=r"cannot be applied in one go: lora \(adapter\), lora \(adapter\)"):
        lowrank_ft.wrap(model, [LoRA(), LoRA()])
    assert not any(hasattr(m, "parts") for m in model.modules())
    lowrank_ft.wrap(model, [LoRA(rank=2)])


def test_import_is_light_and_works_in_either_order() -> None:
    code = textwrap.dedent("""
        import sys, lowrank_ft
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        import transformers.quantizers.auto as auto
        assert "lowrank_ft" in auto.AUTO_QUANTIZER_MAPPING
    """)
    subprocess.run([sys.executable, "-c", code], check=True)
    code = textwrap.dedent("""
        import transformers.quantizers.auto as auto, lowrank_ft
        assert "lowrank_ft" in auto.AUTO_QUANTIZER_MAPPING
    """)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_that_the_package_offers_is_there() -> None:
    import lowrank_ft

    assert set(lowrank_ft.__all__) <= set(dir(lowrank_ft))
    for name in lowrank_ft.__all__:
        assert getattr(lowrank_ft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'warp'"):
        lowrank_ft.warp  # noqa: B018
