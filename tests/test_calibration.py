"""Calibration: what is counted, in which order, from what; and that it survives being killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lowrank_ft
from lowrank_ft import engine
from lowrank_ft.anatomy import sites
from lowrank_ft.calibration import batches as batching
from lowrank_ft.calibration import collect, losses, probes, stream
from lowrank_ft.calibration.batches import Calibration
from lowrank_ft.calibration.store import Store, StoredStatistics
from lowrank_ft.engine import pipeline
from lowrank_ft.errors import ConfigError, LowRankError, NonFiniteError, StateError, TargetError
from lowrank_ft.solve.allocation import Option, allocate, uniform
from tests.contract.test_contract import assert_same_state, state
from tests.recipes.conftest import make_tokenizer, sentence
from tests.tiny import TINY

LINEAR = [name for name in TINY if name != "resnet"]


def data_for(name: str, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    batch = TINY[name].inputs(dtype)
    if "input_ids" in batch:  # the second half of one sequence is padding
        mask = torch.ones_like(batch["input_ids"])
        mask[1, 5:] = 0
        batch["attention_mask"] = mask
        if batch["labels"].shape == mask.shape:
            batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    return [batch, {key: value.flip(0) for key, value in batch.items()}]


def gather(
    name: str, model: nn.Module, chain: Any, path: Path, targets: Any = "all-linear"
) -> StoredStatistics:
    chosen = sites.select(model, targets)
    modules = {site.names[0]: site.modules[0] for site in chosen}
    known = StoredStatistics(*(Store(path / kind) for kind in ("inputs", "gradients", "probes")))
    collect.inputs(model, chain, modules, data_for(name), known.inputs)
    batches = data_for(name)
    collect.gradients(model, chain, modules, batches, known.gradients, None, fisher=True, weighted=True)
    return known


@pytest.mark.parametrize("name", LINEAR)
def test_streaming_equals_hooks_on_the_whole_model(name: str, tmp_path: Path) -> None:
    """And both equal plain arithmetic on what a forward and a backward hook see."""
    model, data = TINY[name].model(torch.float64), data_for(name)
    chain = stream.find_chain(model, data[0])
    assert chain is not None
    assert len(chain) == 2
    blocks, whole = gather(name, model, chain, tmp_path / "a"), gather(name, model, None, tmp_path / "b")
    expected = by_hand(model, data)
    assert set(blocks) == set(whole) == set(expected)
    for layer, (x, g) in expected.items():
        weight = sites.layer_of(dict(model.named_modules())[layer]).matrix()
        for store in (blocks, whole):
            found = store[layer]
            assert found.tokens == len(x)
            torch.testing.assert_close(found.C, x.T @ x / len(x))
            torch.testing.assert_close(found.mean, x.mean(0))
            G = g.T @ g / len(g)
            if found.WtGW is not None:
                torch.testing.assert_close(found.WtGW, weight.T @ G @ weight)
                torch.testing.assert_close(found.G_diagonal, G.diagonal())
            else:
                torch.testing.assert_close(found.G, G)
            norms = g.square().sum(1, keepdim=True)
            torch.testing.assert_close(found.C_weighted, x.T @ (x * norms) / norms.sum())


def test_fisher_means_are_those_of_one_gradient_a_sequence(tmp_path: Path) -> None:
    model, data = TINY["llama"].model(torch.float64), data_for("llama")
    known = gather("llama", model, stream.find_chain(model, data[0]), tmp_path)
    whole = gather("llama", model, None, tmp_path / "whole")
    squares = {name: torch.zeros_like(model.get_submodule(name).weight) for name in known}
    for batch in data:
        for row in range(2):
            single = {key: value[row : row + 1] for key, value in batch.items()}
            output = model(**{key: value for key, value in single.items() if key != "labels"})
            loss = losses.summed_loss(model, single, output)
            weights = [model.get_submodule(name).weight for name in squares]
            for name, gradient in zip(squares, torch.autograd.grad(loss, weights), strict=True):
                squares[name] += gradient**2
    for name, square in squares.items():
        for found in (known[name], whole[name]):
            torch.testing.assert_close(found.fisher_rows, square.mean(1))
            torch.testing.assert_close(found.fisher_columns, square.mean(0))


def test_block_influence(tmp_path: Path) -> None:
    model, data = TINY["llama"].model(torch.float64), data_for("llama")
    known = gather("llama", model, stream.find_chain(model, data[0]), tmp_path)
    apart: list[list[Tensor]] = [[], []]
    for batch in data:
        states = model(
            **{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True
        ).hidden_states
        keep = batch["attention_mask"].bool()
        # The last of transformers' hidden states is behind the final norm: take the block's own output.
        caught: list[Tensor] = []
        handle = model.model.layers[1].register_forward_hook(
            lambda m, a, out, caught=caught: caught.append(stream.hidden_of(out))
        )
        model(**{k: v for k, v in batch.items() if k != "labels"})
        handle.remove()
        for k, (x, y) in enumerate(((states[0], states[1]), (states[1], caught[0]))):
            apart[k].append((1 - torch.cosine_similarity(x, y, dim=-1))[keep].detach())
    expected = [float(torch.cat(parts).mean()) for parts in apart]
    names = [f"model.layers.{k}.mlp.down_proj" for k in range(2)]
    assert [known[name].influence for name in names] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit"])
def test_probing_block_by_block_is_probing_the_whole_model(name: str, tmp_path: Path) -> None:
    model, data = TINY[name].model(torch.float64), data_for(name)
    modules = {site.names[0]: site.modules[0] for site in sites.select(model, "all-linear")}
    before, found = state(model), []
    for where, chain in (("a", stream.find_chain(model, data[0])), ("b", None)):
        store = Store(tmp_path / where)
        probes.sensitivities(model, chain, modules, data, store)
        found.append({layer: float(store.read(layer)["sensitivity"]) for layer in modules})
    for layer in modules:
        assert found[0][layer] > 0
        # Norms run in float32 inside transformers, so that divergences of 1e-8 have a rounding of 1e-14.
        assert found[0][layer] == pytest.approx(found[1][layer], rel=1e-5)
    assert_same_state(model, before)


def test_sensitivity_of_a_linear_model_is_known(tmp_path: Path) -> None:
    """``½ ‖W₂ n‖²`` for white noise n of unit energy is ``½ ‖W₂‖²_F / d``, up to sampling."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double().eval()
    batch = {"input": torch.randn(4000, 6, dtype=torch.float64)}
    store = Store(tmp_path)
    probes.sensitivities(net, None, {"0": net[0], "1": net[1]}, [batch], store)
    assert float(store.read("1")["sensitivity"]) == pytest.approx(0.5, rel=1e-9)
    expected = 0.5 * float((net[1].weight.detach() ** 2).sum()) / 5
    # The mean of 4000 quadratic forms: a relative deviation of sqrt(2/4000) at most, three of them here.
    assert float(store.read("0")["sensitivity"]) == pytest.approx(expected, rel=3 * (2 / 4000) ** 0.5)


