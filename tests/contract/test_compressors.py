"""What every compressor promises on every model. The cases come from the registry."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.engine.counting import count
from lowrank_ft.errors import ConfigError, LowRankError, StateError, TargetError
from lowrank_ft.modules.lowrank import LowRankNode
from lowrank_ft.recipes.callbacks import AdapterCheckpoint
from lowrank_ft.structure.manifest import describe
from tests.contract.cases import COMPRESSING, Case
from tests.contract.test_contract import FLOAT64, assert_reloads_as_a_model, assert_same_state, state
from tests.tiny import TINY, logits, perturb

every_case = pytest.mark.parametrize("case", COMPRESSING, ids=str)


@every_case
def test_removes_what_was_asked(case: Case) -> None:
    plain, model = case.tiny.model(), case.wrapped()
    before, after = count(plain), count(model)
    # Ranks are whole numbers: what remains of the budget is too small for a step of any layer. A channel of
    # a gated MLP is a row of two layers and a column of a third.
    layers = [m for m in plain.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    step = max(layer.weight.shape[0] + layer.weight[0].numel() for layer in layers)
    step *= 2 if case.method == "modegpt" else 1
    budget = before.blocks - round(0.3 * before.blocks)
    assert budget - step <= after.blocks <= budget
    assert describe(model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.isfinite(logits(model, case.tiny.inputs())).all()


@every_case
def test_the_same_run_gives_the_same_bits(case: Case) -> None:
    first, random_state = case.wrapped(), torch.get_rng_state()
    assert_same_state(case.wrapped(), state(first))
    assert torch.equal(torch.get_rng_state(), random_state)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_reloads_with_plain_from_pretrained(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    assert_reloads_as_a_model(case, dtype, tmp_path)


@every_case
def test_exports_as_a_stock_model(case: Case, tmp_path: Path) -> None:
    model, batch = case.wrapped(torch.float64), case.tiny.inputs(torch.float64)
    before = state(model)
    with pytest.raises(StateError, match="none are active"):
        lowrank_ft.export(model, tmp_path / "peft", "peft")
    if case.options.get("centered") and case.model == "llama":
        with pytest.raises(StateError, match="q_proj has a bias that .* cannot hold"):
            lowrank_ft.export(model, tmp_path / "dense", "dense")
        assert_same_state(model, before)
        return
    lowrank_ft.export(model, tmp_path / "dense", "dense")
    assert_same_state(model, before)
    stock = type(model).from_pretrained(tmp_path / "dense", dtype=torch.float64)
    assert not describe(stock)
    assert [type(m) for m in stock.modules()] == [type(m) for m in case.tiny.model().modules()]
    torch.testing.assert_close(logits(stock, batch), logits(model, batch), **FLOAT64)


@every_case
def test_lora_stacks_on_it(case: Case, tmp_path: Path) -> None:
    model, batch = case.wrapped(torch.float64), case.tiny.inputs(torch.float64)
    compressed, before = state(model), logits(model, batch)
    lowrank_ft.wrap(model, "lora", rank=2, targets=case.targets())
    assert torch.equal(logits(model, batch), before)
    perturb(model)
    adapted = logits(model, batch)
    assert not torch.allclose(adapted, before, **FLOAT64)

    lowrank_ft.save(model, tmp_path / "stack")
    reloaded = type(model).from_pretrained(tmp_path / "stack", dtype=torch.float64)
    assert engine.adapter_names(reloaded) == ("default",)
    torch.testing.assert_close(logits(copy.deepcopy(reloaded), batch), adapted, **FLOAT64)

    twin = copy.deepcopy(model)
    lowrank_ft.merge(twin)
    torch.testing.assert_close(logits(twin, batch), adapted, **FLOAT64)
    assert set(describe(twin)) <= set(describe(model))  # compression stays
    lowrank_ft.unmerge(twin)
    assert torch.equal(logits(twin, batch), adapted)

    lowrank_ft.unload(model)
    assert_same_state(model, compressed)
    assert torch.equal(logits(model, batch), before)


@pytest.mark.parametrize("name", ["llama", "opt", "phi3", "gpt2", "bert", "vit", "qwen3"])
def test_lord_stacks_on_modegpt(name: str, tmp_path: Path) -> None:
    case = Case("modegpt", name)
    model, batch = case.tiny.model(torch.float64), case.tiny.inputs(torch.float64)
    data = case.data(torch.float64)
    lowrank_ft.wrap(model, "modegpt", recipe="paper", ratio=0.15, align=1, data=data)
    lowrank_ft.wrap(model, "lord", ratio=0.2, align=1, data=data)
    ours = logits(model, batch)
    nodes = [node for node in describe(model).values() if isinstance(node, LowRankNode)]
    assert "resized" in {part.kind for node in nodes for part in (node.first, node.second)}
    lowrank_ft.save(model, tmp_path / "stack")
    reloaded = type(model).from_pretrained(tmp_path / "stack", dtype=torch.float64)
    assert_same_state(reloaded, state(model))
    assert torch.equal(logits(copy.deepcopy(reloaded), batch), ours)
    lowrank_ft.export(reloaded, tmp_path / "dense", "dense")
    stock = type(model).from_pretrained(tmp_path / "dense", dtype=torch.float64)
    torch.testing.assert_close(logits(stock, batch), ours, **FLOAT64)
    perturb(lowrank_ft.wrap(reloaded, "lora", rank=2, dora=True))
    adapted = logits(reloaded, batch)
    lowrank_ft.merge(reloaded)
    torch.testing.assert_close(logits(reloaded, batch), adapted, **FLOAT64)
    with pytest.raises((TargetError, StateError), match="already"):
        lowrank_ft.wrap(model, "modegpt", ratio=0.1, data=data)


def test_adapters_on_what_was_compressed_go_where_they_can(tmp_path: Path) -> None:
    case = Case("modegpt", "llama")
    model = case.tiny.model()
    lowrank_ft.wrap(model, "modegpt", recipe="paper", ratio=0.2, align=1, data=case.data())
    before = state(model)
    for module in ("mlp", "self_attn"):
        with pytest.raises(TargetError, match="holds compressed layers, of which no trained copy"):
            lowrank_ft.wrap(model, "lora", rank=2, targets="lm_head", modules_to_save=(module,))
    assert_same_state(model, before)
    lowrank_ft.wrap(model, "lora", rank=2)
    lowrank_ft.wrap(model, "lora", rank=2, name="second")
    with pytest.raises(StateError, match=r"PEFT form is an adapter on the unmodified base, and .* is comp"):
        lowrank_ft.export(model, tmp_path / "peft", "peft")
    with pytest.raises(StateError, match="saved whole, with all its adapters: leave out name='second'"):
        lowrank_ft.save(model, tmp_path / "one", name="second")


def test_a_recovery_s_checkpoint_is_whole(tmp_path: Path) -> None:
    """The base of an adapter on a compressed model is nowhere else."""
    from transformers import TrainingArguments

    case = Case("modegpt", "llama")
    model = lowrank_ft.wrap(case.tiny.model(), "modegpt", ratio=0.2, align=1, data=case.data())
    perturb(lowrank_ft.wrap(model, "lora", rank=2))
    callback, args = AdapterCheckpoint(), TrainingArguments(str(tmp_path))
    callback.on_init_end(args, None, None, model=model)
    ignored = model._keys_to_ignore_on_save
    callback.on_save(args, SimpleNamespace(global_step=3), None, model=model)
    assert model._keys_to_ignore_on_save == ignored
    reloaded = type(model).from_pretrained(tmp_path / "checkpoint-3" / "adapter")
    assert torch.equal(logits(reloaded, case.tiny.inputs()), logits(model, case.tiny.inputs()))


@every_case
def test_the_factors_train(case: Case) -> None:
    model, batch = case.wrapped().train(), case.tiny.inputs()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        torch.manual_seed(0)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_case
def test_bad_input_changes_nothing(case: Case) -> None:
    model = case.tiny.model()
    before = state(model)
    attempts: list[tuple[type[LowRankError], str, dict[str, object]]] = [
        (ConfigError, "has no option 'ratoi'. Did you mean 'ratio'", {"ratoi": 0.3}),
        (ConfigError, "between 0 and 1, but is 0.0", {"ratio": 0.0}),
        (ConfigError, "between 0 and 1, but is 1.0", {"ratio": 1.0}),
        (ConfigError, "below .* the least|is more than the targeted layers have", {"ratio": 0.999}),
        (ConfigError, "align must be at least 1", {"align": 0}),
        (ConfigError, "samples must be at least 1", {"calibration": {"samples": 0}}),
        (ConfigError, "min_saving must lie between 0 and 1", {"min_saving": 1.0}),
        (
            ConfigError,
            "below .* the least|more than the targeted layers",
            {"ratio_of": "total", "ratio": 0.99},
        ),
        (TargetError, "matches no layer", {"targets": "no_such_layer"}),
    ]
    for error, message, change in attempts:
        options = {"targets": case.targets(), **case.options, **change}
        if case.looks:
            options["data"] = case.data()
        with pytest.raises(error, match=message):
            lowrank_ft.wrap(model, case.method, **options)
        assert_same_state(model, before)
    adapted = lowrank_ft.wrap(case.tiny.model(), "lora", rank=2, targets=case.targets())
    with pytest.raises(StateError, match=r"carries the adapters \['default'\].*merge"):
        case.wrap(adapted)
    case.wrap(model)
    with pytest.raises(StateError, match="has no adapter"):
        lowrank_ft.unload(model)


@pytest.mark.parametrize("method", sorted({case.method for case in COMPRESSING}))
def test_layers_of_the_wrong_kind_are_refused_by_name(method: str) -> None:
    name, targets = ("vit", "all-linear") if method == "tucker" else ("resnet", "all-conv")
    case, model = Case(method, name), TINY[name].model()
    before = state(model)
    message = "q_proj is a Linear|convolution is a Conv2d|no layout for the model type 'resnet'"
    with pytest.raises(TargetError, match=message):
        lowrank_ft.wrap(model, method, targets=targets, ratio=0.3, data=case.data())
    assert_same_state(model, before)
