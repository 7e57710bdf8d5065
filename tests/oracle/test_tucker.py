"""Tucker compression against its definition and its optimality, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ft
from lowrank_ft import engine, solve
from lowrank_ft.algorithms import tucker
from lowrank_ft.algorithms.tucker import by_channel, size_of
from lowrank_ft.anatomy.sites import Site
from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.layer import ConvLayer, layer_of
from lowrank_ft.modules.tucker import TuckerConv, TuckerNode
from lowrank_ft.structure.manifest import from_json, replacements, to_json
from tests.oracle.moments import randn
from tests.oracle.single import Single
from tests.tiny import TINY, logits, perturb

EXACT = {"rtol": 1e-11, "atol": 1e-12}  # float64, sums of under 1e3 terms: rounding stays below 1e-13

GEOMETRIES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 10)),
    "2d": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 7, 7)),
    "2d-nobias": (lambda: nn.Conv2d(8, 12, 3, bias=False), (2, 8, 7, 7)),
    "2d-oblong": (lambda: nn.Conv2d(8, 12, (1, 5), dilation=(1, 2), padding=(0, 4)), (2, 8, 7, 7)),
    "2d-reflect": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (2, 8, 7, 7)),
    "2d-same": (lambda: nn.Conv2d(8, 12, 3, padding="same"), (2, 8, 7, 7)),
    "pointwise": (lambda: nn.Conv2d(8, 12, 1, stride=2), (2, 8, 7, 7)),
    "3d": (lambda: nn.Conv3d(8, 12, 2), (2, 8, 4, 4, 4)),
}
NODES = {
    "both": TuckerNode(rank_out=5, rank_in=3),
    "outer": TuckerNode(rank_out=5),
    "inner": TuckerNode(rank_out=None, rank_in=3),
}


def filled(geometry: str, node: TuckerNode) -> tuple[TuckerConv, Tensor]:
    """A factored convolution with random values, and an input."""
    build, shape = GEOMETRIES[geometry]
    torch.manual_seed(0)
    module = node.build(build().double(), "conv")
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=i))
    return module, randn(*shape, seed=9)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_row_of_convolutions_is_one_with_the_product_for_a_weight(geometry: str, node: str) -> None:
    module, x = filled(geometry, NODES[node])
    outer, core, inner = module.factors()
    ranks = "ab" + "cde"[: core.dim() - 2]
    terms, tensors, result = [ranks], [core], ranks
    for letter, factor in (("a", outer), ("b", inner)):
        if factor is not None:
            terms.append(letter.upper() + letter)
            tensors.append(factor)
            result = result.replace(letter, letter.upper())
    weight = torch.einsum(f"{','.join(terms)}->{result}", *tensors)
    stock = GEOMETRIES[geometry][0]().double()
    tensors = {"weight": weight} | ({} if module.bias is None else {"bias": module.bias})
    torch.testing.assert_close(module(x), torch.func.functional_call(stock, tensors, (x,)), **EXACT)
    dense = module.dense()
    assert type(dense) is type(stock)
    torch.testing.assert_close(dense(x), module(x), **EXACT)


@pytest.mark.parametrize("node", NODES)
def test_a_node_survives_json(node: str) -> None:
    assert from_json(to_json({"conv": NODES[node]})) == {"conv": NODES[node]}


@pytest.mark.parametrize("method", ["lora", "flora"])
@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_adapters_stack_and_merge_without_losing_the_factors(geometry: str, node: str, method: str) -> None:
    module, x = filled(geometry, NODES[node])
    model = Single(module)
    before = model(x)
    lowrank_ft.wrap(model, method, targets="layer", rank=1)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    perturb(model, 0.5)
    adapted = model(x)
    delta = engine.hosts(model)["layer"].deltas["default"]
    weight = module.product() + layer_of(module).to_weight(delta.weight())
    bias = {} if module.bias is None else {"bias": module.bias}
    stock = GEOMETRIES[geometry][0]().double()
    wanted = torch.func.functional_call(stock, {"weight": weight, **bias}, (x,))
    torch.testing.assert_close(adapted, wanted, **EXACT)
    lowrank_ft.merge(model, reversible=False)
    assert isinstance(model.layer, TuckerConv)
    torch.testing.assert_close(model(x), adapted, **EXACT)


# Optimality -------------------------------------------------------------------------------------------------


def mixed(channels: int, outputs: int, kernel: int) -> Single:
    """A convolution on channels of different sizes, so that data matter."""
    torch.manual_seed(3)
    model = Single(nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)).double()
    return model.eval()


def correlated(seed: int = 5) -> list[dict[str, Tensor]]:
    mix = randn(8, 8, seed=77) * torch.logspace(0, -2, 8, dtype=torch.float64)
    return [{"x": torch.einsum("ij,njhw->nihw", mix, randn(4, 8, 9, 9, seed=seed + i))} for i in range(6)]


def output_error(model: Single, dense: Single, batches: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float((model(**b) - dense(**b)).square().sum()) for b in batches)


def test_weights_alone_is_the_higher_order_svd() -> None:
    model = mixed(8, 12, 3)
    weight = model.layer.weight.detach().clone()
    options = {"objective": "weight", "ratio": 0.5, "ratio_of": "targets", "align": 1}
    lowrank_ft.wrap(model, "tucker", targets="layer", **options)
    node = model.layer.structure()
    wanted = solve.tucker(*solve.hosvd(weight, (node.rank_out, node.rank_in, None, None)))
    torch.testing.assert_close(model.layer.product(), wanted, **EXACT)


def test_a_pointwise_convolution_is_cut_as_its_linear_layer_is() -> None:
    """The same weight, the same rows, the same budget: LoRD's factors."""
    conv, batches = mixed(8, 12, 1), correlated()
    line = Single(nn.Linear(8, 12)).double().eval()
    with torch.no_grad():
        line.layer.weight.copy_(conv.layer.weight.flatten(1))
        line.layer.bias.copy_(conv.layer.bias)
    rows = [{"x": b["x"].movedim(1, -1).reshape(-1, 8)} for b in batches]
    options = {"objective": "output", "ratio": 0.3, "ratio_of": "targets", "align": 1}
    lowrank_ft.wrap(conv, "tucker", targets="layer", data=batches, **options)
    lowrank_ft.wrap(line, "lord", targets="layer", data=rows, centered=False, **options)
    assert conv.layer.inner is None
    # Float32 products go into the moments, in other orders.
    torch.testing.assert_close(
        conv.layer.product().flatten(1), line.layer.dense().weight, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("rank_in", [None, 4])
def test_what_stays_outside_is_the_best_of_its_rank(rank_in: int | None) -> None:
    """Given the inner factor, no outer factor of the rank does better: the singular values say how well."""
    dense, batches = mixed(8, 12, 3), correlated()
    patches = torch.cat([layer_of(dense.layer).rows(b["x"]).flatten(0, -2) for b in batches]).detach()
    C = patches.T @ patches / len(patches)
    node = TuckerNode(rank_out=5, rank_in=rank_in)
    module, known = node.build(dense.layer), SiteStatistics(len(patches), C, patches.mean(0))
    method = method_of(objective="output")
    with torch.no_grad():
        method.values(Site(("layer",), (dense.layer,), "conv"), {"layer": module}, {"layer": known})
    outer, core, inner = module.factors()
    reduced = dense.layer.weight if inner is None else projected(dense.layer.weight, inner, C)
    moved = C if inner is None else through(C, inner)
    values = torch.linalg.svdvals(reduced.flatten(1) @ torch.linalg.cholesky(moved))
    left = (reduced.flatten(1) - outer @ core.flatten(1)) @ torch.linalg.cholesky(moved)
    torch.testing.assert_close(left.square().sum(), values[5:].square().sum(), rtol=1e-8, atol=1e-12)


def method_of(**options: Any) -> Any:
    from lowrank_ft.algorithms.tucker import Tucker, TuckerMethod

    return TuckerMethod(Tucker(**options))


def through(C: Tensor, inner: Tensor) -> Tensor:
    """Second moment of the patches after the 1×1 convolution."""
    channels = inner.shape[0]
    blocks = C.reshape(channels, len(C) // channels, channels, len(C) // channels)
    return torch.einsum("ikjl,ia,jb->akbl", blocks, inner, inner).reshape(
        inner.shape[1] * len(C) // channels, -1
    )


def projected(weight: Tensor, inner: Tensor, C: Tensor) -> Tensor:
    """The weight that does best behind the 1×1 convolution, offset by offset, under the channels' moment."""
    channels = inner.shape[0]
    blocks = C.reshape(channels, len(C) // channels, channels, len(C) // channels)
    moment = torch.einsum("ikjk->ij", blocks)
    best = moment @ inner @ torch.linalg.inv(inner.T @ moment @ inner)
    return torch.einsum("oikl,ia->oakl", weight, best)


def test_data_beat_the_weights_where_channels_differ() -> None:
    dense, batches, fresh = mixed(8, 12, 3), correlated(), correlated(seed=100)
    errors = {}
    for objective in ("output", "weight"):
        model = copy.deepcopy(dense)
        data = {"data": batches} if objective == "output" else {}
        options = {"objective": objective, "ratio": 0.5, "ratio_of": "targets", "align": 1}
        lowrank_ft.wrap(model, "tucker", targets="layer", **options, **data)
        errors[objective] = output_error(model, dense, fresh)
    assert errors["output"] < 0.5 * errors["weight"]


@pytest.mark.parametrize("tall", [False, True])
def test_a_metric_behind_a_pointwise_convolution_is_that_of_what_comes_there(tall: bool) -> None:
    outputs = 80 if tall else 12
    conv = mixed(8, outputs, 3).layer
    layer, patches, gradients = layer_of(conv), randn(500, 72, seed=1), randn(500, outputs, seed=2)
    assert isinstance(layer, ConvLayer)
    C, G = patches.T @ patches / 500, gradients.T @ gradients / 500
    weight = layer.matrix().detach()
    given = {"WtGW": weight.T @ G @ weight} if tall else {"G": G}
    with torch.no_grad():
        metric = tucker.metric_of(layer, SiteStatistics(500, C, patches.mean(0), **given), by_loss=True)
        inner = randn(3, 8, seed=3)
        found = tucker.through(metric, inner, 9)
        torch.testing.assert_close(found.right, through(C, inner.T), **EXACT)
        reduced = projected(conv.weight, inner.T, C).flatten(1)
        torch.testing.assert_close(found.WtGW, reduced.T @ G @ reduced, rtol=1e-9, atol=1e-9)


def test_by_channel_sums_the_offsets() -> None:
    rows = randn(50, 4 * 6, seed=1)
    wanted = sum(rows[:, k::6].T @ rows[:, k::6] for k in range(6))
    torch.testing.assert_close(by_channel(rows.T @ rows, 6), wanted, **EXACT)


# Ranks ------------------------------------------------------------------------------------------------------


def test_energy_keeps_what_was_asked_of_each_side() -> None:
    model = mixed(8, 12, 3)
    weight = model.layer.weight.detach().clone()
    lowrank_ft.wrap(model, "tucker", targets="layer", objective="weight", energy=0.6, align=1)
    node = model.layer.structure()
    for mode, rank in enumerate((node.rank_out, node.rank_in)):
        values = torch.linalg.svdvals(weight.movedim(mode, 0).flatten(1)).square()
        kept = torch.cumsum(values, 0) / values.sum()
        assert kept[rank - 1] >= 0.6 > kept[rank - 2]


@pytest.mark.parametrize("objective", ["loss", "output", "weight"])
def test_sizes_are_what_is_left(objective: str) -> None:
    tiny = TINY["resnet"]
    model = tiny.model()
    data = {} if objective == "weight" else {"data": [tiny.inputs()] * 2}
    lowrank_ft.wrap(model, "tucker", targets="all-conv", ratio=0.4, align=1, objective=objective, **data)
    stock = dict(tiny.model().named_modules())
    for name, module in replacements(model).items():
        assert isinstance(module, TuckerConv)
        node, layer = module.structure(), layer_of(stock[name])
        assert isinstance(layer, ConvLayer)
        left = sum(p.numel() for p in module.parameters())
        assert (
            left
            == size_of(layer, node.rank_out, node.rank_in)
            < sum(p.numel() for p in stock[name].parameters())
        )


def test_more_removed_is_more_lost() -> None:
    """By the prediction; and in the output, where it is only the first that is sure to be the least."""
    tiny = TINY["resnet"]
    batches = [{"pixel_values": randn(8, 3, 16, 16, seed=i).float()} for i in range(4)]
    predicted, measured = [], []
    for ratio in (0.1, 0.3, 0.5, 0.7):
        dense, model = tiny.model(), tiny.model()
        lowrank_ft.wrap(model, "tucker", targets="all-conv", ratio=ratio, align=1, data=batches)
        rows = engine.stages_of(model)[0]["layers changed"]
        predicted.append(sum(row["predicted"] for row in rows))
        measured.append(sum(float((logits(model, b) - logits(dense, b)).square().mean()) for b in batches))
    assert predicted == sorted(predicted)
    assert measured[0] == min(measured) < measured[-1] / 2


# Refusals ---------------------------------------------------------------------------------------------------


class Padded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (nn.Conv2d(8, 8, 3, groups=2), "convolution with groups=2"),
        (nn.ConvTranspose2d(8, 8, 3), "ConvTranspose2d"),
        (nn.Linear(8, 8), "Linear"),
        (Padded(8, 8, 3), "Padded"),
    ],
    ids=["grouped", "transposed", "linear", "own forward"],
)
def test_what_cannot_be_decomposed_is_named(layer: nn.Module, what: str) -> None:
    with pytest.raises(TargetError, match=f"layer is a {what}, which 'tucker' cannot decompose"):
        lowrank_ft.wrap(Single(layer), "tucker", targets="layer", objective="weight")
    with pytest.raises(TargetError, match="which cannot become smaller convolutions"):
        TuckerNode(2, 2).build(layer)


def test_ranks_above_the_channels_are_refused() -> None:
    with pytest.raises(TargetError, match="of 8 channels cannot have rank 9"):
        TuckerNode(4, 9).build(nn.Conv2d(8, 12, 3))


@pytest.mark.parametrize("energy", [0.0, 1.0, -1.0])
def test_energy_out_of_range_is_refused(energy: float) -> None:
    with pytest.raises(ConfigError, match="energy must lie between 0 and 1"):
        method_of(energy=energy)
