"""SmolLM2-135M with its real weights: what the tiny models promise, held on the real thing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.checkpoint import verify
from lowrank_ft.engine.counting import count
from tests.tiny import perturb

pytestmark = pytest.mark.real

BASE = Path(__file__).parents[1] / ".cache" / "assets" / "smollm2"
TEXT = "The Nile is the longest river of Africa, and for most of its length it flows through desert."


@pytest.fixture(scope="module")
def ids() -> Tensor:
    assert BASE.is_dir(), "the model is not there: run `make assets`"
    return AutoTokenizer.from_pretrained(BASE)(TEXT, return_tensors="pt")["input_ids"]


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.fixture(scope="module")
def trained() -> Iterator[nn.Module]:
    """A LoRA moved as training moves one: 2 % of the logits' scale, not noise that drowns the model."""
    return perturb(lowrank_ft.wrap(base(), "lora", rank=16, alpha=32), 0.005)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}], ids=str)
def test_wrap_is_the_identity_to_the_bit(ids: Tensor, options: dict[str, object]) -> None:
    model = base()
    before = logits(model, ids)
    lowrank_ft.wrap(model, "lora", rank=16, **options)
    assert torch.equal(logits(model, ids), before)
    assert len(engine.hosts(model)) == 210


def test_save_fresh_process_load_gives_equal_logits(trained: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    lowrank_ft.save(trained, tmp_path / "adapter")
    assert verify.reload_difference(trained, str(BASE), tmp_path / "adapter", {"input_ids": ids}) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merging_adds_no_more_error_than_the_dtype_has(dtype: torch.dtype, ids: Tensor) -> None:
    """Against the same model in float64, with its adapter apart.

    Merging rounds each weight once (u), which moves a layer's output by what rounding that output moves it;
    so the merged model may err twice what the unmerged one errs, and by chance somewhat more. The bound for
    one layer is in tests/oracle; this is the whole model's.
    """
    model = perturb(lowrank_ft.wrap(base(dtype), "lora", rank=16, alpha=32), 0.005)
    exact = lowrank_ft.wrap(base(dtype).double(), "lora", rank=16, alpha=32)
    state = {k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    exact.load_state_dict(state)
    true = logits(exact, ids)
    del exact
    before = {k: v.clone() for k, v in model.state_dict().items()}

    unmerged = logits(model, ids)
    lowrank_ft.merge(model)
    merged = logits(model, ids)
    errors = [(out.double() - true).square().mean().sqrt().item() for out in (unmerged, merged)]
    print(f"{dtype}: rms error unmerged {errors[0]:.2e}, merged {errors[1]:.2e}, logits {true.std():.2f}")
    assert errors[1] <= 3 * errors[0]

    lowrank_ft.unmerge(model)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(logits(model, ids), unmerged)


def test_peft_both_ways(trained: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    ours = logits(trained, ids)
    lowrank_ft.export(trained, tmp_path / "peft")
    theirs = PeftModel.from_pretrained(base(), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs, ids), ours, rtol=0, atol=1e-5)
    back = lowrank_ft.load(base(), tmp_path / "peft")
    assert torch.equal(logits(back, ids), ours)

    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    other = perturb(get_peft_model(base(), config), 0.005).eval()
    other.save_pretrained(tmp_path / "other")
    mine = lowrank_ft.load(base(), tmp_path / "other")
    wanted = logits(other, ids)
    torch.testing.assert_close(logits(mine, ids), wanted, rtol=0, atol=1e-5)


def test_generation_with_a_cache_equals_without(trained: nn.Module, ids: Tensor) -> None:
    outputs = [
        trained.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use_cache)  # type: ignore[operator]
        for use_cache in (True, False)
    ]
    assert torch.equal(*outputs)


def test_unload_gives_the_base_back(ids: Tensor) -> None:
    model = base()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    perturb(lowrank_ft.wrap(model, "lora", rank=4, init="olora"))
    lowrank_ft.unload(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize(
    "options", [{}, {"recipe": "paper", "calibration": {"sequential": True}}], ids=["loss", "paper"]
)
def test_compression_saves_reloads_and_generates(
    options: dict[str, Any], ids: Tensor, tmp_path: Path
) -> None:
    """Three blocks of the real model by MoDeGPT: a fresh process computes the same bits, cache or none."""
    model, dense = base(), base()
    batches = [{"input_ids": ids.repeat(1, 10)[:, i : i + 160]} for i in range(10)]
    calibration = {"gradient_samples": 2, **options.pop("calibration", {})}
    lowrank_ft.wrap(
        model, "modegpt", ratio=0.03, layers=(0, 14, 29), data=batches, calibration=calibration, **options
    )
    assert count(model).blocks <= count(dense).blocks * 0.97
    lowrank_ft.save(model, tmp_path / "model")
    assert verify.reload_difference(model, None, tmp_path / "model", {"input_ids": ids}) == 0.0
    outputs = [
        model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use_cache)  # type: ignore[operator]
        for use_cache in (True, False)
    ]
    assert torch.equal(*outputs)
    lowrank_ft.export(model, tmp_path / "dense", "dense")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    # The stock attention sums over the zeroed dimensions as well: float32 rounding, logits up to 40.
    torch.testing.assert_close(logits(stock, ids), logits(model, ids), rtol=1e-4, atol=1e-3)


def test_nola_starts_at_the_identity_reloads_and_goes_to_peft(ids: Tensor, tmp_path: Path) -> None:
    """At four bits, in under 64 KB with its metadata."""
    model = base()
    before = logits(model, ids)
    lowrank_ft.wrap(model, "nola", rank=16, bases=128, bits=4)
    assert torch.equal(logits(model, ids), before)
    perturb(model, 0.03)
    ours = logits(model, ids)
    assert float((ours - before).abs().max()) > 1e-2
    lowrank_ft.save(model, tmp_path / "adapter")
    size = sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir())
    print(f"nola: {size} bytes, model card included")
    assert size < 64 * 1024
    assert verify.reload_difference(model, str(BASE), tmp_path / "adapter", {"input_ids": ids}) == 0.0
    lowrank_ft.export(model, tmp_path / "peft")
    theirs = PeftModel.from_pretrained(base(), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs, ids), ours, rtol=0, atol=1e-5)
    lowrank_ft.unload(model)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("mode", ["knowledge", "instruction"])
