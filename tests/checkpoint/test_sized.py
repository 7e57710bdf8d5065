"""Exports with smaller MLPs, for tools that know nothing of this package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.anatomy.layouts import layout_of
from lowrank_ft.anatomy.layouts import mlp_of as mlp_names
from lowrank_ft.errors import ConfigError, StateError
from lowrank_ft.solve.allocation import Option, same_width
from lowrank_ft.structure.manifest import describe
from tests.contract.cases import Case
from tests.contract.test_contract import assert_same_state, state
from tests.tiny import TINY, logits, perturb

UNIFORM = {"ratio": 0.1, "align": 4, "allocation": "uniform"}


def mlp_of(model: nn.Module) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    return [name for name in names if mlp_names(layout_of(model), name, names)]


def compressed(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    model = TINY[name].model(dtype)
    data = Case("modegpt", name).data(dtype)
    return lowrank_ft.wrap(model, "modegpt", targets=mlp_of(model), data=data, **{**UNIFORM, **options})


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "opt", "gpt2", "bert", "vit"])
def test_one_width_is_a_stock_model(name: str, tmp_path: Path) -> None:
    model, batch = compressed(name), TINY[name].inputs()
    before = state(model)
    lowrank_ft.export(model, tmp_path / "stock", "hf-uniform")
    assert_same_state(model, before)
    stock = type(model).from_pretrained(tmp_path / "stock")
    assert not describe(stock)
    option = layout_of(model).width
    before_it = getattr(TINY[name].model().config, option) or 4 * 32
    assert getattr(stock.config, option) < before_it
    assert getattr(TINY[name].model().config, option) == getattr(model.config, option)
    torch.testing.assert_close(logits(stock, batch), logits(model, batch), rtol=1e-5, atol=1e-6)


def test_a_process_without_this_package_loads_it_and_generates(tmp_path: Path) -> None:
    model = compressed("llama", recipe="paper")
    lowrank_ft.export(model, tmp_path / "stock", "hf-uniform")
    ids = TINY["llama"].inputs()["input_ids"][:1]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0].tolist()
    script = (
        "import sys, json; sys.modules['lowrank_ft'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'stock')!r})\n"
        f"ids = torch.tensor({ids.tolist()})\n"
        "out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)\n"
        "print(json.dumps(out[0].tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_adapters_are_folded_in(tmp_path: Path) -> None:
    model, batch = compressed("llama", torch.float64), TINY["llama"].inputs(torch.float64)
    lowrank_ft.wrap(model, "lora", rank=2)
    perturb(model)
    before = state(model)
    lowrank_ft.export(model, tmp_path / "stock", "hf-uniform")
    assert_same_state(model, before)
    stock = type(model).from_pretrained(tmp_path / "stock", dtype=torch.float64)
    torch.testing.assert_close(logits(stock, batch), logits(model, batch), rtol=1e-9, atol=1e-9)
    assert engine.adapter_names(model) == ("default",)


def test_what_cannot_be_held_is_listed_before_anything_is_done(tmp_path: Path) -> None:
    data = Case("modegpt", "llama").data()
    several = lowrank_ft.wrap(TINY["llama"].model(), "modegpt", ratio=0.3, align=1, data=data, recipe="paper")
    with pytest.raises(
        StateError, match=r"cannot hold: 2 'attention' modules .*; 8 'resized' modules .*; MLPs of"
    ):
        lowrank_ft.export(several, tmp_path / "out", "hf-uniform")
    uneven = compressed("llama", allocation="loss", align=1, low_rank=False)
    with pytest.raises(StateError, match=r"cannot hold: MLPs of 2 widths, from \d+ to \d+"):
        lowrank_ft.export(uneven, tmp_path / "out", "hf-uniform")
    with pytest.raises(StateError, match=r"'deci' cannot hold: MLP widths that are no multiples of 256"):
        lowrank_ft.export(uneven, tmp_path / "out", "deci")
    resnet = lowrank_ft.wrap(TINY["resnet"].model(), "lora", targets="all-conv", rank=1)
    with pytest.raises(StateError, match="no layout for the model type 'resnet'"):
        lowrank_ft.export(resnet, tmp_path / "out", "hf-uniform")
    assert not (tmp_path / "out").exists()


def test_several_widths_as_block_configs(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, num_key_value_heads=2, **sizes)).eval()
    data = Case("modegpt", "llama").data() * 3
    lowrank_ft.wrap(
        model, "modegpt", ratio=0.4, align=256, low_rank=False, data=data,
        targets=["gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert len(set(widths)) > 1
    lowrank_ft.export(model, tmp_path / "deci", "deci")
    config = json.loads((tmp_path / "deci/config.json").read_text())
    assert config["architectures"] == ["DeciLMForCausalLM"]
    found = []
    for block in config["block_configs"]:
        assert block["attention"]["n_heads_in_group"] == 2
        width = int(2 * block["ffn"]["ffn_mult"] * 32 / 3)  # as its readers work it out
        found.append(width if width % 256 == 0 else width + 256 - width % 256)
    assert found == widths


def test_the_same_width_is_the_largest_that_fits() -> None:
    options = {n: [Option(None, 100, 0.0), *(Option(r, 10 * r, 1.0) for r in range(1, 10))] for n in "abc"}
    kinds = {"a": "mlp", "b": "mlp", "c": "v-o"}
    chosen = same_width(options, kinds, 215)
    assert [option.rank for option in chosen.values()] == [7, 7, 7]
    assert [option.rank for option in same_width(options, kinds, 300).values()] == [None, None, None]
    with pytest.raises(ConfigError, match="below the least"):
        same_width(options, kinds, 20)
