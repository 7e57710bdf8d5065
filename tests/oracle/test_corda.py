"""CorDA against its definition in float64, and each fault of existing implementations as a test."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import lowrank_ft
from lowrank_ft import engine, solve
from lowrank_ft.algorithms.corda import CorDA, spread
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.layer import layer_of
from lowrank_ft.solve import directions
from tests.oracle.moments import randn, symmetric_root
from tests.oracle.single import Single, delta_of, linear
from tests.tiny import TINY, VOCAB, logits, perturb

SHAPES = [(12, 12), (7, 12), (20, 12)]
# Directions are exact up to the range finder's 1e-6 and the second moment's condition, 1e4, in float64.
CLOSE = {"rtol": 1e-6, "atol": 1e-8}


def rows_for(into: int, tokens: int = 300) -> Tensor:
    return randn(tokens, into, seed=5) @ randn(into, into, seed=6)


# The definition ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(160, 160), (200, 160), (160, 200)], ids=str)
@pytest.mark.parametrize("squared", [True, False])
def test_the_last_directions_are_found_beside_one_that_is_far_smaller(
    shape: tuple[int, int], squared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the inverse it is far larger, and would drown the others in its rounding errors."""
    left, right = (torch.linalg.qr(randn(n, n, seed=n))[0] for n in shape)
    n = min(shape)
    values = torch.linspace(1, 0.1, n, dtype=torch.float64)
    values[-1] = 1e-6 if squared else 1e-4  # C^½ comes from C, which holds its square to 1e-16
    spectrum = torch.ones(shape[1], dtype=torch.float64)
    spectrum[:n] = values if squared else values.square()
    C = (right * spectrum) @ right.T
    W = left[:, :n] @ right[:, :n].T  # so that W C = left · values · rightᵀ

    def refuse(*_: Any) -> None:
        raise AssertionError("solved in full")

    monkeypatch.setattr(directions, "_last_of_all", refuse)
    U, found = solve.output_directions(W, C, 8, squared=squared, last=True)
    exact = left[:, n - 8 : n]
    torch.testing.assert_close(found, values[-8:], rtol=1e-6, atol=1e-12)
    # Neighbours are 0.006 apart, so vectors turn by residual / gap; the space by less.
    torch.testing.assert_close(U @ U.T, exact @ exact.T, rtol=0, atol=1e-4)
    torch.testing.assert_close(U.T @ U, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
@pytest.mark.parametrize("objective", ["covariance", "output"])
@pytest.mark.parametrize(("out", "into"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_start_is_that_of_the_definition(
    out: int, into: int, objective: str, mode: str, rank: int
) -> None:
    """``U_r S_r V_rᵀ R⁻¹`` with ``U S Vᵀ = svd(W R)``, R = C or C^½, its inverse taken."""
    model, x = linear(out, into), rows_for(into)
    W, C = model.layer.weight.detach().clone(), x.T @ x / len(x)
    R = C if objective == "covariance" else symmetric_root(C)
    U, S, Vt = torch.linalg.svd(W @ R, full_matrices=False)
    which = slice(-rank, None) if mode == "knowledge" else slice(rank)
    expected = (U[:, which] * S[which]) @ Vt[which] @ torch.linalg.inv(R)
    lowrank_ft.wrap(
        model, "corda", targets="layer", rank=rank, alpha=2.5 * rank, mode=mode, objective=objective,
        data=[{"x": x}],
    )  # fmt: skip
    delta = delta_of(model)
    torch.testing.assert_close(delta.node.scale * delta.B @ delta.A, expected, **CLOSE)
    torch.testing.assert_close(delta.node.scale * delta.B0 @ delta.A0, expected, **CLOSE)
    torch.testing.assert_close(delta.B.T @ delta.B, delta.A @ delta.A.T, **CLOSE)  # balanced


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_the_paper_s_factors(mode: str) -> None:
    """``B = U √(S/s)`` and ``A = √(S/s) Vᵀ C⁻¹``, up to the sign of each direction."""
    model, x = linear(9, 12), rows_for(12)
    W, C = model.layer.weight.detach().clone(), x.T @ x / len(x)
    U, S, Vt = torch.linalg.svd(W @ C, full_matrices=False)
    which = slice(-3, None) if mode == "knowledge" else slice(3)
    lowrank_ft.wrap(
        model, "corda", targets="layer", rank=3, alpha=6.0, mode=mode, factors="paper", data=[{"x": x}]
    )
    delta = delta_of(model)
    root = (S[which] / delta.node.scale).sqrt()
    sign = torch.sign((delta.B * U[:, which]).sum(0))
    torch.testing.assert_close(delta.B.detach(), U[:, which] * root * sign, **CLOSE)
    expected = (root * sign)[:, None] * (Vt[which] @ torch.linalg.inv(C))
    torch.testing.assert_close(delta.A.detach(), expected, **CLOSE)


def test_training_is_that_of_the_paper_s_form() -> None:
    """Base ``W − sB₀A₀``, adapter ``sBA``: the same outputs and the same steps, with the base unchanged."""
    model, x = linear(9, 12), rows_for(12)
    W = model.layer.weight.detach().clone()
    lowrank_ft.wrap(model, "corda", targets="layer", rank=3, alpha=6.0, data=[{"x": x}])
    delta = delta_of(model)
    s = delta.node.scale
    A, B = (t.detach().clone().requires_grad_() for t in (delta.A, delta.B))
    residual = W - s * (B @ A).detach()
    ours = torch.optim.SGD([delta.A, delta.B], lr=1e-3)
    theirs = torch.optim.SGD([A, B], lr=1e-3)
    target = randn(len(x), 9, seed=8)
    for _ in range(5):
        y = nn.functional.linear(x, residual + s * B @ A, model.layer.base.bias)
        out = model(x)
        torch.testing.assert_close(out, y, rtol=1e-10, atol=1e-10)
        for optimizer, value in ((ours, out), (theirs, y)):
            optimizer.zero_grad()
            (value - target).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(delta.A, A, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(delta.B, B, rtol=1e-9, atol=1e-9)
    assert torch.equal(model.layer.base.weight, W)


def test_a_convolution_is_its_unfolded_matrix() -> None:
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    conv = nn.Conv2d(3, 6, (3, 2), dtype=torch.float64, **options)
    model, x = Single(conv).eval(), randn(4, 3, 9, 8, seed=2)
    patches = nn.functional.unfold(x, (3, 2), **options).movedim(1, -1).reshape(-1, 18)
    W, C = layer_of(conv).matrix().detach().clone(), patches.T @ patches / len(patches)
    U, _, _ = torch.linalg.svd(W @ C, full_matrices=False)
    lowrank_ft.wrap(model, "corda", targets="layer", rank=2, data=[{"x": x}])
    delta = delta_of(model)
    torch.testing.assert_close(delta.B @ delta.A, U[:, :2] @ U[:, :2].T @ W, **CLOSE)


def test_a_convolution_that_pads_by_itself_is_read_through_its_own_forward() -> None:
    """EfficientNet's convolutions are a subclass whose forward pads first."""

    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super()._conv_forward(nn.functional.pad(x, (0, 1, 2, 0)), self.weight, self.bias)

    conv = Padded(3, 6, 3, dtype=torch.float64)
    x = randn(4, 3, 9, 8, seed=2)
    rows = layer_of(conv).rows(x)
    expected = nn.functional.unfold(nn.functional.pad(x, (0, 1, 2, 0)), 3).movedim(1, -1)
    assert torch.equal(rows.flatten(1, 2), expected)
    model = lowrank_ft.wrap(Single(conv).eval(), "corda", targets="layer", rank=2, data=[{"x": x}])
    assert float(delta_of(model).A.detach().norm()) > 0


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_budget_is_spread_as_well_as_by_brute_force(seed: int, smallest: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectra = [
        torch.rand(4, generator=generator, dtype=torch.float64).sort(descending=True).values for _ in range(3)
    ]
    energies = [s.square() / s.square().sum() for s in spectra]
    energies = [e.flip(0) if smallest else e for e in energies]
    for total in range(3, 13):  # one price for all, so that every budget is met exactly
        ranks = spread(spectra, [5, 5, 5], 5 * total, smallest=smallest)
        assert sum(ranks) == total
        found = sum(float(e[:r].sum()) for e, r in zip(energies, ranks, strict=True))
        every = [r for r in itertools.product(range(1, 5), repeat=3) if sum(r) == total]
        best = [sum(float(e[:r].sum()) for e, r in zip(energies, choice, strict=True)) for choice in every]
        assert found == pytest.approx(min(best) if smallest else max(best), rel=1e-12)
    assert spread(spectra, [5, 7, 2], 20, smallest=smallest) != [1, 1, 1]
    with pytest.raises(ConfigError, match="below 14, what rank 1 takes in every layer"):
        spread(spectra, [5, 7, 2], 13, smallest=smallest)


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_a_budget_is_met(mode: str) -> None:
    model = TINY["llama"].model()
    lowrank_ft.wrap(model, "corda", mode=mode, budget=4000, data=batches())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 4000 - 96 < trained <= 4000  # the next direction of any layer takes at most 48 + 32
    ranks = {host.deltas["default"].node.rank for host in engine.hosts(model).values()}
    assert len(ranks) > 1


# Faults of existing implementations -------------------------------------------------------------------------


def batches(size: int = 2, count: int = 24, length: int = 10) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (count, length), generator=generator)
    return [{"input_ids": rows} for rows in ids.split(size)]


def starts(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (host.deltas["default"].B @ host.deltas["default"].A).detach()
        for name, host in engine.hosts(model).items()
    }


def started(data: Any, **options: Any) -> dict[str, Tensor]:
    model = TINY["llama"].model(torch.float64)
    return starts(lowrank_ft.wrap(model, "corda", rank=2, data=data, **options))


def assert_equal_starts(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **CLOSE)


def test_batches_of_any_size_give_one_answer() -> None:
    """PEFT's hook squeezes the batch away, and fails where there is more than one sequence in it."""
    assert_equal_starts(started(batches(1)), started(batches(8)))


def test_all_linear_means_all_linear() -> None:
    """PEFT's preprocessing takes the keyword for a name, which matches nothing, and says nothing."""
    found = started(batches())
    assert len(found) == 14
    assert all(float(start.norm()) > 0 for start in found.values())


def test_padding_is_not_data() -> None:
    plain = batches(4)
    padded = []
    for batch in plain:
        ids = torch.cat([batch["input_ids"], torch.full((4, 6), 2)], 1)
        mask = torch.cat([torch.ones(4, 10, dtype=torch.long), torch.zeros(4, 6, dtype=torch.long)], 1)
        padded.append({"input_ids": ids, "attention_mask": mask})
    assert_equal_starts(started(plain), started(padded))


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_activations_changes_nothing(scale: float, mode: str) -> None:
    """PEFT divides each input by its signed maximum, and its factors' balance depends on what is left."""
    factors = []
    for factor in (1.0, scale):
        model = linear(9, 12)
        lowrank_ft.wrap(
            model, "corda", targets="layer", rank=3, mode=mode, data=[{"x": factor * rows_for(12)}]
        )
        factors.append((delta_of(model).B.detach(), delta_of(model).A.detach()))
    for one, other in zip(*factors, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_inputs_are_weighted_by_what_they_are() -> None:
    """One mean over all tokens; PEFT's division by each sequence's maximum makes loud sequences quiet."""
    quiet, loud = rows_for(12), 30 * rows_for(12).flip(1)
    model = linear(9, 12)
    W = model.layer.weight.detach().clone()
    lowrank_ft.wrap(model, "corda", targets="layer", rank=2, data=[{"x": quiet}, {"x": loud}])
    C = (quiet.T @ quiet + loud.T @ loud) / (2 * len(quiet))
    U = torch.linalg.svd(W @ C)[0][:, :2]
    torch.testing.assert_close(starts(model)["layer"], U @ U.T @ W, **CLOSE)


def test_layers_with_one_input_share_one_moment(tmp_path: Path) -> None:
    """PEFT keeps a copy for each of q, k and v and each of gate and up, of all layers at once, by pickle."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started(batches(), calibration={"cache": str(tmp_path)})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} == {".safetensors"}
    keys = [key for path in files for key in safe_open(path, framework="pt").keys()]  # noqa: SIM118
    moments = [key for key in keys if key.endswith("|C.upper")]
    assert len(moments) == 2 * 4  # (q, k, v), o, (gate, up), down, in two blocks


def test_the_second_wrap_reads_the_cache(tmp_path: Path) -> None:
    options = {"calibration": {"cache": str(tmp_path)}}
    first = started(batches(), **options)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert_equal_starts(first, started(batches(), **options))
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_nothing_is_inverted(mode: str) -> None:
    """Fewer tokens than features: C is singular, and PEFT's loop adds ever more to its diagonal."""
    model, x = linear(9, 12), rows_for(12)[:5]
    W, C = model.layer.weight.detach().clone(), x.T @ x / 5
    with pytest.warns(UserWarning, match="5 tokens, fewer than the 12 inputs"):
        lowrank_ft.wrap(model, "corda", targets="layer", rank=3, mode=mode, data=[{"x": x}])
    start = starts(model)["layer"]
    energies = torch.linalg.svdvals(W @ C).square()
    expected = energies[:3].sum() if mode == "instruction" else energies[-3:].sum()
    assert float((start @ C).square().sum()) == pytest.approx(
        float(expected), rel=1e-6, abs=1e-9 * float(energies[0])
    )
    torch.testing.assert_close(start, (start @ torch.linalg.pinv(W)) @ W, rtol=1e-6, atol=1e-6)
    if mode == "knowledge":
        with (
            pytest.raises(ConfigError, match="singular, where factors='paper' is not defined"),
            pytest.warns(),
        ):
            lowrank_ft.wrap(
                linear(9, 12), "corda", targets="layer", rank=9, mode=mode, factors="paper", data=[{"x": x}]
            )


def test_ill_conditioned_directions_are_still_the_last() -> None:
    """In the Gram matrix of W C those with ``σ < 1e-8 σ₁`` are rounding errors."""
    W, mix = randn(12, 12, seed=1), torch.linalg.qr(randn(12, 12, seed=2))[0]
    C = (mix * torch.logspace(0, -9.5, 12, dtype=torch.float64)) @ mix.T
    U, S, _ = torch.linalg.svd(W @ C)
    found, values = solve.output_directions(W, C, 2, squared=True, last=True)
    assert S[-1] < 1e-8 * S[0]
    overlap = torch.linalg.svdvals(found.T @ U[:, -2:])
    assert float(overlap.min()) > 1 - 1e-6
    torch.testing.assert_close(values, S[-2:], rtol=1e-3, atol=0)
    gram = torch.linalg.eigh(W @ C @ C @ W.T)[1][:, :2]
    assert float(torch.linalg.svdvals(gram.T @ U[:, -2:]).min()) < 1 - 1e-3


def test_energy_against_peft() -> None:
    """Its damped, rescaled moment takes less of the text's energy at the top, and more at the bottom."""
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    data = batches(1)
    moments: dict[str, Tensor] = {}
    plain = TINY["llama"].model(torch.float64)

    def listen(name: str) -> Any:
        def hear(module: nn.Module, args: Any) -> None:
            rows = args[0].detach().flatten(0, 1)
            moments[name] = moments.get(name, 0) + rows.T @ rows

        return hear

    names = [name for name, module in plain.named_modules() if name.endswith("_proj")]
    handles = [plain.get_submodule(name).register_forward_pre_hook(listen(name)) for name in names]
    with torch.no_grad():
        for batch in data:
            plain(**batch)
    for handle in handles:
        handle.remove()
    for mode, method, better in (("instruction", "ipm", 1), ("knowledge", "kpm", -1)):
        peft_model = TINY["llama"].model()
        config = LoraConfig(
            r=2, target_modules=[n.rpartition(".")[2] for n in names[:7]], init_lora_weights="corda",
            corda_config=CordaConfig(corda_method=method),
        )  # fmt: skip
        preprocess_corda(peft_model, config, run_model=lambda m=peft_model: [m(**b) for b in data])
        ours = started(data, mode=mode)
        for name in names:
            eigens = peft_model.get_submodule(name).eigens
            theirs = ((eigens.U_WC * eigens.S_WC) @ eigens.V_WC.T).double()
            energy, other = (float((start @ moments[name]).norm()) for start in (ours[name], theirs))
            assert better * energy >= better * other - 1e-5 * other


# Refusals ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_anything_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_ft.calibration.collect.inputs", lambda *a, **k: pytest.fail("gathered"))
    data = batches()
    attempts: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ConfigError, "Rank 99 is above", {"rank": 99}),
        (TargetError, "alpha_pattern 'nope' matches none", {"alpha_pattern": {"nope": 1.0}}),
        (TargetError, "rank_pattern 'nope' matches none", {"rank_pattern": {"nope": 1}}),
        (TargetError, "matches no module", {"modules_to_save": ("nope",)}),
        (TargetError, "whose input cannot be dropped", {"dropout": 0.1, "targets": "embed_tokens"}),
        (ConfigError, "leave out rank_pattern, or budget", {"budget": 9, "rank_pattern": {"q_proj": 1}}),
        (ConfigError, "sequential is for compressors", {"calibration": {"sequential": True}}),
        (ConfigError, "must be one of|'knowledge'", {"mode": "both"}),
    ]
    for error, message, options in attempts:
        with pytest.raises(error, match=message):
            lowrank_ft.wrap(TINY["llama"].model(), "corda", data=data, **{"rank": 2, **options})
    grouped = Single(nn.Conv2d(4, 4, 3, groups=2)).eval()
    with pytest.raises(TargetError, match="convolution with groups=2"):
        lowrank_ft.wrap(grouped, "corda", targets="layer", rank=1, data=[{"x": torch.randn(1, 4, 8, 8)}])


def test_several_share_one_base_and_each_is_calibrated_without_the_others() -> None:
    model = TINY["llama"].model(torch.float64)
    first = started(batches(), mode="knowledge")
    lowrank_ft.wrap(model, "corda", rank=2, name="a", data=batches(), mode="instruction")
    perturb(model)
    before = logits(model, TINY["llama"].inputs())
    lowrank_ft.wrap(model, "corda", rank=2, name="b", data=batches(), mode="knowledge")
    for name, host in engine.hosts(model).items():
        torch.testing.assert_close((host.deltas["b"].B @ host.deltas["b"].A).detach(), first[name], **CLOSE)
    assert engine.active_adapters(model) == ("b",)
    lowrank_ft.set_adapter(model, "a")
    assert torch.equal(logits(model, TINY["llama"].inputs()), before)


def test_options_are_those_of_lora() -> None:
    config = CorDA(rank=4, alpha=8.0, scaling="rslora", dropout=0.1)
    assert config.alpha_of("any", 4) == 8.0
