"""Options: worked out once, kept, chosen among, and measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ft
from lowrank_ft import engine, solve
from lowrank_ft.algorithms import lord, modegpt_groups
from lowrank_ft.algorithms.base import Share
from lowrank_ft.algorithms.lord import LoRD, LoRDMethod
from lowrank_ft.anatomy import sites
from lowrank_ft.calibration import collect, losses, probes, size, store, stream
from lowrank_ft.calibration.store import Store, upper_triangle, whole_matrix
from lowrank_ft.engine import pipeline
from lowrank_ft.engine.offers import Shelf, offers, recipe_of
from lowrank_ft.engine.surgery import in_place
from lowrank_ft.errors import CheckpointError, ConfigError, StorageError
from lowrank_ft.quant.scheme import Scheme
from lowrank_ft.solve.allocation import Option
from tests.contract.cases import Case
from tests.contract.test_contract import assert_same_state, state
from tests.tiny import TINY

# What each method decomposes with, where it is looked up.
DECOMPOSITIONS: dict[str, list[tuple[Any, str]]] = {
    "lord": [(solve, "decompose")],
    "tucker": [(solve, "decompose")],
    "modegpt": [
        (solve, "decompose"),
        (solve, "elimination_order"),
        (modegpt_groups, "_cheapest_first"),
        (modegpt_groups.ValueOutput, "_bases"),
    ],
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the decompositions of a run, by function."""
    counts: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for owner, name in {pair for pairs in DECOMPOSITIONS.values() for pair in pairs}:
        monkeypatch.setattr(owner, name, counting(name, getattr(owner, name)))
    return counts


def compress(method: str, cache: Path | None = None, ratio: float = 0.3, **more: Any) -> nn.Module:
    case = Case(method, "resnet" if method == "tucker" else "llama", options={"align": 1, **more})
    calibration = {"cache": None if cache is None else str(cache), **more.pop("calibration", {})}
    return case.wrap(case.tiny.model(), ratio=ratio, calibration=calibration, **more)


def rows_of(model: nn.Module) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = engine.stages_of(model)[0]["layers changed"]
    return rows


def test_lord_decomposes_every_layer_once(counted: Counter[str]) -> None:
    model = compress("lord")
    assert counted == {"decompose": len(rows_of(model))}


def test_modegpt_decomposes_every_group_once(counted: Counter[str]) -> None:
    rows = rows_of(compress("modegpt"))
    roles = Counter(row["role"] for row in rows)
    assert len(rows) >= 6
    layers = 2 * 7  # LoRD competes on each
    key_heads = TINY["llama"].model().config.num_key_value_heads
    assert counted["decompose"] == layers
    assert counted["elimination_order"] == 2
    assert counted["_bases"] == 2
    assert counted["_cheapest_first"] == 2 * key_heads
    assert sum(roles.values()) == len(rows)


@pytest.mark.parametrize("objective", ["loss", "weight"])
def test_tucker_decomposes_no_side_twice(objective: str, counted: Counter[str]) -> None:
    """Behind an inner factor there is another matrix to decompose; nothing else is decomposed again."""
    model = compress("tucker", objective=objective)
    convolutions = [m for m in TINY["resnet"].model().modules() if isinstance(m, nn.Conv2d)]
    inner = sum(m.kernel_size != (1, 1) and m.out_channels <= m.weight[0].numel() for m in convolutions)
    again = [r for r in rows_of(model) if r.get("ranks") and None not in r["ranks"].values()]
    behind = len(again) if objective == "loss" else 0
    assert counted["decompose"] == len(convolutions) + inner + behind


@pytest.mark.parametrize("method", sorted(DECOMPOSITIONS))
def test_a_second_ratio_decomposes_nothing(method: str, counted: Counter[str], tmp_path: Path) -> None:
    first = compress(method, tmp_path, 0.2)
    counted.clear()
    again, other = compress(method, tmp_path, 0.2), compress(method, tmp_path, 0.25)
    # Behind a convolution's inner factor there is a new matrix for every pair of ranks.
    assert counted == {} or method == "tucker"
    assert_same_state(again, state(first))
    assert engine.count(other).total < engine.count(first).total


