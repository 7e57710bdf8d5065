"""Compressed models on disk: every way to load them, and what a damaged one says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.errors import CheckpointError
from lowrank_ft.modules.lowrank import LowRank
from lowrank_ft.structure.manifest import describe
from tests.contract.cases import Case
from tests.tiny import TINY, logits


def compressed() -> nn.Module:
    case = Case("lord", "llama", options={"ratio": 0.3, "align": 1})
    return case.wrapped()


BATCH = TINY["llama"].inputs()


def test_sharded_and_placed(tmp_path: Path) -> None:
    model = compressed()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for options in ({}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
        assert describe(again) == describe(model)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_another_dtype(tmp_path: Path) -> None:
    model = compressed()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor.to(torch.bfloat16))


def test_what_made_it_is_kept(tmp_path: Path) -> None:
    model = compressed()
    lowrank_ft.save(model, tmp_path)
    (stage,) = engine.stages_of(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert stage["method"] == "lord"
    assert stage["options"]["ratio"] == 0.3
    assert "## Compressed: lord" in (tmp_path / "README.md").read_text()


def test_without_this_package_a_load_fails_rather_than_guess(tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModelForCausalLM; "
        "AutoModelForCausalLM.from_pretrained(sys.argv[1]); print('loaded')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "loaded" not in done.stdout


def test_a_missing_factor_is_named(tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if key.endswith("first.weight"))
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_rank_that_lies_is_refused(tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["manifest"][0]["node"]["rank"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has the shape .* in the files"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_adapter_merges_into_the_factors_exactly() -> None:
    model = compressed()
    ranks = {name: m.rank for name, m in model.named_modules() if isinstance(m, LowRank)}
    lowrank_ft.wrap(model, "lora", rank=2, targets=["q_proj"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    before = logits(model, BATCH)
    lowrank_ft.merge(model, reversible=False)
    for name, module in model.named_modules():
        if isinstance(module, LowRank):
            assert module.rank == ranks[name] + 2 * ("q_proj" in name)
    # The same products in another order: a few float32 roundings.
    torch.testing.assert_close(logits(model, BATCH), before, rtol=1e-4, atol=1e-5)


def test_min_saving_leaves_layers_dense() -> None:
    case = Case("lord", "llama", options={"ratio": 0.3, "align": 1, "min_saving": 0.5})
    for row in engine.stages_of(case.wrapped())[0]["layers changed"]:
        assert row["rank"] is None or row["parameters"] <= 0.5 * row["parameters before"]


class Plain(nn.Module):
    """Not from transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


def plain() -> Plain:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Plain()


def test_a_plain_module_saves_and_loads(tmp_path: Path) -> None:
    x = torch.randn(5, 24)
    model = lowrank_ft.wrap(plain(), "lord", ratio=0.5, align=1, objective="weight")
    lowrank_ft.wrap(model, "lora", rank=2)
    lowrank_ft.save(model, tmp_path)
    again = lowrank_ft.load(plain(), tmp_path)
    assert torch.equal(again(x), model(x))
    assert engine.adapter_names(again) == ("default",)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    narrow = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(CheckpointError):
        lowrank_ft.load(narrow, tmp_path)
    assert isinstance(narrow[0], nn.Linear)
