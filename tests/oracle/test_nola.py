"""NOLA against its specification, written out in Python's integers, and every way to compute it."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank_ft
from lowrank_ft import basis, compiled, engine
from lowrank_ft.algorithms.nola import NOLADelta
from lowrank_ft.basis import cpu, philox
from lowrank_ft.basis.philox import Stream
from lowrank_ft.checkpoint import files
from lowrank_ft.errors import CheckpointError, ConfigError
from lowrank_ft.quant import blockwise
from tests.oracle.moments import randn
from tests.oracle.single import delta_of, linear
from tests.tiny import TINY, logits, perturb

STREAM = Stream(seed=2026, name="model.layers.3.mlp.down_proj", factor="A")
# The first 4096 signs of basis matrix 1 as bytes 0 and 1, and the first 256 uniform entries as little-endian
# float32, of the stream above; other factors, layers and seeds. To be the same for ever.
GOLDEN = {
    "A": "ad8123c09d424867d21a75650e1aa71c",
    "B": "c3b0c77ba252adef219c76754d73a809",
    "layer": "bcc0eea63e3523c4fc02383557356b18",
    "seed": "57bdc7c614c04fa692b510d581321712",
    "uniform": "78bdbdbb4156e7c836e2421432b0b172",
}
STREAMS = {
    "A": STREAM,
    "B": Stream(2026, STREAM.name, "B"),
    "layer": Stream(2026, "model.layers.4.mlp.down_proj", "A"),
    "seed": Stream((1 << 40) + 2026, STREAM.name, "A"),
    "uniform": Stream(2026, STREAM.name, "A", "uniform"),
}


def hash_of(stream: Stream, dtype: torch.dtype) -> str:
    """By way of the public functions: one coefficient of 1 picks one basis matrix."""
    pick = torch.tensor([0.0, 1.0], dtype=dtype)
    if stream.kind == "uniform":
        content = basis.combine(stream, pick, 256, 1.0).float().numpy().astype("<f4").tobytes()
    else:
        content = (basis.combine(stream, pick, 4096, 1.0) < 0).to(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:32]


def sign(stream: Stream, index: int, element: int) -> int:
    """The specification, one element at a time."""
    words = philox.philox((element // 128, index, *stream.tail), stream.key)
    return 1 - 2 * (words[element % 128 // 32] >> element % 32 & 1)


def signs(stream: Stream, bases: int, shape: tuple[int, int]) -> Tensor:
    """Basis matrices 0 to ``bases``, in float64."""
    rows = [[sign(stream, i, e) for e in range(shape[0] * shape[1])] for i in range(bases + 1)]
    return torch.tensor(rows, dtype=torch.float64).view(bases + 1, *shape)


# The basis --------------------------------------------------------------------------------------------------


def test_philox_is_the_published_one() -> None:
    """The known answers of Random123 for philox4x32 with ten rounds."""
    ones = 0xFFFFFFFF
    known = {
        ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ((ones,) * 4, (ones,) * 2): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (
            0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
        ),
    }  # fmt: skip
    for (counter, key), words in known.items():
        assert philox.philox(counter, key) == words


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seed", [0, 99])
def test_golden_hashes(name: str, dtype: torch.dtype, threads: int, seed: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            assert hash_of(STREAMS[name], dtype) == GOLDEN[name]
            assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", STREAMS)
def test_golden_hashes_without_a_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert hash_of(STREAMS[name], torch.float32) == GOLDEN[name]


def test_entries_are_those_of_the_specification() -> None:
    drawn = philox.matrices(STREAM, 0, 4, 15 * 20, torch.empty(0, dtype=torch.float64))
    assert torch.equal(drawn.view(4, 15, 20), signs(STREAM, 3, (15, 20)))
    uniform = philox.matrices(STREAMS["uniform"], 2, 3, 9, torch.empty(0))
    words = [w for block in range(3) for w in philox.philox((block, 2, *STREAM.tail), STREAM.key)]
    assert uniform[0].tolist() == [(w >> 8) / (1 << 23) - 1 for w in words[:9]]


def test_the_counter_takes_62_bits_of_the_name() -> None:
    digest = hashlib.sha256(STREAM.name.encode()).digest()
    low, high = struct.unpack("<II", digest[:8])
    assert STREAM.tail == (low, 2 * high % (1 << 32))
    assert STREAMS["B"].tail == (low, 2 * high % (1 << 32) + 1)
    assert STREAMS["seed"].key == (2026, 1 << 8)


needs_compiler = pytest.mark.skipif(not cpu.available(), reason="no C compiler")


@needs_compiler
@pytest.mark.parametrize("count", [1, 31, 128, 129, 2047, 2048, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_kernel_combines_to_the_same_bits(count: int, dtype: torch.dtype) -> None:
    c = randn(37, seed=1).to(dtype)
    assert torch.equal(cpu.combine(STREAM, c, count, 0.3), philox.combine(STREAM, c, count, 0.3))


@needs_compiler
@pytest.mark.parametrize("count", [1, 129, 5000])
def test_the_kernel_projects(count: int) -> None:
    g = randn(count, seed=2)
    exact = philox.project(STREAM, g, 37, 0.3)
    # float64: at most 5000 terms of size 1, each rounded at 1e-16; float32 sums of 64 terms, then in float64.
    torch.testing.assert_close(cpu.project(STREAM, g, 37, 0.3), exact, rtol=0, atol=1e-11)
    single = cpu.project(STREAM, g.float(), 37, 0.3).double()
    torch.testing.assert_close(single, exact, rtol=0, atol=64 * 6e-8 * count**0.5)


def test_a_compiler_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such instruction >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.warns(RuntimeWarning, match="could not be built.*no such instruction"):
        assert compiled.library.__wrapped__(cpu.KERNEL) is None
    monkeypatch.setenv("LOWRANK_FT_NO_COMPILER", "1")
    assert compiled.library.__wrapped__(cpu.KERNEL) is None


def test_triton_kernels_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="comes with torch's CUDA builds")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from lowrank_ft.basis import gpu

    for dtype in (torch.float32, torch.float64):
        c = randn(5, seed=1).to(dtype)
        assert torch.equal(gpu.combine(STREAM, c, 300, 0.3), philox.combine(STREAM, c, 300, 0.3))


# The update -------------------------------------------------------------------------------------------------


def direct(delta: NOLADelta) -> Tensor:
    """``ΔW`` by the paper's equation, differentiable, each basis matrix in memory."""
    node, layer = delta.node, delta.layer
    A, B = (
        signs(Stream(node.seed, layer.name, factor), node.bases, shape)
        for factor, shape in (("A", (node.rank, layer.in_features)), ("B", (layer.out_features, node.rank)))
    )
    unit = 1 / (3 * node.bases) ** 0.5
    start = 1 / (3 * layer.in_features) ** 0.5
    total_A = start * A[0] + unit * torch.einsum("i,ijk->jk", delta.coefficients_A, A[1:])
    total_B = unit * torch.einsum("i,ijk->jk", delta.coefficients_B, B[1:])
    return node.scale * total_B @ total_A


