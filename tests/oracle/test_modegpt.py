"""MoDeGPT against its definitions, in float64: published forms with explicit roots, and brute force."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank_ft
from lowrank_ft import engine, solve
from lowrank_ft.algorithms.modegpt import MoDeGPT, MoDeGPTMethod
from lowrank_ft.algorithms.modegpt_groups import (
    ATTENTION,
    MLP,
    QK,
    VO,
    FusedAttention,
    Mlp,
    QueryKey,
    ValueOutput,
)
from lowrank_ft.anatomy import layouts
from lowrank_ft.anatomy.sites import Site, select, stock_modules
from lowrank_ft.calibration import collect
from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.calibration.store import Store, StoredStatistics
from lowrank_ft.errors import ConfigError, StateError, TargetError
from lowrank_ft.modules.attention import AttentionNode, ResizedAttention
from lowrank_ft.modules.layer import Layer, layer_of
from lowrank_ft.modules.resized import Resized, ResizedNode
from lowrank_ft.solve.allocation import Option, allocate, combined, keep_by_entropy
from lowrank_ft.structure.heads import head_width, split_of
from tests.contract.cases import Case
from tests.oracle.moments import moment, randn, symmetric_root
from tests.tiny import TINY, logits

PAPER, LOSS = MoDeGPT(recipe="paper"), MoDeGPT()
# A product of a few hundred float64 numbers of size 1, with one triangular solve of condition up to 1e4.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def left_out(C: Tensor, K: Tensor, kept: Tensor) -> float:
    """``tr(K (C − C[:,J] C[J,J]⁻¹ C[J,:]))`` as it stands."""
    residual = C - C[:, kept] @ torch.linalg.solve(C[kept][:, kept], C[kept])
    return float((K * residual).sum())


# Columns ----------------------------------------------------------------------------------------------------


def test_errors_of_all_prefixes_are_those_of_the_definition() -> None:
    C, K = moment(24, 0), moment(24, 1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    errors = solve.nystrom_errors(C, K, order)
    for k in (1, 5, 12, 23):
        assert float(errors[k]) == pytest.approx(left_out(C, K, order[:k]), rel=1e-9)
    assert float(errors[0]) == pytest.approx(float((K * C).sum()), rel=1e-12)
    assert float(errors[24]) == 0


def test_the_refitted_weight_is_the_least_squares_answer() -> None:
    X, W = randn(200, 16, seed=3), randn(8, 16, seed=4)
    kept = torch.tensor([1, 4, 7, 8, 15])
    refitted, _ = solve.nystrom_refit(W, X.T @ X / 200, kept)
    expected = torch.linalg.lstsq(X[:, kept], X @ W.T).solution.T
    torch.testing.assert_close(refitted, expected, **CLOSE)


def test_elimination_takes_the_cheapest_column_each_time() -> None:
    C, K = moment(14, 5), moment(14, 6)
    order = solve.elimination_order(C, K, 1)
    kept = list(range(14))
    for gone in order.flip(0).tolist()[:-1]:
        costs = {j: left_out(C, K, torch.tensor([i for i in kept if i != j])) for j in kept}
        assert min(costs, key=costs.__getitem__) == gone
        kept.remove(gone)


@pytest.mark.parametrize("step", [1, 3, 5, 100])
def test_elimination_by_steps_is_a_permutation(step: int) -> None:
    C, K = moment(14, 5), moment(14, 6)
    assert sorted(solve.elimination_order(C, K, step).tolist()) == list(range(14))


def test_elimination_beats_leverage_scores() -> None:
    C, K = moment(40, 7), moment(40, 8)
    ours = solve.nystrom_errors(C, K, solve.elimination_order(C, K, 2))
    theirs = solve.nystrom_errors(C, K, solve.leverage_scores(C).argsort(descending=True))
    assert (ours[10:35] < theirs[10:35]).all()


def test_leverage_scores_are_those_of_the_definition() -> None:
    C = moment(20, 9)
    ridge = 0.3 * C.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    expected = (C @ torch.linalg.inv(C + ridge)).diagonal()
    torch.testing.assert_close(solve.leverage_scores(C, 0.3), expected, **CLOSE)


def test_pivots_are_the_largest_residual_diagonals() -> None:
    C = moment(12, 10)
    order = solve.pivoted_order(C).tolist()
    for k in range(12):
        J = torch.tensor(order[:k], dtype=torch.long)
        residual = C - C[:, J] @ torch.linalg.solve(C[J][:, J], C[J]) if k else C
        assert int(residual.diagonal().argmax()) == order[k]


def test_pulling_a_gradient_through_a_weight() -> None:
    """From G, or from what is kept of it for a tall layer; the two agree where G is a multiple of I."""
    W, G = randn(9, 5, seed=13), moment(9, 14)
    ridge = 0.01 * G.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(solve.gram_under(W, G, ridge=0.01), W.T @ (G + ridge) @ W, **CLOSE)
    torch.testing.assert_close(solve.gram_under(W), W.T @ W, **CLOSE)
    torch.testing.assert_close(solve.gram_under(W, WtGW=W.T @ G @ W), W.T @ G @ W, **CLOSE)
    white = solve.gram_under(W, WtGW=3 * W.T @ W, ridge=0.01)
    torch.testing.assert_close(
        white, solve.gram_under(W, 3 * torch.eye(9, dtype=torch.float64), ridge=0.01), **CLOSE
    )


# Queries and keys -------------------------------------------------------------------------------------------


def attention_of(name: str) -> tuple[nn.Module, Any]:
    model = TINY[name].model(torch.float64)
    block = model.model.decoder.layers[0] if name == "opt" else model.model.layers[0]
    return model, block.self_attn


def site_of(attention: nn.Module, role: str, parts: tuple[str, str]) -> Site:
    modules = tuple(getattr(attention, part) for part in parts)
    return Site(("a", *(f"a.{part}" for part in parts)), (attention, *modules), role)


def known_of(features: int, outputs: int, seed: int) -> SiteStatistics:
    mean = 0.1 * randn(features, seed=seed)
    return SiteStatistics(
        400, moment(features, seed) + torch.outer(mean, mean), mean, moment(outputs, seed + 1)
    )


def statistics_for(site: Site) -> dict[str, SiteStatistics]:
    found = {}
    for i, (name, layer) in enumerate(site.layers.items()):
        seed = 50 if site.role == QK else 50 + 2 * i  # queries and keys share their input
        known = known_of(layer.in_features, layer.out_features, seed)
        found[name] = SiteStatistics(400, known.C, known.mean, moment(layer.out_features, 90 + i))
    return found


def test_diagonals_stand_for_norms_of_square_roots() -> None:
    """The paper scores a dimension by ``‖C_Q^½[:,j]‖ ‖C_K^½[:,j]‖``; no root is needed for that."""
    _, attention = attention_of("opt")
    site = site_of(attention, QK, ("q_proj", "k_proj"))
    known = statistics_for(site)
    group = QueryKey(site)
    order, _ = group._order(known, PAPER)
    norms = []
    for name, layer in site.layers.items():
        X = known[name]
        W, b = layer.weight, layer.bias
        C = W @ X.C @ W.T + torch.outer(W @ X.mean, b) + torch.outer(b, W @ X.mean) + torch.outer(b, b)
        norms.append(symmetric_root(C).norm(dim=0).view(-1, group.width))
    assert torch.equal(order, (norms[0] * norms[1]).argsort(dim=1, descending=True))


def test_the_score_of_a_pair_does_not_depend_on_the_rotation() -> None:
    x = randn(500, 8, seed=11)
    angles = torch.rand(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(12)) * 6
    turned = torch.cat(
        [
            x[:, :4] * angles.cos() - x[:, 4:] * angles.sin(),
            x[:, 4:] * angles.cos() + x[:, :4] * angles.sin(),
        ],
        1,
    )
    before, after = ((t.T @ t).diagonal().view(2, 4).sum(0) for t in (x, turned))
    torch.testing.assert_close(before, after, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_cost_of_queries_is_the_quadratic_form(name: str) -> None:
    """``½ Σ H[R,R]`` is ``½ E (g·Δq)²`` for the rows left out, mean over queries and keys."""
    _, attention = attention_of(name)
    site = site_of(attention, QK, ("q_proj", "k_proj"))
    known, group = statistics_for(site), QueryKey(site)
    config = MoDeGPT(align=1)
    for option in group.options(known, config):
        nodes = group.structure(option.rank)
        new = {
            n: node.build(m)
            for (n, m), node in zip(zip(site.names, site.modules, strict=True), nodes.values(), strict=True)
        }
        with torch.no_grad():
            group.fill(new, known, config)
        predicted = []
        for layer_name, layer in site.layers.items():
            gone = torch.ones(layer.out_features, dtype=torch.bool)
            gone[new[layer_name].rows] = False
            W, X = layer.weight.detach(), known[layer_name]
            bias = torch.zeros(len(W), dtype=torch.float64) if layer.bias is None else layer.bias.detach()
            C = W @ X.C @ W.T + torch.outer(W @ X.mean, bias) + torch.outer(bias, W @ X.mean + bias)
            G = X.G + 1e-4 * X.G.diagonal().mean() * torch.eye(len(W), dtype=torch.float64)
            predicted.append(0.5 * float((G * C)[gone][:, gone].sum()))
        assert option.loss == pytest.approx(sum(predicted) / 2, rel=1e-9)


# Values and output ------------------------------------------------------------------------------------------


def value_weights(
    group: ValueOutput, rank: int, known: Any, config: MoDeGPT
) -> tuple[Tensor, Tensor, Tensor | None]:
    nodes = group.structure(rank)
    modules = dict(zip(group.site.names, group.site.modules, strict=True))
    new = {name: node.build(modules[name]) for name, node in nodes.items()}
    with torch.no_grad():
        group.fill(new, known, config)
    v, o = (new[name] for name in group.names)
    return v.weight.detach(), o.weight.detach(), o.bias


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_values_reach_the_bound_of_the_published_form(rank: int) -> None:
    """With one query head to a key head: the ``d × d`` form, ``SVD_k(C^½ W_Vᵀ W_Oᵀ)``, head by head."""
    _, attention = attention_of("opt")
    site = site_of(attention, VO, ("v_proj", "out_proj"))
    known, group = statistics_for(site), ValueOutput(site)
    v, o, _ = value_weights(group, rank, known, PAPER)
    h, C_root = group.width, symmetric_root(known[group.names[0]].C)
    for i in range(group.heads):
        W_v, W_o = group.v.weight[i * h : (i + 1) * h], group.o.weight[:, i * h : (i + 1) * h]
        target = C_root @ W_v.T @ W_o.T
        ours = C_root @ v[i * rank : (i + 1) * rank].T @ o[:, i * rank : (i + 1) * rank].T
        bound = torch.linalg.svdvals(target.detach())[rank:].square().sum()
        assert float((target - ours).detach().square().sum()) == pytest.approx(
            float(bound), rel=1e-7, abs=1e-9
        )


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_the_joint_basis_of_a_group_is_never_worse_than_truncating_values_first(rank: int) -> None:
    """The published grouped form cuts ``W_V`` before it sees any ``W_O``."""
    _, attention = attention_of("llama")
    site = site_of(attention, VO, ("v_proj", "o_proj"))
    known, group = statistics_for(site), ValueOutput(site)
    v, o, _ = value_weights(group, rank, known, PAPER)
    h, C_root = group.width, symmetric_root(known[group.names[0]].C)
    for key_head in range(group.key_heads):
        W_v = group.v.weight[key_head * h : (key_head + 1) * h].detach()
        U, S, Vt = torch.linalg.svd(C_root @ W_v.T, full_matrices=False)
        first = (U[:, :rank] * S[:rank]) @ Vt[:rank]  # the best values alone
        ours = theirs = 0.0
        for i in range(key_head * group.group, (key_head + 1) * group.group):
            W_o = group.o.weight[:, i * h : (i + 1) * h].detach()
            target = C_root @ W_v.T @ W_o.T
            cut = C_root @ v[key_head * rank : (key_head + 1) * rank].T @ o[:, i * rank : (i + 1) * rank].T
            ours += float((target - cut).square().sum())
            theirs += float((target - first @ W_o.T).square().sum())
        assert ours <= theirs * (1 + 1e-9)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_cost_of_values_is_the_weighted_error_of_the_output(name: str) -> None:
    _, attention = attention_of(name)
    site = site_of(attention, VO, ("v_proj", "out_proj" if name == "opt" else "o_proj"))
    known, group = statistics_for(site), ValueOutput(site)
    config = MoDeGPT(align=1)
    forward, _ = group._bases(known, config)
    for option in group.options(known, config):
        _, o, _ = value_weights(group, option.rank, known, config)
        P = torch.block_diag(*(forward[i // group.group][: option.rank] for i in range(group.heads)))
        X = known[group.names[1]]
        G = X.G + 1e-4 * X.G.diagonal().mean() * torch.eye(len(X.G), dtype=torch.float64)
        C = X.C if group.o.bias is None else X.C - torch.outer(X.mean, X.mean)
        measured = solve.weighted_error(group.o.weight.detach() - o @ P, C, G)
        assert option.loss == pytest.approx(0.5 * measured, rel=1e-7)


@pytest.mark.parametrize("config", [PAPER, LOSS], ids=["paper", "loss"])
def test_the_bias_of_values_folds_into_the_output(config: MoDeGPT) -> None:
    """Nothing is left out at full rank, so attention computes what it did: V's bias is exact in O's."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=96, num_key_value_heads=2, **sizes)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    attention = model.model.layers[0].self_attn
    assert attention.v_proj.bias is not None
    assert attention.o_proj.bias is None
    site = site_of(attention, VO, ("v_proj", "o_proj"))
    group, known, batch = ValueOutput(site), statistics_for(site), TINY["llama"].inputs()
    before = logits(model, batch)
    nodes = group.structure(group.width)
    new = {n: nodes[n].build(m) for n, m in zip(site.names, site.modules, strict=True)}
    with torch.no_grad():
        group.fill(new, known, config)
    prefix = "model.layers.0.self_attn"
    engine.replace(model, {n.replace("a", prefix, 1): m for n, m in new.items()})
    assert model.model.layers[0].self_attn.v_proj.bias is None
    torch.testing.assert_close(logits(model, batch), before, **CLOSE)