def test_corda_starts_at_the_identity_reloads_and_goes_to_peft(
    mode: str, ids: Tensor, tmp_path: Path
) -> None:
    """Three blocks; PEFT reads the export on the untouched base, and gives equal logits to 1e-5."""
    model = base()
    before = logits(model, ids)
    batches = [{"input_ids": ids.repeat(1, 10)[:, i : i + 160]} for i in range(10)]
    lowrank_ft.wrap(model, "corda", mode=mode, rank=16, layers=(0, 14, 29), data=batches)
    assert torch.equal(logits(model, ids), before)
    perturb(model, 0.001)
    ours = logits(model, ids)
    assert float((ours - before).abs().max()) > 1e-2
    lowrank_ft.save(model, tmp_path / "adapter")
    assert verify.reload_difference(model, str(BASE), tmp_path / "adapter", {"input_ids": ids}) == 0.0
    lowrank_ft.export(model, tmp_path / "peft")
    theirs = PeftModel.from_pretrained(base(), tmp_path / "peft").eval()
    difference = float((logits(theirs, ids) - ours).abs().max())
    print(f"corda, {mode}: PEFT on the untouched base differs by {difference:.1e}, logits {ours.std():.2f}")
    torch.testing.assert_close(logits(theirs, ids), ours, rtol=0, atol=1e-5)
    lowrank_ft.unload(model)
    assert torch.equal(logits(model, ids), before)


def files(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("unit", "asked", "layers"),
    [("disk", 411.0, range(0, 30, 3)), ("memory", 474.0, range(0, 30, 6)), ("bits", 3.3, range(0, 30, 6))],
    ids=["disk", "memory", "bits"],
)
def test_a_budget_is_met_and_never_exceeded(
    unit: str, asked: float, layers: Any, ids: Tensor, tmp_path: Path
) -> None:
    """Within half a percent under what was asked; a fresh process computes the same bits."""
    model = base()
    lowrank_ft.wrap(model, "nf", codebook="signed", budget=asked, budget_of=unit, layers=layers)
    lowrank_ft.save(model, tmp_path / "model")
    rows = engine.stages_of(model)[0]["layers changed"]
    weights = sum(row["parameters before"] for row in rows)
    taken = {
        "disk": files(tmp_path / "model") / 1e6,
        "memory": count(model).bytes / 1e6,
        "bits": sum(row["bits"] * row["parameters before"] for row in rows) / weights,
    }[unit]
    assert 0.995 * asked <= taken <= asked
    assert verify.reload_difference(model, None, tmp_path / "model", {"input_ids": ids}) == 0.0


def test_lq_lora_splits_saves_reloads_trains_and_merges(ids: Tensor, tmp_path: Path) -> None:
    """Three blocks of the real model in three bits: closer than rounding, and trainable."""
    batches = [{"input_ids": ids.repeat(1, 10)[:, i : i + 160]} for i in range(10)]
    where = {"layers": (0, 14, 29), "data": batches, "calibration": {"gradient_samples": 2}}
    dense = logits(base(), ids)
    rounded = lowrank_ft.wrap(base(), "nf", bits=3, layers=(0, 14, 29))
    model = lowrank_ft.wrap(base(), "lq_lora", rank=8, bits=3, **where)
    assert (logits(model, ids) - dense).norm() < 0.7 * (logits(rounded, ids) - dense).norm()

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(trained, lr=1e-3), []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    lowrank_ft.cast_adapters(model, "bfloat16")
    before = logits(model, ids)
    lowrank_ft.save(model, tmp_path / "model")
    assert verify.reload_difference(model, None, tmp_path / "model", {"input_ids": ids}) == 0.0
    assert max(lowrank_ft.merge_drift(model).values()) < 1e-6
    lowrank_ft.merge(model)
    # Weights are summed once instead of outputs at every token: float32 rounding, logits up to 40.
    torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-3)