def test_the_update_and_its_gradient_are_those_of_the_equation() -> None:
    model = perturb(lowrank_ft.wrap(linear(), "nola", rank=3, bases=5, alpha=2.0, seed=1 << 50))
    delta = delta_of(model)
    torch.testing.assert_close(delta.weight(), direct(delta), rtol=1e-13, atol=1e-14)
    probe = randn(7, 11, seed=4)
    coefficients = [delta.coefficients_A, delta.coefficients_B]
    ours = torch.autograd.grad((delta.weight() * probe).sum(), coefficients)
    exact = torch.autograd.grad((direct(delta) * probe).sum(), coefficients)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_layers_of_one_shape_have_bases_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    lowrank_ft.wrap(model, "nola", rank=2, bases=3)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5) if p.requires_grad else None
    first, second = (delta_of(model, name).as_lora() for name in ("0", "1"))
    assert not torch.equal(first.A, second.A)
    assert not torch.equal(first.B, second.B)


def test_entries_have_the_papers_variance() -> None:
    model = lowrank_ft.wrap(linear(200, 300), "nola", rank=50, bases=64)
    delta = delta_of(model)
    start = delta.as_lora().A.detach().clone()
    # 15000 entries: the variance of a variance estimate is about 2 / n of it, so 5 deviations are 6 %; signs
    # have no spread at all.
    assert torch.allclose(start.abs(), torch.tensor(1 / 900**0.5, dtype=torch.float64))
    with torch.no_grad():
        delta.coefficients_A.copy_(torch.ones(64))
    assert (delta.as_lora().A - start).var().item() == pytest.approx(1 / 3, rel=0.06)
    uniform = delta_of(lowrank_ft.wrap(linear(200, 300), "nola", rank=50, bases=64, basis="uniform"))
    start = uniform.as_lora().A.detach().clone()
    assert start.var().item() == pytest.approx(1 / 900, rel=0.06)
    with torch.no_grad():
        uniform.coefficients_A.copy_(torch.ones(64))
    assert (uniform.as_lora().A - start).var().item() == pytest.approx(1 / 3, rel=0.06)


