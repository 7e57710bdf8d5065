"""FLoRA against the definition of a Tucker update, in float64: one einsum, added to the stored weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lowrank_ft
from lowrank_ft import solve
from lowrank_ft.algorithms.flora import FLoRA, FLoRADelta, Work, core_shape, size_of
from lowrank_ft.errors import ConfigError, StateError, TargetError
from lowrank_ft.modules.layer import ConvLayer, layer_of
from tests.oracle.moments import randn
from tests.oracle.single import Single, delta_of
from tests.tiny import perturb

EXACT = {"rtol": 1e-11, "atol": 1e-12}  # float64, sums of under 1e3 terms: rounding stays below 1e-13


class StaticPadding(nn.Conv2d):
    """As EfficientNet's convolutions in TensorFlow's layout: more padding at the end than at the start."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 1, 2)))


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 9), (5, 12)),
    "linear-nobias": (lambda: nn.Linear(12, 9, bias=False), (2, 5, 12)),
    "conv1d-gpt2": (lambda: Conv1D(9, 12), (2, 5, 12)),
    "embedding": (lambda: nn.Embedding(12, 9, padding_idx=3), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 9, 3, padding=1), (2, 6, 10)),
    "conv1d-unbatched": (lambda: nn.Conv1d(6, 9, 3, stride=2), (6, 10)),
    "conv2d": (lambda: nn.Conv2d(6, 9, 3, stride=2, padding=1, bias=False), (2, 6, 8, 8)),
    "conv2d-pointwise": (lambda: nn.Conv2d(6, 9, 1, stride=2), (2, 6, 8, 8)),
    "conv2d-oblong": (lambda: nn.Conv2d(6, 9, (2, 5), (1, 2), (0, 2)), (2, 6, 8, 8)),
    "conv2d-dilated": (lambda: nn.Conv2d(6, 9, 3, dilation=2), (2, 6, 9, 9)),
    "conv2d-same": (lambda: nn.Conv2d(6, 9, 3, padding="same"), (2, 6, 7, 7)),
    "conv2d-reflect": (lambda: nn.Conv2d(6, 9, 3, padding=1, padding_mode="reflect"), (2, 6, 8, 8)),
    "conv2d-replicate": (lambda: nn.Conv2d(6, 9, 3, padding=2, padding_mode="replicate"), (2, 6, 8, 8)),
    "conv2d-circular": (lambda: nn.Conv2d(6, 9, 3, padding=1, padding_mode="circular"), (2, 6, 8, 8)),
    "conv2d-static": (lambda: StaticPadding(6, 9, 3, stride=2), (2, 6, 8, 8)),
    "conv2d-static-grouped": (lambda: StaticPadding(6, 9, 3, groups=3), (2, 6, 8, 8)),
    "conv2d-grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2, stride=2), (2, 8, 8, 8)),
    "conv2d-depthwise": (lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6), (2, 6, 8, 8)),
    "conv2d-depth-multiplier": (lambda: nn.Conv2d(6, 12, 3, groups=6), (2, 6, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (3, 2, 3), padding=1), (2, 4, 5, 5, 5)),
    "conv3d-grouped": (lambda: nn.Conv3d(4, 6, 2, groups=2), (2, 4, 4, 4, 4)),
    "transposed1d": (lambda: nn.ConvTranspose1d(6, 9, 4, stride=2), (2, 6, 7)),
    "transposed2d": (lambda: nn.ConvTranspose2d(6, 8, 3, 2, 1, output_padding=1), (2, 6, 5, 5)),
    "transposed2d-grouped": (lambda: nn.ConvTranspose2d(6, 8, 3, groups=2, dilation=2), (2, 6, 5, 5)),
    "transposed2d-depthwise": (lambda: nn.ConvTranspose2d(6, 6, 3, groups=6, bias=False), (2, 6, 5, 5)),
    "transposed3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2), (2, 4, 3, 3, 3)),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "rank": {"rank": 2},
    "channels": {"rank_out": 2, "rank_in": 4, "alpha": 3.0},
    "kernel": {"rank_out": 3, "rank_in": 2, "rank_kernel": 2, "scale": 4.0},
    "paper": {"rank": 4, "rank_kernel": 3, "full_modes": "factor", "scaling": "rslora", "alpha": 2.0},
    "large": {"rank": 100, "full_modes": "factor"},
    "whole": {"rank": 100},
}

WAYS = {"factored": Work(0, 1, 2), "dense": Work(1, 0, 2), "joined": Work(2, 1, 0)}