def by_hand(model: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and output gradients of every layer, real positions only, row by row."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    modules = {site.names[0]: site.modules[0] for site in sites.select(model, "all-linear")}
    for batch in data:
        caught: dict[str, tuple[Tensor, Tensor]] = {}

        def catch(
            name: str, args: Any, out: Tensor, caught: dict[str, tuple[Tensor, Tensor]] = caught
        ) -> None:
            caught[name] = (args[0], out)

        handles = [
            module.register_forward_hook(lambda m, args, out, name=name: catch(name, args, out))
            for name, module in modules.items()
        ]
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
        for handle in handles:
            handle.remove()
        loss = losses.summed_loss(model, batch, output)
        slopes = torch.autograd.grad(loss, [out for _, out in caught.values()])
        mask = batch.get("attention_mask")
        for (name, (x, _)), slope in zip(caught.items(), slopes, strict=True):
            keep = torch.ones(x.shape[:-1], dtype=torch.bool)
            if mask is not None and mask.numel() == keep.numel():
                keep = mask.bool().reshape(keep.shape)
            seen.setdefault(name, []).append((x[keep].detach(), slope[keep]))
    return {n: (torch.cat([x for x, _ in v]), torch.cat([g for _, g in v])) for n, v in seen.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "convnext"])
def test_hidden_states_on_disk_change_nothing(name: str, tmp_path: Path) -> None:
    model, data, shelf = TINY[name].model(torch.float64), data_for(name), tmp_path / "shelf"
    shelf.mkdir()
    kept = gather(name, model, stream.find_chain(model, data[0]), tmp_path / "a")
    shelved = gather(name, model, stream.find_chain(model, data[0], shelf), tmp_path / "b")
    for layer in kept:
        # The same numbers; but strides are not kept, so kernels may add them up in another order.
        torch.testing.assert_close(kept[layer].C, shelved[layer].C, rtol=1e-12, atol=1e-12)
        for quantity in ("G", "WtGW"):
            ours, theirs = getattr(kept[layer], quantity), getattr(shelved[layer], quantity)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * float(ours.abs().max()))
    assert not list(shelf.iterdir())  # what nothing needs any more is gone