def test_starts_are_zero_and_have_a_gradient() -> None:
    for options in ({}, {"init": "coefficients"}):
        model = lowrank_ft.wrap(linear(), "nola", rank=3, bases=5, **options)
        delta = delta_of(model)
        assert not delta.weight().any()
        model(randn(4, 11)).square().sum().backward()
        assert delta.coefficients_B.grad.abs().min() > 0


# Once for each step -----------------------------------------------------------------------------------------


class Calls:
    """Counts what the basis is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.combined = self.projected = 0
        combine, project = basis.combine, basis.project

        def counted_combine(*args: Any) -> Tensor:
            self.combined += 1
            return combine(*args)

        def counted_project(*args: Any) -> Tensor:
            self.projected += 1
            return project(*args)

        monkeypatch.setattr(basis, "combine", counted_combine)
        monkeypatch.setattr(basis, "project", counted_project)


def micro_batches(count: int) -> list[Tensor]:
    return [randn(6, 11, seed=seed) for seed in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :7]).square().mean()


def test_micro_batches_share_one_materialisation_and_one_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    try:
        model = perturb(lowrank_ft.wrap(linear().train(), "nola", rank=3, bases=5))
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        calls = Calls(monkeypatch)
        for x in micro_batches(4):
            with accelerator.accumulate(wrapped):
                accelerator.backward(loss_of(wrapped, x))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1e-3)
                optimizer.step()
                optimizer.zero_grad()
        assert (calls.combined, calls.projected) == (2, 2)
    finally:
        accelerator.free_memory()
        _reset_accelerate()

    total = sum(loss_of_weight(twin, x) for x in micro_batches(4)) / 4
    parameters = list(delta_of(twin).parameters())
    gradients = torch.autograd.grad(total, parameters)
    norm = torch.stack([g.norm() for g in gradients]).norm()
    for p, g, q in zip(parameters, gradients, delta_of(model).parameters(), strict=True):
        expected = p - 0.1 * g * 1e-3 / (norm + 1e-6)  # clip_grad_norm_'s own guard
        torch.testing.assert_close(q, expected, rtol=1e-12, atol=1e-14)


def loss_of_weight(model: nn.Module, x: Tensor) -> Tensor:
    """The same loss by way of the equation."""
    layer = model.layer.base
    y = nn.functional.linear(x, layer.weight + direct(delta_of(model)), layer.bias)
    return (y - x[:, :7]).square().mean()


def _reset_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_gradients_thrown_away_are_not_remembered() -> None:
    from accelerate.state import GradientState

    state = GradientState()
    try:
        model = perturb(lowrank_ft.wrap(linear().train(), "nola", rank=3, bases=5))
        parameters = [p for p in model.parameters() if p.requires_grad]
        first, second = micro_batches(2)
        state._set_sync_gradients(False)
        loss_of(model, first).backward()
        assert all(not p.grad.any() for p in parameters)  # not projected yet
        model.zero_grad()
        state._set_sync_gradients(True)
        with pytest.warns(RuntimeWarning, match="of micro-batches were set to None before accelerate"):
            loss_of(model, second).backward()
        expected = torch.autograd.grad(loss_of_weight(model, second), parameters)
        for p, g in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-14)
    finally:
        _reset_accelerate()


def test_a_layer_used_twice_gets_both_gradients() -> None:
    from accelerate.state import GradientState

    state = GradientState()
    try:
        model = perturb(lowrank_ft.wrap(linear(11, 11).train(), "nola", rank=3, bases=5))
        parameters = [p for p in model.parameters() if p.requires_grad]
        layer = model.layer.base
        x, y = micro_batches(2)

        def exact(x: Tensor) -> Tensor:
            W = layer.weight + direct(delta_of(model))
            inner = nn.functional.linear(x, W, layer.bias)
            return nn.functional.linear(inner, W, layer.bias).square().mean()

        state._set_sync_gradients(False)
        model(model(x)).square().mean().backward()
        state._set_sync_gradients(True)
        model(model(y)).square().mean().backward()
        expected = torch.autograd.grad(exact(x) + exact(y), parameters)
        for p, g in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-11, atol=1e-13)
    finally:
        _reset_accelerate()


def test_checkpointing_builds_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = perturb(lowrank_ft.wrap(TINY["llama"].model(), "nola", rank=2, bases=3)).train()
    plain = copy.deepcopy(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    batch = TINY["llama"].inputs()
    calls = Calls(monkeypatch)
    model(**batch).loss.backward()
    assert calls.combined == 2 * len(engine.hosts(model))
    plain(**batch).loss.backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        if a.requires_grad:
            assert torch.equal(a.grad, b.grad)


def test_a_step_behind_the_version_counters_back_is_seen() -> None:
    """As optimisers do that work on raw pointers."""
    model = perturb(lowrank_ft.wrap(linear(), "nola", rank=3, bases=5))
    x = micro_batches(1)[0]
    loss_of(model, x).backward()
    for p in delta_of(model).parameters():
        p.data.sub_(0.1 * p.grad)
    torch.testing.assert_close(loss_of(model, x), loss_of_weight(model, x), rtol=1e-12, atol=0)


def test_evaluation_in_inference_mode_does_not_spoil_training() -> None:
    model = perturb(lowrank_ft.wrap(linear(), "nola", rank=3, bases=5))
    x = micro_batches(1)[0]
    with torch.inference_mode():
        model(x)
    loss_of(model, x).backward()
    assert delta_of(model).coefficients_A.grad.abs().sum() > 0


# Dynamo looks at .grad of whatever enters a graph, and a factor is no leaf; and it instantiates Function.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_takes_the_same_steps() -> None:
    """In several graphs, since factors are built between them."""
    batch = TINY["llama"].inputs()
    torch._dynamo.reset()
    model = perturb(lowrank_ft.wrap(TINY["llama"].model(), "nola", rank=2, bases=4, layers=0))
    losses = []
    for run in (torch.compile(copy.deepcopy(model), backend="aot_eager"), model):
        optimizer = torch.optim.SGD([p for p in run.parameters() if p.requires_grad], lr=0.5)
        losses.append([])
        for _ in range(4):
            loss = run(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32, a few steps
    assert losses[0][-1] < losses[0][0]


def test_training_leaves_the_global_random_state_alone() -> None:
    model = lowrank_ft.wrap(TINY["llama"].model(), "nola", rank=2, bases=3).train()
    before = torch.get_rng_state()
    model(**TINY["llama"].inputs()).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


# Bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_rounding_twice_is_rounding_once(bits: int) -> None:
    for seed in range(50):
        values = randn(130, seed=seed).float() * 10.0 ** (seed % 20 - 10)
        once = blockwise.rounded(values, bits)
        assert torch.equal(blockwise.rounded(once, bits), once)
        if bits < 16:
            largest = 2 ** (bits - 1) - 1
            blocks = nn.functional.pad(values, (0, 62)).view(-1, 64)
            # Half a step, and what the scale's own rounding moves the largest code by.
            bound = blocks.abs().amax(1) / largest * (0.5 + largest * 2**-8)
            error = nn.functional.pad(once - values, (0, 62)).view(-1, 64).abs().amax(1)
            assert (error <= bound).all()
    assert not blockwise.rounded(torch.zeros(70), bits).any()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("bases", [6, 65])
def test_fewer_bits_reload_with_equal_logits(bits: int, bases: int, tmp_path: Path) -> None:
    tiny = TINY["llama"]
    model = perturb(lowrank_ft.wrap(tiny.model(), "nola", rank=2, bases=bases, bits=bits), scale=1.0)
    batch = tiny.inputs()
    exact = delta_of(model, next(iter(engine.hosts(model)))).coefficients_A.detach().clone()
    lowrank_ft.save(model, tmp_path / "a")
    reloaded = lowrank_ft.load(tiny.model(), tmp_path / "a")
    assert torch.equal(logits(reloaded, batch), logits(model, batch))
    kept = delta_of(reloaded, next(iter(engine.hosts(model)))).coefficients_A
    assert not torch.equal(kept, exact)
    lowrank_ft.save(reloaded, tmp_path / "b")
    first, second = ((tmp_path / d / "adapter.safetensors").read_bytes() for d in "ab")
    assert first == second
    lowrank_ft.export(model, tmp_path / "peft")
    lowrank_ft.merge(model)
    torch.testing.assert_close(logits(model, batch), logits(reloaded, batch), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_holds_the_coefficients_and_nothing_else(tmp_path: Path) -> None:
    model = lowrank_ft.wrap(TINY["llama"].model(), "nola", rank=2, bases=64, bits=4)
    lowrank_ft.save(model, tmp_path / "a")
    layers = len(engine.hosts(model))
    held = load_file(tmp_path / "a" / "adapter.safetensors")
    assert {name: t.numel() * t.element_size() for name, t in held.items()} == {
        "default.nola.coefficients_A.codes": 32 * layers,
        "default.nola.coefficients_A.scales": 2 * layers,
        "default.nola.coefficients_B.codes": 32 * layers,
        "default.nola.coefficients_B.scales": 2 * layers,
    }


def test_training_rounds_where_it_is_asked_to() -> None:
    x = micro_batches(1)[0]
    for train_rounded in (False, True):
        options = {"rank": 3, "bases": 5, "bits": 4, "train_rounded": train_rounded}
        model = perturb(lowrank_ft.wrap(linear(), "nola", **options), scale=1.0).train()
        trained = model(x).detach()
        exact = copy.deepcopy(model)
        assert torch.equal(model.eval()(x), trained) is train_rounded
        if train_rounded:  # the gradient is that at the rounded point
            delta = delta_of(exact)
            loss_of(exact, x).backward()
            found = [p.grad.clone() for p in delta.parameters()]
            with torch.no_grad():
                for p in delta.parameters():
                    p.copy_(blockwise.rounded(p, 4))
            expected = torch.autograd.grad(loss_of_weight(exact, x), list(delta.parameters()))
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


# Checkpoints ------------------------------------------------------------------------------------------------


def named(order: str) -> nn.Module:
    """Two layers of one shape, registered in this order; run in the order of their names."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in order:
                layer = nn.Linear(6, 6)
                with torch.no_grad():
                    layer.weight.copy_(randn(6, 6, seed=ord(name)))
                    layer.bias.zero_()
                self.add_module(name, layer)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    return Named()