@pytest.mark.parametrize("method", sorted(DECOMPOSITIONS))
def test_values_from_a_handle_are_those_worked_out_again(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To float64's rounding; signs and all."""
    with_handles = state(compress_in_float64(method))
    original = pipeline._solve

    def without(*args: Any) -> Any:
        return original(*args[:5])

    monkeypatch.setattr(pipeline, "_solve", without)
    worked_out = state(compress_in_float64(method))
    assert list(worked_out) == list(with_handles)
    for key, tensor in worked_out.items():
        torch.testing.assert_close(with_handles[key], tensor, rtol=1e-7, atol=1e-9)


def compress_in_float64(method: str) -> nn.Module:
    case = Case(method, "resnet" if method == "tucker" else "llama", options={"align": 1, "ratio": 0.3})
    return case.wrap(case.tiny.model(torch.float64))


def test_a_shelf_gives_back_what_it_was_given(tmp_path: Path) -> None:
    handle = {"order": torch.tensor([2, 0, 1]), "vectors": torch.randn(3, 4, dtype=torch.float64)}
    options = [
        Option(None, 10, 0.0, handle=handle),
        Option(3, 7, 0.1 + 0.2, {"out": 3}, handle=handle),
        Option(None, 5, 1.5, scheme=Scheme("nf", 4), handle=handle),
    ]
    shelf = Shelf(tmp_path, {"a": 1})
    assert shelf.read(0) is None
    assert not list(tmp_path.iterdir())
    for kept in (shelf.write(0, options), Shelf(tmp_path, {"a": 1}).read(0)):
        assert kept == options
        assert sorted(kept[0].handle) == ["order", "vectors"]
        assert all(torch.equal(kept[0].handle[key], tensor) for key, tensor in handle.items())
        with pytest.raises(KeyError):
            kept[0].handle["no such tensor"]
    assert Shelf(tmp_path, {"a": 2}).read(0) is None
    shelf._path(0).write_bytes(shelf._path(0).read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"00000.safetensors cannot be read .*delete it"):
        shelf.read(0)


def test_options_are_kept_under_all_that_they_depend_on() -> None:
    chosen = sites.select(TINY["llama"].model())

    def recipe(**options: Any) -> dict[str, Any]:
        return recipe_of(LoRDMethod(LoRD(**options)), chosen, ["inputs-1"])

    assert recipe(ratio=0.1) == recipe(ratio=0.5, ratio_of="total")
    assert recipe() != recipe(align=4)
    assert recipe() != recipe(min_saving=0.1)
    assert recipe() != recipe(objective="weight")
    assert recipe() != recipe_of(LoRDMethod(LoRD()), chosen, ["inputs-2"])
    assert recipe() != recipe_of(LoRDMethod(LoRD()), chosen[1:], ["inputs-1"])


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, method = sites.select(TINY["llama"].model()), LoRDMethod(LoRD(objective="weight", align=1))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = offers(method, chosen, {})
        torch.set_num_threads(2)
        together = offers(method, chosen, {})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert alone == together
    assert not any(t.requires_grad for options in together.values() for t in options[-1].handle.values())


def test_a_convolution_that_loses_inner_channels_alone_is_reported() -> None:
    """Its ranks go by "in", which is no layer's name."""
    site = sites.select(TINY["resnet"].model(), "all-conv")[0]
    share = Share(None, 0.5, {"in": 2})
    (row,) = pipeline._rows(site, share, {}, {"tokens": 7})
    assert (row["predicted"], row["tokens"]) == (0.5, 7)


# The store --------------------------------------------------------------------------------------------------


def test_a_triangle_gives_back_the_matrix() -> None:
    for n in (1, 2, 7, 300):
        x = torch.randn(n, n, generator=torch.Generator().manual_seed(n))
        matrix = x + x.T
        packed = upper_triangle(matrix)
        assert packed.shape == (n * (n + 1) // 2,)
        assert torch.equal(whole_matrix(packed), matrix.double())


def test_moments_take_a_quarter_of_their_bytes(tmp_path: Path) -> None:
    x = torch.randn(400, 600)
    moment = (x @ x.T) / 600
    Store(tmp_path).put("0000", {"a|C": moment}, {"a": "a", "b": "a"})
    (path,) = tmp_path.glob("*.safetensors")
    assert path.stat().st_size < 0.26 * 400 * 400 * 8
    assert torch.equal(Store(tmp_path).read("b")["C"], moment.double())


def test_what_statistics_take_is_told_before(tmp_path: Path) -> None:
    """Within a tenth and four kilobytes, and never less than is written."""
    case = Case("nf", "llama", options={"objective": "loss", "budget": 4.2})
    model = case.tiny.model()
    modules = {site.name: site.modules[0] for site in sites.select(model)}
    leaders = collect.shared_inputs(model, modules, case.data()[0])
    alone = {name: module for name, module in modules.items() if leaders[name] == name}
    assert len(alone) == 2 * 4
    case.wrap(model, calibration={"cache": str(tmp_path)})
    for kind, told in (
        ("inputs", size.of_inputs(alone)),
        ("gradients", size.of_gradients(case.tiny.model(), modules, weighted=True)),
    ):
        written = sum(path.stat().st_size for path in tmp_path.glob(f"{kind}-*/*.safetensors"))
        assert written <= told <= 1.1 * written + 14 * 4096


def test_a_full_disk_is_told_before_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10_000
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free})())

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("statistics were gathered")

    monkeypatch.setattr(collect, "inputs", never)
    with pytest.raises(StorageError, match=r"take up to .* GB, and the disk of .* has 0.00 GB left"):
        compress("lord", tmp_path)


