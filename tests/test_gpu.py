"""What needs an accelerator: run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.modules.adapted import Adapted
from lowrank_ft.modules.quantized import Quantized
from tests.contract.cases import Case
from tests.tiny import TINY, logits, perturb

pytestmark = pytest.mark.gpu


def on_gpu(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    tiny = TINY[name]
    return tiny.model(dtype).cuda(), {k: v.cuda() for k, v in tiny.inputs(dtype).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "flora"])
@pytest.mark.parametrize("name", TINY)
def test_identity_training_and_reload(name: str, method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, batch = on_gpu(name, dtype)
    before = logits(model, batch)
    lowrank_ft.wrap(model, method, rank=2, targets=TINY[name].targets)
    assert torch.equal(logits(model, batch), before)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    lowrank_ft.save(model, tmp_path / "a")
    fresh = lowrank_ft.load(on_gpu(name, dtype)[0], tmp_path / "a")
    assert torch.equal(logits(fresh.eval(), batch), logits(model.eval(), batch))


def test_an_adapter_moves_between_devices(tmp_path: Path) -> None:
    """The start does not depend on the device, nor does the digest of the base."""
    tiny = TINY["llama"]
    here = perturb(lowrank_ft.wrap(tiny.model(), "lora", rank=2))
    lowrank_ft.save(here, tmp_path / "a")
    there = lowrank_ft.load(tiny.model().cuda(), tmp_path / "a")
    for a, b in zip(here.parameters(), there.parameters(), strict=True):
        assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 129, 9216, 100_000])
def test_nolas_factors_are_the_same_bits_on_the_gpu(count: int, dtype: torch.dtype) -> None:
    """By Triton; and what the gradient projects to differs by the order of its sum alone."""
    from lowrank_ft.basis import gpu, philox

    assert gpu.available()
    for seed in (0, 1, (1 << 63) + 5):
        stream = philox.Stream(seed, "model.layers.3.mlp.down_proj", "B")
        generator = torch.Generator().manual_seed(0)
        c, g = (torch.randn(n, generator=generator, dtype=dtype) for n in (70, count))
        here, there = philox.combine(stream, c, count, 0.3), gpu.combine(stream, c.cuda(), count, 0.3)
        assert torch.equal(here, there.cpu())
        exact = philox.project(stream, g.double(), 70, 0.3)
        found = gpu.project(stream, g.cuda(), 70, 0.3).cpu().double()
        # Sums of 1/1024 of the elements in a lane, then of the lanes: rounding grows with their number.
        torch.testing.assert_close(found, exact, rtol=0, atol=torch.finfo(dtype).eps * 32 * count**0.5)


def test_a_nola_trains_on_the_gpu_and_runs_on_the_cpu(tmp_path: Path) -> None:
    model, batch = on_gpu("llama", torch.float32)
    lowrank_ft.wrap(model, "nola", rank=2, bases=16).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    lowrank_ft.save(model, tmp_path)
    here = lowrank_ft.load(TINY["llama"].model(), tmp_path)
    for a, b in zip(engine.hosts(here).values(), engine.hosts(model).values(), strict=True):
        mine, theirs = (host.deltas["default"].as_lora() for host in (a, b))
        assert torch.equal(mine.A, theirs.A.cpu())
        assert torch.equal(mine.B, theirs.B.cpu())


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "resnet"])
def test_corda_starts_where_the_model_is(name: str, mode: str) -> None:
    """Statistics are gathered and solved on the GPU, and lead to the start that the CPU finds."""
    case = Case("corda", name, options={"rank": 2, "mode": mode})
    here = case.wrap(case.tiny.model(torch.float64))
    there = case.wrap(case.tiny.model(torch.float64).cuda())
    assert {t.device.type for t in there.state_dict().values()} == {"cuda"}
    for path, host in engine.hosts(here).items():
        if isinstance(host, Adapted):
            deltas = [h.deltas["default"] for h in (host, engine.hosts(there)[path])]
            starts = [(delta.B @ delta.A).detach().cpu() for delta in deltas]
            torch.testing.assert_close(*starts, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(dtype: torch.dtype) -> None:
    model, batch = on_gpu("llama", torch.float32)
    perturb(lowrank_ft.wrap(model.cpu(), "lora", rank=2)).cuda()
    exact = model(**batch).loss
    with torch.autocast("cuda", dtype):
        loss = model(**batch).loss
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2**-7)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("method", "options"),
    [("lord", {}), ("modegpt", {}), ("modegpt", {"recipe": "paper"}), ("modegpt", {"low_rank": False})],
)
@pytest.mark.parametrize("name", ["llama", "opt", "qwen3", "gemma3", "phi3", "gpt2"])
def test_compression_where_the_model_is(
    name: str, method: str, options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Statistics are gathered and solved on the GPU; what comes out is there, and reloads to the bit."""
    model, batch = on_gpu(name, dtype)
    data = Case(method, name).data(dtype)
    lowrank_ft.wrap(model, method, ratio=0.3, align=1, data=data, **options)
    assert {t.device.type for t in model.state_dict().values()} == {"cuda"}
    lowrank_ft.save(model, tmp_path / "model")
    reloaded = type(model).from_pretrained(tmp_path / "model", dtype=dtype).cuda().eval()
    assert torch.equal(logits(reloaded, batch), logits(model, batch))
    ids = batch["input_ids"]
    both = [
        model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=c, pad_token_id=0)  # type: ignore[operator]
        for c in (True, False)
    ]
    assert dtype != torch.float32 or torch.equal(*both)


