"""What every quantiser promises on every model. The cases come from the registry."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.algorithms.lora import LoRA
from lowrank_ft.algorithms.lord import LoRD
from lowrank_ft.algorithms.nf import NF
from lowrank_ft.engine.counting import count
from lowrank_ft.errors import ConfigError, LowRankError, StateError, TargetError
from lowrank_ft.modules.layer import find_layer
from lowrank_ft.modules.quantized import Quantized
from lowrank_ft.recipes.callbacks import AdapterCheckpoint
from lowrank_ft.structure.manifest import describe
from lowrank_ft.structure.registry import methods
from tests.contract.cases import QUANTIZING, Case
from tests.contract.test_contract import FLOAT64, assert_reloads_as_a_model, assert_same_state, state
from tests.tiny import TINY, logits, perturb

every_case = pytest.mark.parametrize("case", QUANTIZING, ids=str)
adapting = pytest.mark.parametrize("case", [c for c in QUANTIZING if methods[c.method].trains], ids=str)
TRAINS = {name for name, cls in methods.items() if cls.trains}


def quantized(model: nn.Module) -> dict[str, Quantized]:
    return {n.removesuffix(".base"): m for n, m in model.named_modules() if isinstance(m, Quantized)}


def widest(module: Quantized) -> Tensor:
    """How far rounding to nearest can move each weight: half the widest gap between levels, times the scale.

    And what lies outside of the outermost levels: of signed codebooks those do not reach −1, and a scale that
    was rounded down does not reach the block's largest entry (by at most a step of its own, or of int8 one).
    """
    scheme, packed = module.scheme, module.packed
    weights = module.matrix(torch.float64)
    if scheme.codebook == "int8":
        return packed["scales"].double()[:, None].expand_as(weights) / 254
    storage = module.storage
    blocks = -(-weights.numel() // scheme.block)
    if scheme.library == "torch":
        scales, levels = storage.block_scales(packed, 0, blocks), packed["levels"].double()
        step = 0.0 if scheme.scale_bits == 32 else packed["supers"].double().max() / storage._largest
    else:
        import bitsandbytes.functional as functional

        scales = storage.block_scales(packed)
        levels = (
            functional.get_4bit_type({"nf": "nf4"}.get(scheme.codebook, "fp4"), device="cpu")
            .double()
            .sort()
            .values
        )
        # The dynamic eight-bit map has steps of at most 0.0071 of the largest.
        step = 0.0 if scheme.scale_bits == 32 else 0.0071 * packed["supers"].double().max()
    gap = max(float(levels.diff().max()) / 2, float(1 + levels[0]))
    bound = (scales.double().abs() + step) * gap + step
    return bound.repeat_interleave(scheme.block)[: weights.numel()].view_as(weights)


@every_case
def test_starts_within_the_declared_bound(case: Case) -> None:
    """Rounded to nearest, no weight moves further than its codebook and scale say."""
    plain, model = case.tiny.model(), case.wrapped()
    stock = dict(plain.named_modules())
    assert quantized(model)
    for name, module in quantized(model).items():
        weight = find_layer(stock[name]).matrix().double()
        host = engine.hosts(model).get(name)
        read = module.matrix(torch.float64)
        if host is None and module.scheme.codebook != "fitted" and case.options.get("rounding") != "feedback":
            assert ((weight - read).abs() <= widest(module) * (1 + 1e-6)).all()
        if host is not None:
            read = read + host.deltas["default"].weight().double()
        bits = case.options.get("bits", 4)
        assert (weight - read).norm() <= {2: 0.75, 3: 0.4}.get(
            bits, 0.3 if "budget" not in case.options else 0.8
        ) * weight.norm()


@every_case
def test_what_runs_is_what_is_read(case: Case) -> None:
    """The packed product is the product with the read weights: forward, and gradient of the input."""
    model, batch = case.wrapped(torch.float64), case.tiny.inputs(torch.float64)
    twin = copy.deepcopy(model)
    if engine.hosts(twin):
        lowrank_ft.merge(twin, reversible=False)
    else:
        with engine.multiplied_out(twin):
            torch.testing.assert_close(logits(twin, batch), logits(model, batch), **FLOAT64)
        return
    torch.testing.assert_close(logits(twin, batch), logits(model, batch), **FLOAT64)


@every_case
def test_the_same_run_gives_the_same_bits(case: Case) -> None:
    first, random_state = case.wrapped(), torch.get_rng_state()
    assert_same_state(case.wrapped(), state(first))
    assert torch.equal(torch.get_rng_state(), random_state)


@every_case
def test_stores_what_the_formula_says(case: Case) -> None:
    """Counted bytes are the bits-per-weight formula plus padding, offset and codebook."""
    model = case.wrapped()
    for module in quantized(model).values():
        s, n = module.scheme, module.weights
        counted = sum(t.numel() * t.element_size() for t in module.packed.values())
        assert counted == module.stored_bytes
        if s.codebook == "int8":
            assert counted == n + 4 * module.out_features
            continue
        blocks = -(-n // s.block)
        padding = (blocks * s.block - n) * s.bits_per_weight / 8
        codebook = 4 * 2**s.bits if s.library == "torch" else 0
        offset = 4 if s.scale_bits != 32 else 0
        # Scales' codes end on a group of eight, and the last of their own scales may have fewer of them.
        rounding = s.scale_bits + 4 if s.scale_bits != 32 else 0
        formula = n * s.bits_per_weight / 8 + padding + codebook + offset
        assert formula - 1e-6 <= counted <= formula + rounding


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_reloads_packed_with_plain_from_pretrained(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    assert_reloads_as_a_model(case, dtype, tmp_path)


@every_case
def test_a_cast_leaves_the_packed_tensors_alone(case: Case) -> None:
    model = case.wrapped()
    before = {n: {k: v.clone() for k, v in m.packed.items()} for n, m in quantized(model).items()}
    model.to(torch.bfloat16)
    for name, module in quantized(model).items():
        assert all(
            torch.equal(module.packed[k], t) and module.packed[k].dtype == t.dtype
            for k, t in before[name].items()
        )
        assert module.weight.dtype == torch.bfloat16
    assert torch.isfinite(logits(model, case.tiny.inputs(torch.bfloat16)).float()).all()


@every_case
def test_exports_as_a_stock_model(case: Case, tmp_path: Path) -> None:
    model, batch = case.wrapped(torch.float64), case.tiny.inputs(torch.float64)
    before = state(model)
    lowrank_ft.export(model, tmp_path / "dense", "dense")
    assert_same_state(model, before)
    stock = type(model).from_pretrained(tmp_path / "dense", dtype=torch.float64)
    assert not describe(stock)
    assert [type(m) for m in stock.modules()] == [type(m) for m in case.tiny.model().modules()]
    torch.testing.assert_close(logits(stock, batch), logits(model, batch), **FLOAT64)


@every_case
def test_an_adapter_stacks_on_it(case: Case, tmp_path: Path) -> None:
    model, batch = case.wrapped(torch.float64), case.tiny.inputs(torch.float64)
    stored, before = state(model), logits(model, batch)
    if methods[case.method].trains:
        with pytest.raises(StateError, match="Part of the quantised weights lies in the adapter 'default'"):
            lowrank_ft.wrap(model, "lora", name="more", rank=2)
        assert_same_state(model, stored)
        return
    lowrank_ft.wrap(model, "lora", rank=2)
    assert torch.equal(logits(model, batch), before)
    trains_alone(model, batch)
    adapted = logits(model, batch)
    assert not torch.allclose(adapted, before, **FLOAT64)

    lowrank_ft.save(model, tmp_path / "stack")
    reloaded = type(model).from_pretrained(tmp_path / "stack", dtype=torch.float64)
    torch.testing.assert_close(logits(copy.deepcopy(reloaded), batch), adapted, **FLOAT64)
    twin = copy.deepcopy(model)
    lowrank_ft.merge(twin)
    assert not describe(twin)
    torch.testing.assert_close(logits(twin, batch), adapted, **FLOAT64)
    lowrank_ft.unmerge(twin)
    assert torch.equal(logits(twin, batch), adapted)
    lowrank_ft.unload(model)
    assert_same_state(model, stored)
    assert torch.equal(logits(model, batch), before)


def trains_alone(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """A few steps lower the loss, and move nothing but the adapter."""
    before = {k: v.detach().clone() for k, v in engine.stock_tensors(model).items()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable
    optimizer = torch.optim.Adam(trainable, lr=1e-2)
    losses = []
    model.train()
    for _ in range(8):
        torch.manual_seed(0)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    assert losses[-1] < losses[0]
    after = engine.stock_tensors(model)
    assert all(torch.equal(before[k], after[k]) for k in before)


@adapting
def test_its_own_adapter_trains_saves_and_merges(case: Case, tmp_path: Path) -> None:
    model, batch = case.wrapped(), case.tiny.inputs()
    assert engine.active_adapters(model) == ("default",)
    assert all(".parts.default." in n for n, p in model.named_parameters() if p.requires_grad)
    trains_alone(model, batch)
    trained, before = logits(model, batch), state(model)
    lowrank_ft.save(model, tmp_path / "m")
    reloaded = type(model).from_pretrained(tmp_path / "m")
    assert_same_state(reloaded, before)
    assert torch.equal(logits(copy.deepcopy(reloaded), batch), trained)

    for verb in (lambda m: lowrank_ft.unload(m), lambda m: lowrank_ft.delete_adapter(m, "default")):
        with pytest.raises(StateError, match=r"merge\(\) it"):
            verb(model)
    with pytest.raises(StateError, match=r"merge\(\) it"), lowrank_ft.disable(model):
        pass
    assert_same_state(model, before)
    assert torch.equal(logits(model, batch), trained)
    lowrank_ft.merge(model)
    assert not describe(model)
    torch.testing.assert_close(logits(model, batch), trained, rtol=1e-4, atol=1e-4)
    lowrank_ft.unmerge(model)
    assert_same_state(model, before)
    lowrank_ft.merge(model, reversible=False)
    case.wrap(model)  # merged for good, it can be quantised again


@every_case
def test_counts_and_reports(case: Case) -> None:
    plain, model = case.tiny.model(), case.wrapped()
    adapter = sum(p.numel() for h in engine.hosts(model).values() for p in h.parts.parameters())
    assert count(model).total - adapter == count(plain).total
    rows = engine.stages_of(model)[0]["layers changed"]
    assert {row["module"] for row in rows} == set(quantized(model))
    for row in rows:
        assert row["bytes"] < row["bytes before"] or case.options.get("bits") == 8 or adapter
        assert row["bits"] == pytest.approx(
            8 * quantized(model)[row["module"]].stored_bytes / quantized(model)[row["module"]].weights
        )


@every_case
def test_bad_input_changes_nothing(case: Case) -> None:
    model = case.tiny.model()
    before = state(model)
    attempts: list[tuple[type[LowRankError], str, dict[str, object]]] = [
        (ConfigError, "has no option 'bitz'", {"bitz": 3}),
        (ConfigError, "2, 3, 4 or 8 bits, but not 5|expected|has .* bits", {"bits": 5}),
        (ConfigError, "multiples of 8|blocks of 32", {"block": 20}),
        (ConfigError, "budget must be positive|leave rank_pattern|choose", {"budget": -1.0}),
        (TargetError, "matches no layer", {"targets": "no_such_layer"}),
    ]
    if case.options.get("budget"):
        attempts.append((ConfigError, "is below|No one scheme", {"budget": 0.5}))
        attempts.append((ConfigError, "is below", {"budget": 0.001, "budget_of": "disk"}))
    if case.looks:
        attempts.append((ConfigError, "looks at calibration data: pass data=", {"data": None}))
    else:
        attempts.append((ConfigError, "takes no calibration data", {"data": [1]}))
    for error, message, change in attempts:
        options = {"targets": "all-linear", **case.options}
        options.update({"data": case.data()} if case.looks else {}, **change)
        with pytest.raises(error, match=message):
            lowrank_ft.wrap(model, case.method, **options)
        assert_same_state(model, before)
        assert not describe(model)
    case.wrap(model)
    with pytest.raises(
        (StateError, TargetError), match="quantised already|compressed already|already has an adapter"
    ):
        case.wrap(model)


@pytest.mark.parametrize("name", ["llama", "opt", "phi3", "gpt2", "bert", "vit", "qwen3"])
@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_stacks_compress_quantise_adapt(name: str, rounding: str, tmp_path: Path) -> None:
    case = Case("nf", name)
    model, batch = case.tiny.model(), case.tiny.inputs()
    stages = [LoRD(ratio=0.3, align=1), NF(bits=4, block=16, rounding=rounding), LoRA(rank=2)]
    lowrank_ft.wrap(model, stages, data=case.data())
    packed = [m for m in model.modules() if isinstance(m, Quantized)]
    assert len(packed) >= 4  # the factors, and layers that stayed whole
    perturb(model)
    before = logits(model, batch)
    lowrank_ft.save(model, tmp_path / "m")
    reloaded = type(model).from_pretrained(tmp_path / "m")
    assert describe(reloaded) == describe(model)
    assert torch.equal(logits(copy.deepcopy(reloaded), batch), before)
    lowrank_ft.merge(model)
    torch.testing.assert_close(logits(model, batch), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt", "phi3", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("method", ["nf", "lq_lora"])
def test_stacks_on_modegpt(name: str, method: str, tmp_path: Path) -> None:
    case = Case(method, name)
    model, batch = case.tiny.model(), case.tiny.inputs()
    lowrank_ft.wrap(model, "modegpt", recipe="paper", ratio=0.2, align=1, data=case.data())
    options = {"rank": 2, "data": case.data()} if method == "lq_lora" else {}
    lowrank_ft.wrap(model, method, block=16, **options)
    before = logits(model, batch)
    lowrank_ft.save(model, tmp_path / "m")
    reloaded = type(model).from_pretrained(tmp_path / "m")
    assert torch.equal(logits(copy.deepcopy(reloaded), batch), before)
    lowrank_ft.export(model, tmp_path / "dense", "dense")
    stock = type(model).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(copy.deepcopy(stock), batch), before, rtol=1e-4, atol=1e-4)


def test_corda_stacks_on_it() -> None:
    case = Case("nf", "llama")
    model, batch = case.wrapped(), case.tiny.inputs()
    before = logits(model, batch)
    lowrank_ft.wrap(model, "corda", rank=2, data=case.data())
    assert torch.equal(logits(model, batch), before)
    perturb(model)
    adapted = logits(model, batch)
    lowrank_ft.merge(model)
    torch.testing.assert_close(logits(model, batch), adapted, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_training_holds_the_packed_base(tmp_path: Path) -> None:
    case = Case("lq_lora", "llama", options={"rank": 2})
    model, arguments = case.wrapped(), SimpleNamespace(output_dir=str(tmp_path), should_save=True)
    callback, step = AdapterCheckpoint(), SimpleNamespace(global_step=1)
    callback.on_init_end(arguments, step, None, model=model)
    callback.on_save(arguments, step, None, model=model)
    reloaded = type(model).from_pretrained(tmp_path / "checkpoint-1" / "adapter")
    assert_same_state(reloaded, state(model))


def test_embeddings_are_refused() -> None:
    model = TINY["qwen3"].model()
    before = state(model)
    with pytest.raises(TargetError, match="embed_tokens is a Embedding, which 'nf' cannot store in few bits"):
        lowrank_ft.wrap(model, "nf", targets="all-embedding")
    assert_same_state(model, before)


@adapting
def test_requantises_what_training_made(case: Case) -> None:
    model, batch = case.wrapped(), case.tiny.inputs()
    perturb(model, 0.02)
    trained = logits(model, batch)
    drift = lowrank_ft.merge_drift(model)
    assert set(drift) == set(quantized(model))
    assert max(drift.values()) < 1e-6
    merged = lowrank_ft.merge(copy.deepcopy(model), reversible=False)
    if case.looks:
        with pytest.raises(ConfigError, match="looks at calibration data: pass data="):
            lowrank_ft.requantize(model)
        assert torch.equal(logits(model, batch), trained)
    looks = {"data": case.data()} if case.looks else {}
    again = lowrank_ft.requantize(model, **looks)
    assert again is model
    assert quantized(model)
    assert engine.adapter_names(model) == ("default",)
    assert len(engine.stages_of(model)) == 1
    fresh = case.wrap(merged)
    assert_same_state(model, state(fresh))


def test_requantises_a_plain_quantised_base() -> None:
    model = Case("nf", "llama").wrapped()
    with pytest.raises(StateError, match="has no adapter"):
        lowrank_ft.requantize(model)
    lowrank_ft.wrap(model, "lora", rank=2)
    perturb(model)
    lowrank_ft.requantize(model)
    assert not engine.hosts(model)
    assert quantized(model)
    with pytest.raises(StateError, match="No stage has quantised this model"):
        lowrank_ft.requantize(TINY["llama"].model())


@adapting
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_factors_are_kept_in_half_precision(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    case.tiny.model().save_pretrained(tmp_path / "base")
    model = case.wrap(type(case.tiny.model()).from_pretrained(tmp_path / "base", dtype=dtype))
    lowrank_ft.cast_adapters(model, "bfloat16")
    factors = [p for n, p in model.named_parameters() if ".parts." in n]
    assert all(p.dtype == torch.bfloat16 for p in factors)
    lowrank_ft.save(model, tmp_path / "m")
    for load_as in (torch.float32, torch.bfloat16):
        reloaded = type(model).from_pretrained(tmp_path / "m", dtype=load_as)
        if load_as == dtype:
            assert_same_state(reloaded, state(model))
        assert all(p.dtype == torch.bfloat16 for n, p in reloaded.named_parameters() if ".parts." in n)
    lowrank_ft.cast_adapters(model, "float32")
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if ".parts." in n)
    with pytest.raises(ConfigError, match="Factors are kept in one of"):
        lowrank_ft.cast_adapters(model, "int3")
    nola = lowrank_ft.wrap(TINY["llama"].model(), "nola", rank=2, bases=4)
    with pytest.raises(StateError, match="is a 'nola', whose numbers have no dtype to choose"):
        lowrank_ft.cast_adapters(nola, "bfloat16")


def test_the_papers_grid(tmp_path: Path) -> None:
    """All 432 configurations: several of them are chosen, and what they store comes back."""
    case = Case("nf", "llama", options={"budget": 4.3, "grid": "paper"})
    model, batch = case.wrapped(), case.tiny.inputs()
    chosen = {module.scheme for module in quantized(model).values()}
    assert len(chosen) > 2
    assert any(scheme.scale_bits < 8 for scheme in chosen)
    modules = quantized(model).values()
    taken = 8 * sum(m.stored_bytes for m in modules) / sum(m.weights for m in modules)
    assert 0.97 * 4.3 <= taken <= 4.3
    before = logits(model, batch)
    lowrank_ft.save(model, tmp_path / "m")
    reloaded = type(model).from_pretrained(tmp_path / "m")
    assert torch.equal(logits(copy.deepcopy(reloaded), batch), before)