def test_a_disk_that_fills_up_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise store.SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(StorageError, match=r"The disk of .* is full. Make room"):
        compress("lord", tmp_path)
    assert not list(tmp_path.rglob("*.partial"))


def test_a_loss_works_on_a_model_that_returns_a_tensor() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    net, batch = Net(), {"x": torch.randn(8, 4)}
    assert losses.summed_loss(net, batch, net(**batch)).requires_grad
    lowrank_ft.wrap(net, "lord", ratio=0.2, ratio_of="targets", align=1, data=[batch] * 3)


# Measured ---------------------------------------------------------------------------------------------------


def test_what_an_option_does_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a model that has this one option alone, by hand."""
    case = Case("modegpt", "llama", options={"align": 1, "ratio": 0.3})
    plain, batch = case.tiny.model(torch.float64), case.data(torch.float64)[0]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    data = [batch, *case.data(torch.float64)[1:]]
    before = plain(**inputs)
    by_hand: dict[str, float] = {}
    original = pipeline._measured

    def recording(run: Any, new: Any) -> Any:
        for name, modules in new.items():
            if modules:
                with in_place(run.model, modules):
                    moved = losses.divergence(before, run.model(**inputs), None)
                by_hand[name] = moved / batch["input_ids"].numel()
        return original(run, new)

    monkeypatch.setattr(pipeline, "_measured", recording)
    settings = {"measure_options": True, "probe_samples": len(batch["input_ids"])}
    model = lowrank_ft.wrap(plain, "modegpt", ratio=0.3, align=1, data=data, calibration=settings)
    measured = {row["module"]: row["measured"] for row in rows_of(model) if "measured" in row}
    assert measured.keys() == by_hand.keys()
    assert len(measured) > 2
    for name, value in measured.items():
        assert value == pytest.approx(by_hand[name], rel=1e-6, abs=1e-12)
        assert value > 0


def test_measuring_changes_nothing() -> None:
    assert_same_state(compress("lord", calibration={"measure_options": True}), state(compress("lord")))


def test_what_cannot_be_measured_is_refused() -> None:
    for options in ({"calibration": {"sequential": True}}, {"objective": "weight"}):
        settings = {"measure_options": True, **options.pop("calibration", {})}  # type: ignore[arg-type, misc]
        case = Case("lord", "llama", options={"align": 1, **options})
        model = case.tiny.model()
        before = state(model)
        with pytest.raises(ConfigError, match="calibration.measure_options .* leave it out"):
            case.wrap(model, ratio=0.3, calibration=settings)
        assert_same_state(model, before)


def test_the_budget_s_currency_is_the_one_of_the_objective() -> None:
    """Predictions in nats are reported; errors of outputs, which compare no layers, are not."""
    assert all(row["predicted"] is not None for row in rows_of(compress("lord")))
    assert all(row["predicted"] is None for row in rows_of(compress("lord", objective="output")))
    assert lord.LoRDMethod.spending == {"ratio", "ratio_of"}


def test_a_chain_s_probes_equal_those_of_the_whole_model() -> None:
    case = Case("lord", "llama")
    model, data = case.tiny.model(torch.float64), case.data(torch.float64)[:2]
    chain = stream.find_chain(model, data[0])
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    twin = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float64)
    changes = {
        "model.layers.1.mlp.down_proj": lambda: in_place(model, {"model.layers.1.mlp.down_proj": twin})
    }

    blocks, whole = (probes.divergences(model, c, changes, data) for c in (chain, None))
    assert blocks == pytest.approx(whole, rel=1e-9)
    assert model.get_submodule(name) is layer