def test_another_order_of_modules_is_the_same_model(tmp_path: Path) -> None:
    model = perturb(lowrank_ft.wrap(named("ab"), "nola", rank=2, bases=4), scale=1.0)
    lowrank_ft.save(model, tmp_path)
    other = lowrank_ft.load(named("ba"), tmp_path)
    x = torch.ones(2, 6)
    assert torch.equal(model(x), other(x))
    assert not torch.equal(model(x), named("ab")(x))


def tampered(directory: Path, change: Any) -> None:
    """Change the index and sign it again: what another release would have written."""
    path = directory / files.INDEX
    index = json.loads(path.read_text())
    change(index)
    index["checksum"] = files._self_checksum(index)
    path.write_text(json.dumps(index))


def test_other_bases_are_refused(tmp_path: Path) -> None:
    tiny = TINY["llama"]
    model = perturb(lowrank_ft.wrap(tiny.model(), "nola", rank=2, bases=4))

    def digest(index: dict[str, Any]) -> None:
        index["digests"]["default"] = "0" * 64

    def version(index: dict[str, Any]) -> None:
        for group in index["manifest"]:
            group["node"]["deltas"]["default"]["version"] = 2

    for change, message in ((digest, "with other random bases"), (version, "bases are of version 2")):
        lowrank_ft.save(model, tmp_path / "a")
        tampered(tmp_path / "a", change)
        fresh = tiny.model()
        with pytest.raises(CheckpointError, match=message):
            lowrank_ft.load(fresh, tmp_path / "a")
        assert not engine.hosts(fresh)