def test_shared_inputs_are_counted_once(tmp_path: Path) -> None:
    model = TINY["llama"].model(torch.float64)
    store = gather("llama", model, stream.find_chain(model, data_for("llama")[0]), tmp_path)
    leaders = {**store.inputs._groups["0000"], **store.inputs._groups["0001"]}
    block = "model.layers.1"
    q, gate = f"{block}.self_attn.q_proj", f"{block}.mlp.gate_proj"
    assert {leaders[f"{block}.self_attn.{p}_proj"] for p in "qkv"} == {q}
    assert leaders[f"{block}.mlp.up_proj"] == gate
    assert leaders[f"{block}.mlp.down_proj"] == f"{block}.mlp.down_proj"
    assert store[f"{block}.self_attn.k_proj"].C is not None


def test_embeddings_count_tokens(tmp_path: Path) -> None:
    model = TINY["qwen3"].model(torch.float64)
    chain = stream.find_chain(model, data_for("qwen3")[0])
    store = gather("qwen3", model, chain, tmp_path, ["embed_tokens", "q_proj"])
    ids = torch.cat([b["input_ids"][b["attention_mask"].bool()] for b in data_for("qwen3")])
    found = store["model.embed_tokens"]
    torch.testing.assert_close(found.C, torch.bincount(ids, minlength=96).double() / len(ids))
    assert found.G.shape == (32, 32)
    assert found.G.trace() > 0


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = TINY["llama"].model(torch.float64)
    before, random_state = state(model), torch.get_rng_state()
    types = [type(m) for m in model.modules()]
    gather("llama", model, stream.find_chain(model, data_for("llama")[0]), tmp_path)
    assert_same_state(model, before)
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


# Sources ----------------------------------------------------------------------------------------------------


def test_sources_agree(tmp_path: Path) -> None:
    tokenizer, texts = make_tokenizer(), [sentence(i) for i in range(12)]
    settings = Calibration(samples=5, length=16, batch_size=2)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dataset = datasets.Dataset.from_dict({"text": texts})
    from_texts = batching.prepare(texts, tokenizer, settings)
    loader = DataLoader(from_texts, batch_size=None)  # type: ignore[arg-type]
    assert sum(b["input_ids"].shape[0] for b in from_texts) == 5
    prints = {
        batching.fingerprint(batching.prepare(source, tokenizer, settings))
        for source in (texts, dataset, path, str(path), from_texts, loader)
    }
    assert len(prints) == 1
    other = batching.prepare(texts, tokenizer, Calibration(samples=5, length=16, batch_size=2, seed=1))
    assert batching.fingerprint(other) not in prints


