"""What every adapter promises on every model. The cases come from the registry."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.algorithms.base import Family, LowRankConfig
from lowrank_ft.errors import ConfigError, LowRankError, StateError, TargetError
from lowrank_ft.modules.adapted import Adapted
from lowrank_ft.structure.manifest import describe
from lowrank_ft.structure.registry import methods
from tests.contract.cases import CASES, Case
from tests.tiny import logits, perturb

adapters = [case for case in CASES if methods[case.method].family is Family.ADAPTER]
every_adapter = pytest.mark.parametrize("case", adapters, ids=str)

# Equal in exact arithmetic, so they differ by rounding alone. The models run in float64, but transformers
# computes norms and rotary tables in float32 (eps 6e-8), whose inputs may round apart by one unit; a handful
# of layers amplify that by less than 10. Any mistake in the algebra shows at 1e-3.
FLOAT64 = {"rtol": 1e-6, "atol": 1e-6}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def assert_reloads_as_a_model(case: Case, dtype: torch.dtype, path: Path) -> None:
    """Saved by us and by transformers, the model is the same to the bit: alone, and on its base."""
    batch = case.tiny.inputs(dtype)
    # A bare .to(bfloat16) would round the rotary frequencies as well, which from_pretrained does not.
    case.tiny.model().save_pretrained(path / "base")
    base = type(case.tiny.model()).from_pretrained(path / "base", dtype=dtype)
    model = case.wrap(copy.deepcopy(base))
    lowrank_ft.save(model, path / "ours")
    model.save_pretrained(path / "theirs")
    dtypes = [t.dtype for t in model.state_dict().values()]
    for directory in ("ours", "theirs"):
        reloaded = type(model).from_pretrained(path / directory, dtype=dtype)
        assert_same_state(reloaded, state(model))
        assert [t.dtype for t in reloaded.state_dict().values()] == dtypes
        assert torch.equal(logits(copy.deepcopy(reloaded), batch), logits(model, batch))
    onto_base = lowrank_ft.load(base, path / "ours")
    assert torch.equal(logits(copy.deepcopy(onto_base), batch), logits(model, batch))
    assert describe(onto_base) == describe(model)


def ties(model: nn.Module) -> bool:
    return getattr(model.config, "tie_word_embeddings", False)


def base_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in engine.stock_tensors(model).items()}


@every_adapter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_wrap_is_the_identity_to_the_bit(case: Case, dtype: torch.dtype) -> None:
    model = case.tiny.model(dtype)
    batch = case.tiny.inputs(dtype)
    before = logits(model, batch)
    returned = case.wrap(model)
    assert returned is model
    assert torch.equal(logits(model, batch), before)


@every_adapter
def test_wrap_touches_neither_the_global_random_state_nor_the_base(case: Case) -> None:
    model = case.tiny.model()
    before, random_state = base_state(model), torch.get_rng_state()
    case.wrap(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    after = base_state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@every_adapter
def test_start_depends_on_the_seed_alone(case: Case) -> None:
    first = case.wrapped()
    torch.rand(3)
    second = case.wrapped()
    assert_same_state(second, state(first))


@every_adapter
def test_trains_the_adapter_and_nothing_else(case: Case) -> None:
    model = case.wrapped().train()
    batch = case.tiny.inputs()
    before = base_state(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    losses = []
    for step in range(8):
        torch.manual_seed(0)  # the same dropout each step, so that the losses compare
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        if step == 1:  # at step 0 a zero factor hides the other one's gradient
            assert all(p.grad is not None for p in trainable)
            assert any(p.grad.abs().sum() > 0 for p in trainable)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = base_state(model)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_adapter
def test_saves_and_reloads_with_equal_logits(case: Case, tmp_path: Path) -> None:
    model, batch = case.trained(), case.tiny.inputs()
    lowrank_ft.save(model, tmp_path / "a")
    reloaded = lowrank_ft.load(case.tiny.model(), tmp_path / "a")
    assert torch.equal(logits(reloaded, batch), logits(model, batch))
    assert_same_state(reloaded, state(model))
    assert reloaded.config.quantization_config == model.config.quantization_config
    lowrank_ft.save(reloaded, tmp_path / "b")
    first, second = ((tmp_path / d / "adapter.safetensors").read_bytes() for d in "ab")
    assert first == second


@every_adapter
def test_its_own_save_pretrained_reloads_with_equal_logits(case: Case, tmp_path: Path) -> None:
    model, batch = case.trained(), case.tiny.inputs()
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert_same_state(reloaded, state(model))
    # Loaded tensors lie where the file maps them, off the 64-byte grid, which moves the last bits of vector
    # kernels. A copy lies on the grid, like the model's.
    assert torch.equal(logits(copy.deepcopy(reloaded), batch), logits(model, batch))
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in reloaded.named_parameters() if p.requires_grad} == trainable
    lowrank_ft.unload(reloaded)
    assert_same_state(reloaded, state(case.tiny.model()))


@every_adapter
def test_merges_and_unmerges(case: Case) -> None:
    model, batch = case.trained(torch.float64), case.tiny.inputs(torch.float64)
    unmerged, before = logits(model, batch), state(model)
    plain = case.tiny.model(torch.float64)
    assert not torch.allclose(logits(plain, batch), unmerged, **FLOAT64)

    tied = case.model == "gemma3"  # its embedding is a target, and tied to the head
    lowrank_ft.merge(model, untie=tied)
    torch.testing.assert_close(logits(model, batch), unmerged, **FLOAT64)
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in plain.named_modules()
    ]
    assert not hasattr(model.config, "quantization_config")
    assert ties(model) == (ties(plain) and not tied)

    lowrank_ft.unmerge(model)
    assert_same_state(model, before)
    assert torch.equal(logits(model, batch), unmerged)
    assert ties(model) == ties(plain)


@every_adapter
def test_merged_for_good_it_is_a_stock_model(case: Case, tmp_path: Path) -> None:
    model, batch = case.trained(), case.tiny.inputs()
    lowrank_ft.merge(model, reversible=False, untie=case.model == "gemma3")
    lowrank_ft.save(model, tmp_path / "m")
    reloaded = type(model).from_pretrained(tmp_path / "m")
    assert_same_state(reloaded, state(model))
    assert torch.equal(logits(copy.deepcopy(reloaded), batch), logits(model, batch))
    assert all(p.requires_grad for p in model.parameters())
    case.wrap(model)  # and can be wrapped again


@every_adapter
def test_unload_gives_the_base_back(case: Case) -> None:
    plain, batch = case.tiny.model(), case.tiny.inputs()
    model = case.trained()
    lowrank_ft.unload(model)
    assert_same_state(model, state(plain))
    assert [(n, type(m)) for n, m in model.named_modules()] == [
        (n, type(m)) for n, m in plain.named_modules()
    ]
    assert torch.equal(logits(model, batch), logits(plain, batch))
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model.config, "quantization_config")
    with pytest.raises(StateError, match="has no adapter"):
        lowrank_ft.unload(model)


@every_adapter
def test_two_adapters_on_one_model(case: Case, tmp_path: Path) -> None:
    batch = case.tiny.inputs()
    alone = {}
    for name, seed in (("math", 1), ("code", 2)):
        single = perturb(case.wrapped(name=name), seed=seed)
        alone[name] = logits(single, batch)
        lowrank_ft.save(single, tmp_path / name)
    base = logits(case.tiny.model(), batch)

    model = case.tiny.model()
    for name in alone:
        lowrank_ft.load(model, tmp_path / name)
    assert engine.adapter_names(model) == ("math", "code")
    assert torch.equal(logits(model, batch), alone["code"])
    lowrank_ft.set_adapter(model, "math")
    assert torch.equal(logits(model, batch), alone["math"])
    assert all(("parts.math" in n) for n, p in model.named_parameters() if p.requires_grad)
    with lowrank_ft.disable(model):
        assert torch.equal(logits(model, batch), base)
    assert torch.equal(logits(model, batch), alone["math"])

    lowrank_ft.save(model, tmp_path / "both")
    both = lowrank_ft.load(case.tiny.model(), tmp_path / "both")
    assert engine.active_adapters(both) == ("math",)
    assert torch.equal(logits(both, batch), alone["math"])
    only = lowrank_ft.load(case.tiny.model(), tmp_path / "both", name="code")
    assert torch.equal(logits(only, batch), alone["code"])

    lowrank_ft.delete_adapter(model, "code")
    assert engine.adapter_names(model) == ("math",)
    lowrank_ft.delete_adapter(model, "math")
    assert_same_state(model, state(case.tiny.model()))


@every_adapter
def test_two_active_adapters_add_up(case: Case) -> None:
    model = case.trained(torch.float64, "a")
    case.wrap(model, "b", seed=5)
    perturb(model, seed=9)
    one_at_a_time = any(getattr(d, "rescales", False) for d in model.modules()) or case.model == "resnet"
    if one_at_a_time:  # a rescaled weight, or a batch norm's copy, cannot be added
        with pytest.raises(StateError, match="Activate one at a time"):
            lowrank_ft.set_adapter(model, ["a", "b"])
        return
    lowrank_ft.set_adapter(model, ["a", "b"])
    layer = next(m for m in model.modules() if isinstance(m, Adapted))
    expected = layer.layer.matrix() + layer.deltas["a"].weight() + layer.deltas["b"].weight()
    merged = layer.layer.to_matrix(layer.merged().weight)
    torch.testing.assert_close(merged, expected, **FLOAT64)
    batch = case.tiny.inputs(torch.float64)
    added = logits(model, batch)
    lowrank_ft.merge(model, untie=case.model == "gemma3")
    torch.testing.assert_close(logits(model, batch), added, **FLOAT64)


@every_adapter
def test_a_copied_model_is_independent(case: Case) -> None:
    model, batch = case.trained(), case.tiny.inputs()
    twin = copy.deepcopy(model)
    before = logits(model, batch)
    assert torch.equal(logits(twin, batch), before)
    perturb(twin)
    assert torch.equal(logits(model, batch), before)
    lowrank_ft.unload(twin)
    assert torch.equal(logits(model, batch), before)


@every_adapter
def test_bad_input_changes_nothing(case: Case) -> None:
    model = case.tiny.model()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    attempts: list[tuple[type[LowRankError], str, dict[str, object]]] = [
        (ConfigError, "has no option 'rnak'", {"rnak": 3}),
        (TargetError, "matches no layer", {"targets": "no_such_layer"}),
        (TargetError, "matches no module", {"exclude": "no_such_layer"}),
        (TargetError, "asks for blocks", {"layers": [99]}),
        (ConfigError, "cannot be called", {"name": "a.b"}),
        (TargetError, "matches no module", {"modules_to_save": ["no_such_module"]}),
    ]
    if case.looks:
        attempts += [
            (ConfigError, "looks at calibration data: pass data=", {"data": None}),
            (ConfigError, "must be dicts of tensors or texts, but one is a int", {"data": [1]}),
            (ConfigError, "looks at no loss: leave out loss=", {"loss": lambda *_: None}),
        ]
    else:
        attempts.append((ConfigError, "takes no calibration data", {"data": [1]}))
    if issubclass(methods[case.method].Config, LowRankConfig) and "budget" not in case.options:
        attempts += [
            (ConfigError, "must be at least 1, but rank is 0", {"rank": 0}),
            (ConfigError, "must be at least 1, but rank is -4", {"rank": -4}),
            (TargetError, "rank_pattern 'nope' matches none", {"rank_pattern": {"nope": 2}}),
        ]
        if case.method != "flora":  # which bounds a rank by each axis of the weight
            above = r"Rank 9999 is above min\(out, in\) = \d+ of \w+"
            attempts.append((ConfigError, above, {"rank": 9999}))
    for error, message, change in attempts:
        options = {"targets": case.targets(), "exclude": case.exclude(), **case.options}
        options.update({"data": case.data()} if case.looks else {}, **change)
        with pytest.raises(error, match=message):
            lowrank_ft.wrap(model, case.method, **options)
        assert_same_state(model, before)
        assert [p.requires_grad for p in model.parameters()] == flags
    case.wrap(model)
    with pytest.raises(StateError, match="already has an adapter 'default'"):
        case.wrap(model)


@pytest.mark.parametrize("case", [c for c in adapters if not c.options.get("dora")], ids=str)
def test_gradient_is_that_of_the_merged_weight(case: Case) -> None:
    """The adapter's gradient is the merged weight's, pulled back through ``ΔW``: the chain rule, exactly.

    DoRA is left out: its gradient ignores the norm on purpose, and tests/oracle holds it to the paper.
    """
    batch = case.tiny.inputs(torch.float64)
    batch.pop("labels")  # transformers computes its losses in float32

    def value(model: nn.Module) -> torch.Tensor:
        out = model(**batch).logits
        probe = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
        return (out * probe).sum()

    model, merged = case.trained(torch.float64), case.trained(torch.float64)
    lowrank_ft.merge(merged, untie=case.model == "gemma3")
    value(model).backward()
    value(merged).backward()
    stock = dict(merged.named_modules())
    for path, host in engine.hosts(model).items():
        if not isinstance(host, Adapted):
            continue
        weight_gradient = host.layer.to_matrix(stock[path].weight.grad)
        parameters = [p for p in host.deltas["default"].parameters() if p.requires_grad]
        update = host.deltas["default"].weight()
        expected = torch.autograd.grad(update, parameters, grad_outputs=weight_gradient)
        for parameter, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)