@pytest.mark.parametrize("objective", ["loss", "output", "weight"])
def test_convolutions_are_compressed_where_they_are(objective: str, tmp_path: Path) -> None:
    model, batch = on_gpu("resnet", torch.float32)
    data: dict[str, Any] = {} if objective == "weight" else {"data": Case("tucker", "resnet").data()}
    options: dict[str, Any] = {"targets": "all-conv", "ratio": 0.3, "align": 1, "objective": objective}
    lowrank_ft.wrap(model, "tucker", **options, **data)
    assert {t.device.type for t in model.state_dict().values()} == {"cuda"}
    lowrank_ft.save(model, tmp_path / "model")
    reloaded = type(model).from_pretrained(tmp_path / "model").cuda().eval()
    assert torch.equal(logits(reloaded, batch), logits(model, batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "codebook": "signed"}, {"bits": 3}, {"bits": 3, "rounding": "feedback"}, {"bits": 8},
        {"budget": 4.2}, {"library": "bitsandbytes"},
        {"library": "bitsandbytes", "codebook": "fp4", "scale_bits": 32},
        {"library": "bitsandbytes", "codebook": "int8", "bits": 8},
    ],
    ids=str,
)  # fmt: skip
def test_quantised_weights_are_read_as_on_the_cpu(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Packed on one device and read on the other: the same codes, and values that differ by a rounding."""
    case = Case("nf", "llama", options=options)
    there = case.wrap(case.tiny.model(dtype).cuda())
    here = case.wrap(case.tiny.model(dtype))
    for a, b in zip(here.modules(), there.modules(), strict=True):
        if isinstance(a, Quantized):
            assert a.matrix(torch.float32).sub(b.matrix(torch.float32).cpu()).abs().max() < 1e-2
            moved = {name: tensor.cuda() for name, tensor in a.packed.items()}
            rows = a.storage.unpack(moved, a.in_features, 0, a.out_features, torch.float32)
            torch.testing.assert_close(rows.cpu(), a.matrix(torch.float32), rtol=1e-6, atol=1e-7)
    batch = {k: v.cuda() for k, v in case.tiny.inputs(dtype).items()}
    lowrank_ft.wrap(there, "lora", rank=2)
    there.train()(**batch).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in there.parameters() if p.requires_grad)


@pytest.mark.parametrize("objective", ["weight", "fisher", "activation", "loss"])
def test_lq_lora_on_the_gpu(objective: str, tmp_path: Path) -> None:
    case = Case("lq_lora", "llama", options={"rank": 2, "bits": 3, "objective": objective})
    data = [{k: v.cuda() for k, v in batch.items()} for batch in case.data()]
    looks = {"data": data} if case.looks else {}
    model, batch = case.tiny.model().cuda(), {k: v.cuda() for k, v in case.tiny.inputs().items()}
    lowrank_ft.wrap(model, "lq_lora", **case.options, **looks)
    before = logits(model, batch)
    lowrank_ft.save(model, tmp_path / "m")
    reloaded = type(model).from_pretrained(tmp_path / "m").cuda()
    assert torch.equal(logits(reloaded, batch), before)