@pytest.mark.parametrize(
    ("data", "tokenizer", "message"),
    [
        (None, True, "looks at calibration data: pass data="),
        (["some text"], False, "need a tokenizer"),
        (iter([{"input_ids": torch.ones(1, 2, dtype=torch.long)}]), False, "only once"),
        ([], False, "no tokens"),
        ([""], True, "no tokens"),
        ([3], False, "one is a int"),
        ("no/such/file.jsonl", True, "no data at"),
        (datasets.Dataset.from_dict({"words": ["a"]}), True, "no column 'text'"),
    ],
)
def test_bad_data(data: Any, tokenizer: bool, message: str) -> None:
    model = TINY["llama"].model()
    before = state(model)
    with pytest.raises(ConfigError, match=message):
        lowrank_ft.wrap(model, "lord", data=data, tokenizer=make_tokenizer() if tokenizer else None)
    assert_same_state(model, before)


def test_non_finite_activations_name_the_layer() -> None:
    model = TINY["llama"].model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    before = state(model)
    with pytest.raises(NonFiniteError, match=r"model.layers.0.mlp.down_proj are NaN or infinite"):
        lowrank_ft.wrap(model, "lord", data=[TINY["llama"].inputs()])
    assert all(torch.equal(before[k].nan_to_num(), v.nan_to_num()) for k, v in model.state_dict().items())


def test_a_tied_embedding_is_refused() -> None:
    model = TINY["llama"].model()
    with pytest.raises(StateError, match="embed_tokens is shared with lm_head.weight"):
        lowrank_ft.wrap(model, "lord", targets="embed_tokens", data=[TINY["llama"].inputs()])


def test_a_layer_that_never_runs_is_named() -> None:
    model = TINY["llama"].model()
    model.model.unused = nn.Linear(4, 4)
    with pytest.raises(TargetError, match="model.unused was never called"):
        lowrank_ft.wrap(model, "lord", data=[TINY["llama"].inputs()])


def test_an_encoder_without_a_head_is_weighed_by_all_it_gives_back() -> None:
    """Its pooler too; and where a layer reaches nothing, that is said."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=50, **sizes)).eval()
    batch = {"input_ids": torch.randint(3, 50, (30, 8))}
    first, second = (
        losses.summed_loss(model, b, model(**b)).item()
        for b in (batch, {"input_ids": batch["input_ids"].flip(0)})
    )
    assert first != second  # each batch has its own noise
    lowrank_ft.wrap(model, "lord", ratio=0.3, align=1, data=[batch])
    assert "pooler.dense" in {row["module"] for row in engine.stages_of(model)[0]["layers changed"]}

    model = BertModel(BertConfig(vocab_size=50, **sizes)).eval()
    before = state(model)

    def first_token(model: Any, batch: Any, output: Any) -> Tensor:
        return output.last_hidden_state[:, 0].sum()

    with pytest.raises(TargetError, match="pooler.dense does not reach the loss"):
        lowrank_ft.wrap(model, "lord", data=[batch], loss=first_token)
    assert_same_state(model, before)


def test_few_tokens_warn_with_the_ridge() -> None:
    model = TINY["llama"].model()
    with pytest.warns(UserWarning, match=r"20 tokens, fewer than the \d+ inputs of .*take a ridge of"):
        lowrank_ft.wrap(model, "lord", ratio=0.3, align=1, data=[TINY["llama"].inputs()])


# The budget -------------------------------------------------------------------------------------------------


def options_of(sizes: list[int], losses: list[float]) -> list[Option]:
    return [Option(size, size, loss) for size, loss in zip(sizes, losses, strict=True)]


def test_allocation_is_the_optimum_where_it_can_be_checked() -> None:
    """Against every combination, to within what one step of one layer is worth."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        layers = {}
        for i in range(4):
            sizes = list(range(1, 6))
            spectrum = torch.rand(5, generator=generator).sort(descending=True).values
            tails = [float(spectrum[k:].sum()) for k in range(1, 6)]
            layers[f"l{i}"] = options_of(sizes, tails)
        budget = 12
        best = min(
            sum(o.loss for o in combination)
            for combination in _product(list(layers.values()))
            if sum(o.size for o in combination) <= budget
        )
        chosen = allocate(layers, budget)
        assert sum(o.size for o in chosen.values()) <= budget
        assert sum(o.loss for o in chosen.values()) <= best + 1e-9  # convex curves: greedy is exact


def _product(choices: list[list[Option]]) -> Any:
    import itertools

    return itertools.product(*choices)