def model_and_input(kind: str, **options: Any) -> tuple[Single, Tensor]:
    """A trained FLoRA on one layer, and an input."""
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    model = Single(build()).double()
    lowrank_ft.wrap(model, "flora", targets="layer", **options)
    perturb(model, 0.5)
    x = torch.randint(4, 12, shape) if kind == "embedding" else randn(*shape, seed=1).requires_grad_()
    return model, x


def definition(delta: FLoRADelta) -> Tensor:
    """``s · G ×₁ U₁ … ×_N U_N`` by one einsum, in the layout that the layer stores."""
    letters = "abcdefgh"
    terms, tensors, result = [letters[: delta.core.dim()]], [delta.core], ""
    for i, factor in enumerate(delta.factors.values()):
        if factor is None:
            result += letters[i]
            continue
        terms.append(letters[i].upper() + letters[i])
        tensors.append(factor)
        result += letters[i].upper()
    whole = torch.einsum(f"{','.join(terms)}->{result}", *tensors) * delta.node.scale
    return whole if isinstance(delta.layer, ConvLayer) else delta.layer.to_weight(whole)


def updated(model: Single, x: Tensor) -> Tensor:
    """The layer with ``W + ΔW`` for a weight."""
    delta = delta_of(model)
    weight = delta.layer.weight.detach() + definition(delta)
    return torch.func.functional_call(delta.layer.module, {"weight": weight}, (x,))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_and_gradients_equal_the_dense_definition(
    kind: str, options: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = model_and_input(kind, **OPTIONS[options])
    monkeypatch.setattr(Work, "of", lambda *args: WAYS[way])
    out, wanted = model(x), updated(model, x)
    torch.testing.assert_close(out, wanted, **EXACT)

    probe = randn(*out.shape, seed=2)
    inputs = [p for p in model.parameters() if p.requires_grad] + ([x] if x.requires_grad else [])
    ours, theirs = (torch.autograd.grad(result, inputs, probe) for result in (out, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("options", ["channels", "paper"])
@pytest.mark.parametrize("kind", LAYERS)
def test_merging_adds_the_definition_and_unmerging_takes_it_back(kind: str, options: str) -> None:
    model, x = model_and_input(kind, **OPTIONS[options])
    delta = delta_of(model)
    before = delta.layer.weight.detach().clone()
    wanted, out = before + definition(delta).detach(), model(x)
    lowrank_ft.merge(model)
    torch.testing.assert_close(model.layer.weight.detach(), wanted, **EXACT)
    torch.testing.assert_close(model(x), out, **EXACT)
    lowrank_ft.unmerge(model)
    assert torch.equal(delta.layer.weight, before)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_low_rank_form_is_exact(kind: str, options: str) -> None:
    """``B A`` is the update's matrix; grouped transposed convolutions have none with one output factor."""
    model, _ = model_and_input(kind, **OPTIONS[options])
    delta = delta_of(model)
    form = delta.as_lora()
    if kind in ("transposed2d-grouped", "transposed2d-depthwise"):
        assert form is None
        return
    torch.testing.assert_close(form.B @ form.A * form.scale, delta.weight(), **EXACT)
    if not isinstance(delta.layer, ConvLayer):
        assert form.A.shape[0] == min(r for r in (*delta.node.ranks, *delta.core.shape) if r is not None)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_convolution_s_matrix_and_weight_are_inverse(kind: str) -> None:
    build, _ = LAYERS[kind]
    layer = layer_of(build())
    matrix = layer.matrix()
    assert matrix.shape == (layer.out_features, layer.in_features)
    assert torch.equal(layer.to_weight(matrix), layer.weight)


@pytest.mark.parametrize("kind", ["transposed1d", "transposed2d", "transposed2d-grouped", "transposed3d"])
@pytest.mark.parametrize("method", ["lora", "nola"])
def test_other_adapters_run_on_transposed_convolutions_too(kind: str, method: str) -> None:
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    model = Single(build()).double()
    lowrank_ft.wrap(model, method, targets="layer", rank=2)
    perturb(model, 0.5)
    x, delta = randn(*shape, seed=1), delta_of(model)
    weight = delta.layer.weight + delta.layer.to_weight(delta.weight())
    wanted = torch.func.functional_call(delta.layer.module, {"weight": weight}, (x,))
    torch.testing.assert_close(model(x), wanted, **EXACT)


# Starts, ranks and scale ------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming-normal", "kaiming-uniform", "gaussian", "hosvd", "lora"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_start_is_the_identity_to_the_bit_and_what_is_zero_learns(kind: str, init: str) -> None:
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    model = Single(build()).float()
    x = torch.randint(4, 12, shape) if kind == "embedding" else randn(*shape, seed=1).float()
    before = model(x)
    lowrank_ft.wrap(model, "flora", targets="layer", rank=2, init=init)
    out = model(x)
    assert torch.equal(out, before)
    out.square().sum().backward()
    delta = delta_of(model)
    zero = delta.factor_in if kind == "embedding" else delta.factor_out
    learns = delta.core if init != "lora" or zero is None else zero
    assert not learns.any()
    for parameter in delta.parameters():
        assert bool(parameter.grad.any()) is (parameter is learns)


def test_a_lora_s_start_has_its_sizes() -> None:
    """What goes into the zero factor is as large as a LoRA's ``A x``: the core has orthonormal rows."""
    model = lowrank_ft.wrap(Single(nn.Conv2d(96, 64, 3)), "flora", targets="layer", rank=8, init="lora")
    delta = delta_of(model)
    rows = delta.core.detach().flatten(1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(8), rtol=0, atol=1e-5)
    assert delta.factor_in.abs().max() <= 1 / math.sqrt(96) < 1.05 * delta.factor_in.abs().max()


@pytest.mark.parametrize(
    ("init", "deviation"), [("kaiming-normal", 0.25), ("kaiming-uniform", 0.25), ("gaussian", 0.02)]
)
def test_factors_start_with_the_deviation_that_is_promised(init: str, deviation: float) -> None:
    """1/√(2 · 8) = 0.25. The standard error of a deviation from 8 · 4096 draws is 0.4%: five of them."""
    model = lowrank_ft.wrap(Single(nn.Linear(4096, 64)), "flora", targets="layer", rank=8, init=init)
    assert delta_of(model).factor_in.std().item() == pytest.approx(deviation, rel=0.02)


def test_hosvd_factors_are_the_leading_directions_of_the_weight() -> None:
    model = Single(nn.Conv2d(10, 12, 3)).double()
    weight = model.layer.weight.detach()
    lowrank_ft.wrap(model, "flora", targets="layer", rank=4, init="hosvd")
    delta = delta_of(model)
    for mode, factor in enumerate([delta.factor_out, delta.factor_in]):
        left, _, _ = torch.linalg.svd(weight.movedim(mode, 0).flatten(1))
        cosines = torch.linalg.svdvals(left[:, :4].T @ factor.detach())
        torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64))
        torch.testing.assert_close(factor.T @ factor, torch.eye(4, dtype=torch.float64))


RANKS = {
    "channels": (lambda: nn.Conv2d(32, 64, 3), {"rank": 8}, (8, 8, None, None)),
    "bounded by the size": (lambda: nn.Conv2d(4, 64, 3), {"rank": 8}, (8, None, None, None)),
    "by the others' sizes": (
        lambda: nn.Conv2d(2, 64, (2, 1)),
        {"rank": 8, "full_modes": "factor"},
        (4, 2, 2, None),
    ),
    "no fewer numbers than the weight": (lambda: nn.Conv2d(2, 64, (2, 1)), {"rank": 8}, (None,) * 4),
    "square factors": (lambda: nn.Conv2d(4, 64, 3), {"rank": 8, "full_modes": "factor"}, (8, 4, 3, 3)),
    "depthwise whole": (lambda: nn.Conv2d(64, 64, 3, groups=64), {"rank": 8}, (None,) * 4),
    "depthwise": (lambda: nn.Conv2d(64, 64, 5, groups=64), {"rank": 8}, (8, None, None, None)),
    "kernel": (lambda: nn.Conv2d(32, 64, 5), {"rank": 8, "rank_kernel": 2}, (8, 8, 2, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(32, 64, 3), {"rank_out": 2, "rank_in": 4}, (4, 2, None, None)),
    "linear": (lambda: nn.Linear(32, 64), {"rank": 8}, (8, 8)),
    "all of it": (lambda: nn.Linear(32, 64), {"rank": 30}, (None, None)),
}


@pytest.mark.parametrize("case", RANKS)
def test_ranks_from_one_rank(case: str) -> None:
    build, options, wanted = RANKS[case]
    config, layer = FLoRA(**options), layer_of(build())
    assert config.ranks_of(layer, config.rank) == wanted


def test_a_budget_is_met_and_hardly_missed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Conv2d(32, 48, 1))
    for budget in (700, 1200, 2000, 3500):
        wrapped = lowrank_ft.wrap(model, "flora", targets="all-conv", budget=budget)
        trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        assert budget - 150 <= trained <= budget
        lowrank_ft.unload(wrapped)
    with pytest.raises(ConfigError, match="The budget of 100 is below .* rank 1 takes in every layer"):
        lowrank_ft.wrap(model, "flora", targets="all-conv", budget=100)


def test_scale_is_alpha_over_rank_or_given() -> None:
    for options, wanted in (
        ({"rank": 4}, 1.0),
        ({"rank": 4, "alpha": 2.0}, 0.5),
        ({"rank": 4, "alpha": 2.0, "scaling": "rslora"}, 1.0),
        ({"rank": 4, "scale": 3.0}, 3.0),
    ):
        model = lowrank_ft.wrap(Single(nn.Linear(9, 8)), "flora", targets="layer", **options)
        assert delta_of(model).node.scale == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank_in": 0}, "rank_in must be at least 1"),
        ({"budget": 0}, "budget must be at least 1"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"scale": 1.0, "alpha": 2.0}, "leave out alpha"),
        ({"budget": 500, "rank_in": 2}, "budget decides the ranks"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FLoRA(**options)


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(TargetError, match="rank_pattern 'head' matches none"):
        lowrank_ft.wrap(Single(nn.Linear(9, 8)), "flora", targets="layer", rank_pattern={"head": 2})


# How it runs ------------------------------------------------------------------------------------------------


def counted(layer: nn.Module, ranks: Any, x: Tensor) -> Work:
    """The work by counting what torch multiplies in each way, layer itself left out."""
    from torch.utils.flop_counter import FlopCounterMode

    def count(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() // 2

    view = layer_of(layer)
    assert isinstance(view, ConvLayer)
    shape = tuple(view.tensor().shape)
    with torch.no_grad():
        core = randn(*core_shape(shape, ranks))
        factors = [None if r is None else randn(n, r) for n, r in zip(shape, ranks, strict=True)]
        forming = count(lambda: solve.tucker(core, factors))
        beside = count(lambda: layer(x))
        outer, inner = factors[view.modes.index("out")], factors[view.modes.index("in")]
        return Work(count(lambda: view.run_tucker(x, outer, core, inner)), forming + beside, forming)


EVEN: dict[str, tuple[nn.Module, tuple[int, ...]]] = {  # whose outputs are their inputs over the stride
    "conv1d": (nn.Conv1d(6, 9, 3, padding=1), (2, 6, 10)),
    "pointwise": (nn.Conv2d(6, 9, 1), (2, 6, 8, 8)),
    "strided": (nn.Conv2d(6, 9, 3, 2, 1), (2, 6, 8, 8)),
    "grouped": (nn.Conv2d(8, 12, 3, 2, 1, groups=2), (2, 8, 8, 8)),
    "grouped3d": (nn.Conv3d(8, 12, 3, 1, 1, groups=2), (2, 8, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(6, 9, 2, 2), (2, 6, 5, 5)),
    "transposed, grouped": (nn.ConvTranspose1d(8, 12, 2, 2, groups=2), (2, 8, 5)),
}


@pytest.mark.parametrize("kind", EVEN)
def test_the_planner_counts_what_torch_multiplies(kind: str) -> None:
    layer, shape = EVEN[kind]
    layer = layer.double()
    view, x = layer_of(layer), randn(*shape, seed=1)
    ranks = FLoRA(rank=2).ranks_of(view, 2)
    truth = counted(layer, ranks, x)
    with torch.no_grad():
        assert Work.of(view, ranks, x) == truth
    training = Work.of(view, ranks, x)
    weights_gradient = truth.dense - truth.joined
    assert (training.factored, training.dense) == (3 * truth.factored, 3 * truth.dense)
    assert training.joined == 3 * truth.joined + weights_gradient


def test_a_depthwise_convolution_joins_its_weight_and_a_pointwise_one_does_not() -> None:
    x = torch.zeros(4, 64, 12, 12)
    for layer, joins in ((nn.Conv2d(64, 64, 5, padding=2, groups=64), True), (nn.Conv2d(64, 256, 1), False)):
        model = lowrank_ft.wrap(Single(layer), "flora", targets="layer", rank=8)
        assert delta_of(model).joins_weight(x) is joins


@pytest.mark.parametrize("method", ["lora", "flora"])
def test_a_joined_layer_runs_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Single(nn.Conv2d(8, 8, 3, groups=8))
    lowrank_ft.wrap(model, method, targets="layer", rank=2)
    runs = []
    true = nn.Conv2d._conv_forward
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda *args: runs.append(1) or true(*args))
    model(torch.zeros(1, 8, 5, 5))
    assert runs == [1]


def test_half_precision_weights_are_not_joined() -> None:
    """A bfloat16 weight would round an update of 1e-4 of it away."""
    torch.manual_seed(0)
    model = Single(nn.Conv2d(8, 8, 3, groups=8, bias=False)).bfloat16()
    lowrank_ft.wrap(model, "flora", targets="layer", rank=2, init="kaiming-normal")
    x = torch.randn(1, 8, 5, 5).bfloat16()
    base = model(x)
    with torch.no_grad():
        delta = delta_of(model)
        delta.core.fill_(1e-5)
        beside = delta(x)
        assert beside.abs().max() > 0
        assert torch.equal(model(x), base + beside)


def test_hooks_on_the_layer_are_run() -> None:
    model = Single(nn.Conv2d(8, 8, 3, groups=8))
    lowrank_ft.wrap(model, "flora", targets="layer", rank=2)
    seen = []
    model.layer.base.register_forward_hook(lambda *args: seen.append(1))
    model(torch.zeros(1, 8, 5, 5))
    assert seen == [1]


# Export -----------------------------------------------------------------------------------------------------


def test_convolutions_that_peft_cannot_express_say_so(tmp_path: Any) -> None:
    for layer, problem in (
        (nn.Conv2d(8, 8, 3, groups=8), "groups=8"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), "padding_mode"),
        (nn.ConvTranspose2d(8, 8, 3), "transposed kernel"),
    ):
        model = lowrank_ft.wrap(Single(layer), "flora", targets="layer", rank=2)
        with pytest.raises(StateError, match=f"layer is a convolution with .*{problem}"):
            lowrank_ft.export(model, tmp_path / "out", format="peft")


# HOSVD ------------------------------------------------------------------------------------------------------


def test_tucker_is_the_product_along_every_mode() -> None:
    core, factors = randn(2, 3, 4, seed=1), [randn(5, 2, seed=2), None, randn(6, 4, seed=3)]
    wanted = torch.einsum("abc,ia,kc->ibk", core, factors[0], factors[2])
    torch.testing.assert_close(solve.tucker(core, factors), wanted, **EXACT)


def test_hosvd_of_full_rank_is_exact_and_truncated_within_its_bound() -> None:
    """De Lathauwer et al. 2000, property 10: the squared error is at most what all modes cut off."""
    tensor = randn(6, 7, 8, seed=4)
    core, factors = solve.hosvd(tensor, (6, 7, 8))
    torch.testing.assert_close(solve.tucker(core, factors), tensor, **EXACT)
    ranks, cut = (3, 4, 2), 0.0
    for mode, rank in enumerate(ranks):
        values = torch.linalg.svdvals(tensor.movedim(mode, 0).flatten(1))
        cut += float(values[rank:].square().sum())
    error = float((solve.tucker(*solve.hosvd(tensor, ranks)) - tensor).square().sum())
    swept = float((solve.tucker(*solve.hosvd(tensor, ranks, sweeps=5)) - tensor).square().sum())
    assert cut / 3 <= swept <= error <= cut


def test_hosvd_of_a_tall_mode_takes_the_small_gram_matrix() -> None:
    tensor = randn(2000, 3, seed=5)
    _, (factor, _) = solve.hosvd(tensor, (2, None))
    left, _, _ = torch.linalg.svd(tensor, full_matrices=False)
    torch.testing.assert_close((left[:, :2].T @ factor).abs(), torch.eye(2, dtype=torch.float64))


def test_leading_directions_of_a_deficient_mode_are_still_orthonormal() -> None:
    tensor = torch.zeros(9, 4, dtype=torch.float64)
    tensor[0, 0] = 1.0
    factor = solve.leading(tensor, 0, 3)
    torch.testing.assert_close(factor.T @ factor, torch.eye(3, dtype=torch.float64))


def test_sizes_are_what_is_trained() -> None:
    for kind, (build, _) in LAYERS.items():
        for options in OPTIONS.values():
            model = lowrank_ft.wrap(Single(build()), "flora", targets="layer", **options)
            delta = delta_of(model)
            shape = tuple(delta.layer.tensor().shape)
            trained = sum(p.numel() for p in delta.parameters())
            assert trained == size_of(shape, delta.node.ranks), kind
            assert math.prod(core_shape(shape, delta.node.ranks)) == delta.core.numel()