def test_other_bases_are_refused_by_from_pretrained(tmp_path: Path) -> None:
    model = perturb(lowrank_ft.wrap(TINY["llama"].model(), "nola", rank=2, bases=4))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["digests"]["default"] = "0" * 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="with other random bases"):
        type(model).from_pretrained(tmp_path)


def test_codes_of_another_type_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tiny = TINY["llama"]
    lowrank_ft.save(lowrank_ft.wrap(tiny.model(), "nola", rank=2, bases=4, bits=8), tmp_path)
    path = tmp_path / "adapter.safetensors"
    save_file({k: v.float() for k, v in load_file(path).items()}, path)

    def resign(index: dict[str, Any]) -> None:
        index["files"][path.name] = {"sha256": files.sha256(path), "bytes": path.stat().st_size}

    tampered(tmp_path, resign)
    with pytest.raises(CheckpointError, match="wrong type"):
        lowrank_ft.load(tiny.model(), tmp_path)


def test_bad_options_name_themselves() -> None:
    for options, message in (
        ({"bases": 0}, "bases must be at least 1"),
        ({"seed": -1}, "has 64 bits and no sign"),
        ({"seed": 1 << 64}, "has 64 bits and no sign"),
        ({"train_rounded": True}, "no meaning with bits=32"),
        ({"bits": 5}, "bits"),
    ):
        with pytest.raises(ConfigError, match=message):
            lowrank_ft.wrap(linear(), "nola", rank=2, **options)


def test_no_library_is_loaded_where_nothing_is_drawn() -> None:
    """Importing the package builds nothing."""
    import subprocess

    code = "import lowrank_ft; from lowrank_ft import compiled; print(compiled.library.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