def test_a_layer_past_break_even_stays_dense() -> None:
    dense = Option(None, 100, 0.0)
    layers = {"a": [Option(1, 40, 9.0), Option(2, 80, 8.0), dense], "b": [Option(1, 40, 0.1), dense]}
    chosen = allocate(layers, 150)
    assert chosen["a"].rank is None
    assert chosen["b"].rank == 1


def test_budgets_that_cannot_be_met() -> None:
    layers = {"a": [Option(1, 40, 9.0)]}
    for spend in (lambda: allocate(layers, 39), lambda: uniform(layers, {"a": 100}, 39)):
        with pytest.raises(ConfigError, match="below .*40|the least"):
            spend()


# Being killed -----------------------------------------------------------------------------------------------

WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch
from transformers import LlamaForCausalLM  # imported once, not in every fork
from lowrank_ft.engine import pipeline
from lowrank_ft.calibration.store import Store
from tests.contract.cases import Case

torch.set_num_threads(1)  # what forks must have started no threads
directory, stops, sequential = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "1"
steps = 0

def run(cache, out, stop):
    def counted(original):
        def call(*args, **kwargs):
            global steps
            steps += 1
            if steps == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        return call

    pipeline.Journal.write, Store.put = counted(pipeline.Journal.write), counted(Store.put)
    case = Case("lord", "llama")
    settings = {"cache": str(directory / cache), "sequential": sequential}
    model = case.wrap(case.tiny.model(), ratio=0.3, align=1, calibration=settings)
    torch.save(model.state_dict(), directory / out)
    (directory / "steps").write_text(str(steps))

for cache, stop in stops:
    child = os.fork()
    if child == 0:
        run(cache, f"{cache}.pt", stop)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # or forks print it again