# The whole module -------------------------------------------------------------------------------------------


def names_of(model: nn.Module) -> tuple[str, dict[str, str]]:
    """The first module that attends, and its projections."""
    layout = layouts.layout_of(model).attention
    assert layout is not None
    owner = next(name for name in stock_modules(model) if name.endswith(f".{layout.name}"))
    block = owner.removesuffix(layout.name)
    parts = ("q", "k", "v", "o", "qkv")
    return owner, {part: block + getattr(layout, part) for part in parts if getattr(layout, part)}


def sliced(name: str, queries: bool, values: bool) -> tuple[nn.Module, nn.Module]:
    """A model with some dimensions of its heads cut out, and one with the same set to zero."""
    generator = torch.Generator().manual_seed(3)
    cut, zeroed = TINY[name].model(torch.float64), TINY[name].model(torch.float64)
    owner, names = names_of(cut)
    h = head_width(cut.get_submodule(owner))
    heads = cut.config.num_attention_heads
    key_heads = getattr(cut.config, "num_key_value_heads", heads)
    rows: dict[str, Tensor] = {}
    columns = None
    if queries:
        units = [torch.randperm(h // 2, generator=generator)[:2].sort().values for _ in range(key_heads)]
        dims = [torch.cat([u, u + h // 2]) for u in units]
        rows["k"] = torch.cat([d + g * h for g, d in enumerate(dims)])
        rows["q"] = torch.cat([dims[i // (heads // key_heads)] + i * h for i in range(heads)])
    if values:
        first = torch.arange(h) < 3
        rows["v"] = first.repeat(key_heads).nonzero().flatten()
        columns = first.repeat(heads).nonzero().flatten()
    split: tuple[int, ...] = ()
    if "qkv" in names:
        sizes = {"q": heads * h, "k": key_heads * h, "v": key_heads * h}
        kept = [rows.get(part, torch.arange(size)) for part, size in sizes.items()]
        split = tuple(len(part) for part in kept)
        offsets = (0, sizes["q"], sizes["q"] + sizes["k"])
        rows = {"qkv": torch.cat([part + offset for part, offset in zip(kept, offsets, strict=True)])}
    new: dict[str, nn.Module] = {}
    for part in (*rows, *(["o"] if values else [])):
        layer = layer_of(cut.get_submodule(names[part]))
        mine = rows.get(part), columns if part == "o" else None
        node = ResizedNode(
            layer.out_features if mine[0] is None else len(mine[0]),
            layer.in_features if mine[1] is None else len(mine[1]),
            layer.bias is not None,
        )
        new[names[part]] = module = node.build(layer.module)
        matrix, bias = layer.matrix().detach(), layer.bias
        matrix = matrix if mine[0] is None else matrix[mine[0]]
        with torch.no_grad():
            module.fill(
                matrix if mine[1] is None else matrix[:, mine[1]],
                bias if bias is None or mine[0] is None else bias[mine[0]],
                *mine,
            )
            _zero(layer_of(zeroed.get_submodule(names[part])), *mine)
    inside = {part: full.removeprefix(f"{owner}.") for part, full in names.items()}
    inside = {part: "" if own == names[part] else own for part, own in inside.items()}  # BERT's output
    node = AttentionNode(*(inside.get(part, "") for part in ("q", "k", "v", "o", "qkv")), split)
    new[owner] = node.build(cut.get_submodule(owner))
    engine.replace(cut, new)
    return cut, zeroed


def _zero(layer: Layer, rows: Tensor | None, columns: Tensor | None) -> None:
    for kept, tensor in ((rows, layer.matrix()), (columns, layer.matrix().T), (rows, layer.bias)):
        if kept is not None and tensor is not None:
            gone = torch.ones(len(tensor), dtype=torch.bool)
            gone[kept] = False
            tensor[gone] = 0


CUTS = [
    (name, *what)
    for name in ("llama", "opt", "phi3", "gpt2", "bert", "vit", "qwen3", "gemma3")
    for what in (
        ((False, True),) if name in ("qwen3", "gemma3") else ((True, True), (True, False), (False, True))
    )
]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "queries", "values"), CUTS)
def test_a_sliced_model_is_the_original_with_zeroed_directions(
    name: str, queries: bool, values: bool, backend: str
) -> None:
    """So the softmax keeps the scale of the original head, and each pair the angle it had."""
    cut, zeroed = sliced(name, queries, values)
    batch = TINY[name].inputs()
    for model in (cut, zeroed):
        model.set_attn_implementation(backend)
    torch.testing.assert_close(logits(cut, batch), logits(zeroed, batch), **CLOSE)


@pytest.mark.parametrize("name", ["llama", "opt", "phi3", "gpt2", "qwen3", "gemma3"])
def test_the_cache_holds_the_reduced_widths_and_changes_nothing(name: str) -> None:
    normed = name in ("qwen3", "gemma3")
    model, _ = sliced(name, queries=not normed, values=True)
    ids = TINY[name].inputs()["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        begun = model(input_ids=ids[:, :6], use_cache=True)
        ended = model(input_ids=ids[:, 6:], past_key_values=begun.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([begun.logits, ended], 1), whole, **CLOSE)
    layer = begun.past_key_values.layers[0]
    width = model.get_submodule(names_of(model)[0]).head_dim
    assert layer.values.shape[-1] == 3
    assert layer.keys.shape[-1] == (width if normed else 4)
    tokens = {
        cached: model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    }
    assert torch.equal(tokens[True], tokens[False])


# One matrix for queries, keys and values --------------------------------------------------------------------


def with_separate_projections(model: Any) -> Any:
    """The Llama that computes what a Phi-3 does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "rms_norm_eps", "rope_parameters", "max_position_embeddings")  # fmt: skip
    llama = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.config, name) for name in kept}))
    state = {}
    for name, tensor in model.state_dict().items():
        if "qkv_proj" in name:
            split = list(split_of(model.model.layers[0].self_attn, len(tensor)))
            parts = dict(zip(("q_proj", "k_proj", "v_proj"), tensor.split(split), strict=True))
            state |= {name.replace("qkv_proj", part): rows for part, rows in parts.items()}
        elif "gate_up_proj" in name:
            gate, up = tensor.chunk(2)
            state |= {name.replace("gate_up", "gate"): gate, name.replace("gate_up", "up"): up}
        else:
            state[name] = tensor
    llama.load_state_dict(state)
    return llama.double().eval()


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, StoredStatistics]]:
    """A model with fused projections and one with separate ones, each with its statistics."""
    fused = TINY["phi3"].model(torch.float64)
    found = {}
    for name, model in {"fused": fused, "separate": with_separate_projections(fused)}.items():
        modules = {site.names[0]: site.modules[0] for site in select(model)}
        root = tmp_path_factory.mktemp(name)
        stores = [Store(root / part) for part in ("inputs", "gradients", "probes")]
        batches = Case("modegpt", "phi3").data(torch.float64)
        with torch.no_grad():
            collect.inputs(model, None, modules, batches, stores[0])
            collect.gradients(model, None, modules, batches, stores[1], None)
        found[name] = model, StoredStatistics(*stores)
    batch = TINY["phi3"].inputs()
    torch.testing.assert_close(logits(found["fused"][0], batch), logits(found["separate"][0], batch), **CLOSE)
    return found


def groups_of(model: Any, config: MoDeGPT, role: str) -> Any:
    (site,) = [
        s for s in MoDeGPTMethod(config).sites(model, select(model)) if s.role == role and ".0." in s.name
    ]
    return {QK: QueryKey, VO: ValueOutput, ATTENTION: FusedAttention}[role](site)


@pytest.mark.parametrize("recipe", ["paper", "loss"])
@pytest.mark.parametrize("widths", [(2, 5), (6, 1), (8, 3), (4, 8)])
def test_one_matrix_is_cut_as_three_are(twins: Any, recipe: Any, widths: tuple[int, int]) -> None:
    config = MoDeGPT(recipe=recipe, align=1)
    model, known = twins["fused"]
    fused = groups_of(model, config, ATTENTION)
    ranks = dict(zip((QK, VO), widths, strict=True))
    nodes = fused.structure(sum(widths), ranks)
    new = {name: node.build(model.get_submodule(name)) for name, node in nodes.items()}
    with torch.no_grad():
        facts = fused.fill(new, known, config)
    assert facts["ranks"] == ranks
    split = list(nodes[fused.site.names[0]].split)
    ours = dict(zip("qkv", new[fused.names[0]].weight.split(split), strict=True))
    ours["o"] = new[fused.names[1]].weight if fused.names[1] in new else fused.o.matrix()
    rows = dict(zip("qkv", new[fused.names[0]].rows.split(split), strict=True))
    other, stats = twins["separate"]
    for role, parts in ((QK, "qk"), (VO, "vo")):
        group = groups_of(other, config, role)
        theirs = {n: other.get_submodule(n) for n in group.names}
        if ranks[role] < group.width:
            cut = group.structure(ranks[role])
            theirs = {n: cut[n].build(layer) for n, layer in theirs.items()}
            with torch.no_grad():
                group.fill(theirs, stats, config)
        for part, layer in zip(parts, theirs.values(), strict=True):
            torch.testing.assert_close(ours[part], layer.weight, **CLOSE)
            offset = {"q": 0, "k": len(fused.parts["q"].weight), "v": len(fused.parts["q"].weight) * 3 // 2}
            if part != "o" and ranks[role] < group.width:
                assert torch.equal(rows[part] - offset[part], layer.rows)


def test_the_options_of_one_matrix_are_sums_of_those_of_three(twins: Any) -> None:
    config = MoDeGPT(align=1)
    fused = groups_of(twins["fused"][0], config, ATTENTION)
    other, stats = twins["separate"]
    single = {}
    for role in (QK, VO):
        group = groups_of(other, config, role)
        single[role] = {option.rank: option for option in group.options(stats, config)}
        whole = sum(layer.out_features * layer.in_features for layer in group.layers)
        single[role][group.width] = Option(None, whole, 0.0)
    options = fused.options(twins["fused"][1], config)
    assert len(options) > 5
    for option in options:
        parts = [single[role][option.ranks[role]] for role in (QK, VO)]
        assert option.size == sum(part.size for part in parts)
        assert option.loss == pytest.approx(sum(part.loss for part in parts), rel=1e-9)
        assert option.rank == sum(option.ranks.values())


# Channels ---------------------------------------------------------------------------------------------------


def test_the_cost_of_channels_is_the_weighted_error_of_the_output() -> None:
    """On the data that the moments come from, biases and their mean included."""
    X, W, b = randn(300, 12, seed=20) + 0.5, randn(6, 12, seed=21), randn(6, seed=22)
    up, down = nn.Linear(4, 12).double(), nn.Linear(12, 6).double()
    with torch.no_grad():
        down.weight.copy_(W)
        down.bias.copy_(b)
    site = Site(("m.up", "m.down"), (up, down), MLP)
    known = {"m.down": SiteStatistics(300, X.T @ X / 300, X.mean(0), moment(6, 23))}
    group, config = Mlp(site), MoDeGPT(align=1)
    G = known["m.down"].G
    G = G + 1e-4 * G.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    for option in group.options(known, config):
        new = {
            n: node.build(m)
            for (n, node), m in zip(group.structure(option.rank).items(), (up, down), strict=True)
        }
        with torch.no_grad():
            group.fill(new, known, config)
            kept = new["m.down"].columns
            assert torch.equal(new["m.up"].weight, up.weight[kept])
            assert torch.equal(new["m.up"].rows, kept)
            difference = down(X) - new["m.down"](X[:, kept])
        measured = float((difference @ G * difference).sum(1).mean())
        assert option.loss == pytest.approx(0.5 * measured, rel=1e-9)


# Allocation -------------------------------------------------------------------------------------------------


def test_the_entropy_rule_is_the_published_one_where_nothing_is_cut_off() -> None:
    influence, sizes = {0: 0.3, 1: 0.1, 2: 0.2}, dict.fromkeys(range(3), 1000)
    keep = keep_by_entropy(influence, sizes, 2400, 0.1, dict.fromkeys(range(3), 0))
    phi = 3 * 0.2 * torch.softmax(-torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64) / 0.1, 0)
    assert [keep[i] for i in range(3)] == pytest.approx((1 - phi).tolist(), rel=1e-12)
    even = keep_by_entropy(influence, sizes, 2400, float("inf"), dict.fromkeys(range(3), 0))
    assert list(even.values()) == pytest.approx([0.8] * 3)


def test_what_the_entropy_rule_cannot_take_from_a_block_it_takes_from_others() -> None:
    influence, sizes = {0: 0.9, 1: 0.05, 2: 0.2, 3: 0.2}, dict.fromkeys(range(4), 1000)
    least = dict.fromkeys(range(4), 100)
    keep = keep_by_entropy(influence, sizes, 2000, 0.05, least)
    assert sum(1000 * share for share in keep.values()) == pytest.approx(2000)
    assert keep[1] == pytest.approx(0.1)
    assert all(0.1 - 1e-12 <= share <= 1 for share in keep.values())
    with pytest.raises(ConfigError, match="below 400, the least"):
        keep_by_entropy(influence, sizes, 399, 0.05, least)


def test_combined_options_are_the_hull_of_all_combinations() -> None:
    generator = torch.Generator().manual_seed(5)
    layers = {}
    for name in "abc":
        losses = torch.rand(4, generator=generator).sort(descending=True).values.tolist()
        layers[name] = [Option(r, 3 * r, loss) for r, loss in enumerate(losses, 1)] + [Option(None, 20, 0.0)]
    every = [(sum(o.size for o in c), sum(o.loss for o in c)) for c in itertools.product(*layers.values())]
    found = combined(layers)
    for price in (0.001, 0.01, 0.03, 0.1, 0.3):  # at any price the same best option: the same hull
        best = min(loss + price * size for size, loss in every)
        assert min(o.loss + price * o.size for o in found) == pytest.approx(best, rel=1e-12)
    assert found[-1] == Option(None, 60, 0.0, {})
    chosen = allocate({"group": found}, 41)["group"]
    assert chosen.size <= 41
    assert chosen.size == sum(3 * r for r in chosen.ranks.values()) + 20 * (3 - len(chosen.ranks))


def test_a_tiny_temperature_still_meets_the_budget() -> None:
    influence, sizes = {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.5}, dict.fromkeys(range(4), 1000)
    keep = keep_by_entropy(influence, sizes, 1500, 1e-4, dict.fromkeys(range(4), 100))
    assert sum(1000 * share for share in keep.values()) == pytest.approx(1500)


# A whole run ------------------------------------------------------------------------------------------------


def calibrated(name: str, targets: Any = "all-linear", **options: Any) -> Any:
    model = TINY[name].model(torch.float64)
    data = Case("modegpt", name).data(torch.float64)
    return lowrank_ft.wrap(model, "modegpt", data=data, align=1, targets=targets, **options)


@pytest.mark.parametrize("sequential", [False, True])
def test_queries_and_keys_alone(sequential: bool) -> None:
    """OPT's output projection has another name, which the module must know though it stays dense."""
    calibration = {"sequential": sequential}
    model = calibrated("opt", ["q_proj", "k_proj"], recipe="paper", ratio=0.05, calibration=calibration)
    assert isinstance(model.model.decoder.layers[0].self_attn, ResizedAttention)
    assert torch.isfinite(logits(model, TINY["opt"].inputs())).all()
    whole = calibrated("opt", recipe="paper", ratio=0.2, calibration=calibration)
    assert torch.isfinite(logits(whole, TINY["opt"].inputs())).all()


def test_values_may_follow_in_a_second_call(tmp_path: Any) -> None:
    model = calibrated("llama", ["q_proj", "k_proj"], recipe="paper", ratio=0.05)
    data = Case("modegpt", "llama").data(torch.float64)
    lowrank_ft.wrap(
        model, "modegpt", recipe="paper", ratio=0.05, align=1, data=data, targets=["v_proj", "o_proj"]
    )
    attention = model.model.layers[0].self_attn
    assert isinstance(attention.k_proj, Resized)
    assert isinstance(attention.v_proj, Resized)
    lowrank_ft.save(model, tmp_path / "model")
    reloaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.float64)
    batch = TINY["llama"].inputs()
    assert torch.equal(logits(copy.deepcopy(reloaded), batch), logits(model, batch))


def test_a_head_that_was_pruned_is_no_obstacle() -> None:
    model = TINY["llama"].model(torch.float64)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[:8] = 0
    data = Case("modegpt", "llama").data(torch.float64)
    for options in ({"recipe": "paper"}, {"low_rank": False}):
        twin = lowrank_ft.wrap(copy.deepcopy(model), "modegpt", ratio=0.3, align=1, data=data, **options)
        assert torch.isfinite(logits(twin, TINY["llama"].inputs())).all()


def test_every_bias_of_the_stock_model_is_in_the_dense_export(tmp_path: Any) -> None:
    model = calibrated("opt", recipe="paper", ratio=0.3)
    lowrank_ft.export(model, tmp_path / "dense", "dense")
    keys = load_file(tmp_path / "dense" / "model.safetensors").keys()
    TINY["opt"].model().save_pretrained(tmp_path / "stock")
    assert keys == load_file(tmp_path / "stock" / "model.safetensors").keys()


def test_the_entropy_rule_needs_blocks() -> None:
    with pytest.raises(ConfigError, match="has no influence.*allocation='uniform'"):
        calibrated("convnext", recipe="paper", ratio=0.1)
    assert calibrated("convnext", recipe="paper", allocation="uniform", ratio=0.1) is not None


def test_attention_weights_are_refused_not_lost() -> None:
    cut, _ = sliced("llama", queries=True, values=False)
    cut.set_attn_implementation("eager")
    with pytest.raises(StateError, match="attention weights by the class of the stock module"):
        cut(**TINY["llama"].inputs(), output_attentions=True)


def test_mistral_s_window_reaches_the_backend() -> None:
    from transformers import MistralConfig, MistralForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: list[Any] = []

    def spy(module: Any, *tensors: Any, **kwargs: Any) -> Any:
        seen.append(kwargs.get("sliding_window"))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *tensors, **kwargs)

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = MistralForCausalLM(
        MistralConfig(vocab_size=96, num_key_value_heads=2, head_dim=8, sliding_window=4, **sizes)
    )
    attention = model.model.layers[0].self_attn
    model.model.layers[0].self_attn = AttentionNode().build(attention)
    ALL_ATTENTION_FUNCTIONS["spy"] = spy
    try:
        model.config._attn_implementation = "spy"
        model(**TINY["llama"].inputs())
    finally:
        del ALL_ATTENTION_FUNCTIONS["spy"]
    assert seen == [4]


# What cannot be done ----------------------------------------------------------------------------------------


def test_a_part_of_a_module_is_refused() -> None:
    model = TINY["llama"].model()
    with pytest.raises(TargetError, match=r"layers.0.mlp.* belongs to the same module as .*down_proj"):
        lowrank_ft.wrap(model, "modegpt", targets=["down_proj"], data=[])
    with pytest.raises(TargetError, match=r"one of several layers of a module"):
        lowrank_ft.wrap(model, "modegpt", targets=["up_proj"], data=[])


def test_a_family_without_a_layout_is_told_how_to_write_one() -> None:
    model = TINY["llama"].model()
    model.config.model_type = "llamma"
    with pytest.raises(TargetError, match=r"'llamma'.*Did you mean 'llama'.*LAYOUTS\['llamma'\] = Layout\("):
        lowrank_ft.wrap(model, "modegpt", data=[])


def test_normalised_queries_and_keys_are_left_alone_by_the_paper() -> None:
    method = MoDeGPTMethod(PAPER)
    for name, resizable in (("llama", True), ("qwen3", False)):
        model = TINY[name].model()
        roles = {site.role for site in method.sites(model, select(model))}
        assert (QK in roles) is resizable
        assert {MLP, VO} <= roles


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="needs gradients"):
        MoDeGPT(recipe="paper", selection="loss")
    with pytest.raises(ConfigError, match="epsilon must be above 0"):
        MoDeGPT(epsilon=0.0)


def test_an_attention_module_answers_for_the_stock_one() -> None:
    cut, _ = sliced("llama", queries=True, values=True)
    attention = cut.model.layers[0].self_attn
    assert isinstance(attention, ResizedAttention)
    assert attention.layer_idx == 0
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = attention.no_such_thing
    twin = copy.deepcopy(cut)
    assert torch.equal(logits(twin, TINY["llama"].inputs()), logits(cut, TINY["llama"].inputs()))
    assert isinstance(twin.model.layers[0].self_attn.q_proj, Resized)