"""


@pytest.mark.parametrize("sequential", [False, True], ids=["one-shot", "sequential"])
def test_killed_runs_resume_to_the_same_bits(sequential: bool, tmp_path: Path) -> None:
    """Ten kills −9 at random steps, each resumed by the next, against a run left alone."""
    generator = torch.Generator().manual_seed(int(sequential))
    kills = [("killed", int(torch.randint(1, 4, (), generator=generator))) for _ in range(10)]
    stops = [("whole", -1), *kills, ("killed", -1)]
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path), json.dumps(stops), "1" if sequential else "0"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    codes = [int(line) for line in done.stdout.split()]
    assert codes == [0, *[-9] * 10, 0], done.stderr[-2000:]
    assert int((tmp_path / "steps").read_text()) < 20  # the last run had little left to do
    first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not list((tmp_path / "killed").glob("journal-*"))


def test_a_second_ratio_costs_no_second_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"calibration": {"cache": str(tmp_path)}, "align": 1}
    data = [TINY["llama"].inputs()] * 3
    lowrank_ft.wrap(TINY["llama"].model(), "lord", ratio=0.2, data=data, **settings)

    def never(*args: Any) -> None:
        raise AssertionError("the model ran again")

    monkeypatch.setattr(stream.Chain, "run", never)
    lowrank_ft.wrap(TINY["llama"].model(), "lord", ratio=0.4, data=data, **settings)
    damaged = next(tmp_path.glob("inputs-*/0000.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with pytest.raises(LowRankError, match="cannot be read"):
        lowrank_ft.wrap(TINY["llama"].model(), "lord", ratio=0.4, data=data, **settings)


def test_other_targets_gather_only_what_is_missing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"align": 1, "data": [TINY["llama"].inputs()] * 3}

    def ranks(cache: bool, targets: Any) -> list[Any]:
        calibration = {"cache": str(tmp_path) if cache else None}
        model = TINY["llama"].model()
        lowrank_ft.wrap(model, "lord", ratio=0.1, targets=targets, calibration=calibration, **settings)
        return [row["predicted"] for row in engine.stages_of(model)[0]["layers changed"]]

    few = ["q_proj", "k_proj", "down_proj"]
    assert ranks(True, few) == ranks(False, few)

    def written() -> dict[Path, int]:
        paths = [p for kind in ("inputs", "gradients") for p in tmp_path.glob(f"{kind}-*/*.safetensors")]
        return {path: path.stat().st_mtime_ns for path in paths}

    before = written()
    # Autograd adds a block's gradients up in another order when it is asked for others: float32 rounding.
    assert ranks(True, "all-linear") == pytest.approx(ranks(False, "all-linear"), rel=1e-4)
    after = written()
    assert before.items() < after.items()
    assert ranks(True, ["o_proj"]) == pytest.approx(ranks(False, ["o_proj"]), rel=1e-4)
    assert written() == after


def test_what_is_cached_belongs_to_a_config(tmp_path: Path) -> None:
    """The same weights under another rotary base give other activations."""
    settings: dict[str, Any] = {"ratio": 0.2, "align": 1, "data": [TINY["llama"].inputs()] * 3}

    def weights(cache: Path | None, theta: float) -> dict[str, Tensor]:
        model: Any = TINY["llama"].model()
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": theta}
        other = type(model)(model.config)
        other.load_state_dict(model.state_dict())
        calibration = {"cache": None if cache is None else str(cache)}
        return lowrank_ft.wrap(other.eval(), "lord", calibration=calibration, **settings).state_dict()

    weights(tmp_path, 1e4)
    cached, clean = weights(tmp_path, 10.0), weights(None, 10.0)
    assert all(torch.equal(cached[key], clean[key]) for key in clean)


def test_a_run_with_a_loss_of_its_own_leaves_no_layers_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(model: Any, batch: Any, output: Any) -> Tensor:
        return 0.5 * losses.summed_loss(model, batch, output)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    settings: dict[str, Any] = {"calibration": {"cache": str(tmp_path)}, "ratio": 0.2, "align": 1}
    data = [TINY["llama"].inputs()] * 3
    for loss, left in ((half, 0), (None, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                lowrank_ft.wrap(TINY["llama"].model(), "lord", data=data, loss=loss, **settings)
        assert len(list(tmp_path.glob("journal-*"))) == left
    targets = ["q_proj", "down_proj"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            lowrank_ft.wrap(TINY["llama"].model(), "lord", data=data, targets=targets, **settings)
    assert len(list(tmp_path.glob("journal-*"))) == 2


def test_more_gradients_are_not_fewer_from_the_cache(tmp_path: Path) -> None:
    """What is cached depends on all that it was computed from."""
    data = [TINY["llama"].inputs(), TINY["llama"].inputs()]
    data[1] = {key: value.flip(1) for key, value in data[1].items()}
    data = data * 2

    def ranks(cache: Path | None, samples: int, loss: Any = None) -> list[Any]:
        settings = {"gradient_samples": samples, "cache": None if cache is None else str(cache)}
        model = lowrank_ft.wrap(
            TINY["llama"].model(), "lord", ratio=0.3, align=1, data=data, calibration=settings, loss=loss
        )
        return [row["predicted"] for row in engine.stages_of(model)[0]["layers changed"]]

    def half(model: Any, batch: Any, output: Any) -> Tensor:
        return 0.5 * losses.summed_loss(model, batch, output)

    few, many = ranks(tmp_path, 1), ranks(tmp_path, 8)
    assert few != many
    assert many == ranks(None, 8)
    assert ranks(tmp_path, 8, half) == ranks(None, 8, half) != many


def test_a_loss_that_nothing_looks_at_is_refused() -> None:
    with pytest.raises(ConfigError, match="looks at no loss"):
        lowrank_ft.wrap(
            TINY["llama"].model(), "lord", objective="output", data=[TINY["llama"].inputs()], loss=len
        )


def test_calibration_in_training_mode_is_that_in_eval_mode() -> None:
    """No dropout, no batch norm moves, and the mode is what it was."""
    model = TINY["convnext"].model().train()
    before = state(model)
    kept = [TINY["convnext"].inputs()] * 2
    with pytest.raises(ConfigError, match="more than the targeted layers have"):
        lowrank_ft.wrap(model, "lord", ratio=0.99, ratio_of="total", data=kept)
    assert_same_state(model, before)
    assert model.training
