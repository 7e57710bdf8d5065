"""MoDeGPT: modules lose inner width instead of single layers losing rank (Lin et al. 2024, arXiv 2408.09632).

A transformer block has three pairs of matrices with an inner width between them, and each pair has the
decomposition that fits what lies between:

* **MLP** (Nyström). Keep channels J of the hidden layer, and refit the down projection:
  ``W_down C[:,J] C[J,J]⁻¹``, C the second moment of its input.
* **Q–K** (CR). Keep the same rows of ``W_Q`` and ``W_K`` in a head; with rotary embedding, pairs of rows that
  turn together.
* **V–O** (SVD). Give values a basis in which the last dimensions of a head matter least, and drop them.

The paper's recipe chooses channels by ridge leverage scores and shares the budget between blocks by an
entropy rule on their influence. Ours predicts what every width of every module costs the loss
(``½ ‖G^½ ΔW C^½‖²``, G the second moment of the gradient at the module's output), lets factoring the layers
one by one (LoRD) compete in the same currency, and spends the budget where it costs least.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lowrank_ft import layouts, linalg
from lowrank_ft.algorithms import lord
from lowrank_ft.algorithms.base import CompressorConfig, Counts, Family, Method, Need, Share, Statistics
from lowrank_ft.allocation import Option, allocate, combined, keep_by_entropy, same_width, uniform
from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.layouts import Layout
from lowrank_ft.manifest import Node
from lowrank_ft.modules.attention import AttentionNode
from lowrank_ft.modules.layer import Layer, find_layer, layer_of, stock_linear
from lowrank_ft.modules.lowrank import LowRank, low_rank_node, supports_low_rank
from lowrank_ft.modules.resized import Resized, ResizedNode
from lowrank_ft.registry import register_method
from lowrank_ft.sites import Site, stock_modules

MLP, QK, VO, ATTENTION = "mlp", "q-k", "v-o", "attention"


@dataclass(frozen=True)
class MoDeGPT(CompressorConfig):
    """MoDeGPT: MLPs lose channels, attention heads lose dimensions, each in its own optimal way."""

    recipe: Literal["loss", "paper"] = "loss"
    """Spend the budget by predicted loss (one backward pass), or as published: leverage scores, outputs of
    each module kept, and the entropy rule between blocks (no gradients)."""
    selection: Literal["loss", "leverage", "pivoted"] | None = None
    """How an MLP's channels are chosen: by backward elimination under the loss, by ridge leverage scores (the
    paper), or by pivoted Cholesky. By default as the recipe has it."""
    allocation: Literal["loss", "entropy", "uniform"] | None = None
    """How modules share the budget: by predicted loss, by the paper's entropy rule on the blocks' influence,
    or the same width in every block (which stock checkpoints can hold). By default as the recipe has it."""
    low_rank: bool = True
    """Let the layers of a module be factored one by one instead, where that costs the loss less (with
    allocation by loss)."""
    epsilon: float = 0.1
    """Temperature of the paper's entropy rule; inf gives every block the same share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epsilon > 0:
            raise ConfigError(f"epsilon must be above 0, but is {self.epsilon}.")
        if self.recipe == "paper" and self.selection == "loss":
            raise ConfigError("selection='loss' needs gradients, which recipe='paper' does not gather.")
        if self.recipe == "paper" and self.allocation == "loss":
            raise ConfigError("allocation='loss' needs gradients, which recipe='paper' does not gather.")

    @property
    def shares(self) -> str:
        """How modules share the budget."""
        return self.allocation or {"loss": "loss", "paper": "entropy"}[self.recipe]


@register_method
class MoDeGPTMethod(Method[MoDeGPT]):
    """Modular decomposition of MLPs and attention."""

    name = "modegpt"
    family = Family.COMPRESSOR
    Config = MoDeGPT

    def needs(self) -> frozenset[Need]:
        """Inputs; for the loss, gradients too."""
        by_loss = self.config.recipe == "loss"
        return frozenset({Need.INPUT, Need.OUTPUT_GRADIENT} if by_loss else {Need.INPUT})

    def sites(self, model: nn.Module, chosen: list[Site]) -> list[Site]:
        """Group the targeted layers by module; layers of no module stay sites of their own.

        Raises:
            TargetError: no layout for the model's family; a module of which only a part is targeted.
        """
        layout = layouts.layout_of(model)
        modules = stock_modules(model)
        layers = {site.names[0]: site for site in chosen}
        found: list[Site] = []
        for name in list(layers):
            for role, names in _groups(layout, name, modules):
                if name != names[-1]:
                    continue
                parts = [n for n in names if n in layers]
                missing = [n for n in names if n not in layers and find_layer(modules[n]) is not None]
                if missing:
                    raise TargetError(
                        f"{missing[0]} belongs to the same module as {parts[0]}: target both, or neither."
                    )
                found.append(Site(names, tuple(modules[n] for n in names), role))
        taken = {name for site in found for name in site.names}
        alone = [site for name, site in layers.items() if name not in taken]
        partial = [s.names[0] for s in alone if any(_groups(layout, s.names[0], modules))]
        if partial:
            raise TargetError(
                f"{partial[0]} is one of several layers of a module, and the others are not targeted: target "
                f"all of them, or none."
            )
        order = {name: i for i, name in enumerate(modules)}
        return sorted([*found, *alone], key=lambda site: min(order[n] for n in site.layers))

    def check(self, site: Site) -> None:
        """Refuse layers that are not linear."""
        for name, module in site.layers.items():
            if isinstance(module, Resized):
                raise TargetError(f"{name} is resized already: exclude it, or start from the original model.")
            if not supports_low_rank(layer_of(module, name)):
                raise TargetError(
                    f"{name} is a {type(module).__name__}, which {self.name!r} cannot take apart: exclude it."
                )

    def plan(self, sites: Sequence[Site], statistics: Statistics, counts: Counts) -> list[Share]:
        """Spend the budget.

        Raises:
            ConfigError: a budget that these layers cannot meet.
        """
        dense = {site.name: sum(lord.size_of(layer_of(m)) for m in site.layers.values()) for site in sites}
        budget = self.config.budget(sum(dense.values()), counts)
        options = {site.name: self._options(site, statistics, dense[site.name]) for site in sites}
        if self.config.shares == "loss":
            chosen = allocate(options, budget)
        elif self.config.shares == "entropy":
            chosen = self._by_entropy(sites, options, dense, budget, statistics)
        else:
            chosen = same_width(options, {site.name: site.role for site in sites}, budget)
        by_loss = self.config.recipe == "loss"
        picked = [chosen[site.name] for site in sites]
        return [Share(o.rank, o.loss if by_loss else None, o.ranks) for o in picked]

    def structure(self, site: Site, share: Share) -> Mapping[str, Node]:
        """Return resized layers, or factors for layers one by one."""
        if share.rank is None:
            layers = {name: layer_of(module) for name, module in site.layers.items()}
            return {
                name: low_rank_node(layers[name], rank, layers[name].bias is not None)
                for name, rank in share.ranks.items()
            }
        return _GROUPS[site.role](site).structure(share.rank, share.ranks)

    def values(self, site: Site, new: Mapping[str, Any], statistics: Statistics) -> Mapping[str, Any]:
        """Fill what :meth:`structure` led to, and report what it leaves; of factors, by layer."""
        if any(isinstance(module, LowRank) for module in new.values()):
            facts = {}
            for name, module in new.items():
                layer, known = layer_of(site.layers[name]), statistics[name]
                found, centers = _decomposed(layer, known)
                facts[name] = lord.fill(cast(LowRank, module), layer, known, found, centers=centers)
            return facts
        return _GROUPS[site.role](site).fill(new, statistics, self.config)

    def _options(self, site: Site, statistics: Statistics, dense: int) -> list[Option]:
        """What can become of a site: as it is, resized, or its layers factored one by one."""
        config = self.config
        options = [Option(None, dense, 0.0)]
        if site.role in _GROUPS:
            options += _GROUPS[site.role](site).options(statistics, config)
        if config.shares == "loss" and config.low_rank:
            options += self._factored(site, statistics)
        return [o for o in options if o.size == dense or o.size <= (1 - config.min_saving) * dense]

    def _factored(self, site: Site, statistics: Statistics) -> list[Option]:
        layers = {}
        for name, module in site.layers.items():
            layer = layer_of(module)
            found, centers = _decomposed(layer, statistics[name])
            layers[name] = lord.rank_options(
                layer, found, centers=centers, align=self.config.align, min_saving=0.0
            )
        return combined(layers)

    def _by_entropy(
        self,
        sites: Sequence[Site],
        options: Mapping[str, Sequence[Option]],
        dense: Mapping[str, int],
        budget: int,
        statistics: Statistics,
    ) -> dict[str, Option]:
        """Share the budget by the blocks' influence; what cannot be resized stays as it is."""
        fixed = {key: choices[0] for key, choices in options.items() if len(choices) == 1}
        movable = {key: choices for key, choices in options.items() if key not in fixed}
        left = budget - sum(option.size for option in fixed.values())
        block_of = {s.name: layouts.block_index(s.names[0]) or 0 for s in sites if s.name in movable}
        influence = dict.fromkeys(block_of.values(), 0.0)
        if not math.isinf(self.config.epsilon):
            influence = {block_of[name]: _influence(name, statistics) for name in block_of}
        sizes = {block: sum(dense[key] for key in movable if block_of[key] == block) for block in influence}
        if left <= 0 or not sizes:
            raise ConfigError(
                f"The budget of {budget:,} is below the least that these layers can have: the modules that "
                f"can be resized have {sum(sizes.values()):,} parameters. Ask for a lower ratio."
            )
        least = {
            block: sum(min(o.size for o in movable[key]) for key in movable if block_of[key] == block)
            for block in sizes
        }
        keep = keep_by_entropy(influence, sizes, left, self.config.epsilon, least)
        chosen = uniform(movable, dense, left, {key: keep[block_of[key]] for key in movable})
        return {**fixed, **chosen}


def _decomposed(layer: Layer, known: SiteStatistics) -> tuple[linalg.Decomposition, bool]:
    """A layer as LoRD by loss decomposes it, and whether its bias takes the mean."""
    centers = lord.centers(layer)
    return lord.decompose(layer, known, by_loss=True, centers=centers), centers


def _influence(name: str, statistics: Statistics) -> float:
    found = statistics[name].influence
    if found is None:
        raise ConfigError(
            f"The entropy rule goes by the blocks' influence, and the block of {name} has no influence: it "
            f"is in no chain, or changes its input's shape. Share the budget by allocation='uniform'."
        )
    return found


# Groups -----------------------------------------------------------------------------------------------------


def _groups(
    layout: Layout, name: str, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The groups that a layer is in, each with the names of all its members that the model has.

    The last one named is the one that leads out of the group.
    """
    mlp = layouts.mlp_of(layout, name, modules)
    if mlp:
        yield MLP, mlp
    owner = layouts.attention_of(layout, name, modules)
    if owner is None or layout.attention is None:
        return
    parts, block = layout.attention, owner.removesuffix(layout.attention.name)
    q, k, v, o, qkv = (block + part for part in (parts.q, parts.k, parts.v, parts.o, parts.qkv))
    if parts.qkv:
        yield ATTENTION, (owner, qkv, o)
    if name in (q, k) and not hasattr(modules[owner], "q_norm"):
        yield QK, (owner, q, k)
    if name in (v, o) and not parts.qkv:
        yield VO, (owner, v, o)


Ranks = Mapping[str, int]
_WHOLE: Ranks = {}


class Group(ABC):
    """One module with an inner width: what it can be cut to, what that costs, and how it is done."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.names = list(site.layers)
        self.layers = [layer_of(module) for module in site.layers.values()]
        self.place: dict[str, Any] = {"device": self.layers[0].weight.device}

    def known(self, statistics: Statistics, name: str) -> SiteStatistics:
        """Return what is known of a layer, on the layer's device."""
        found = statistics[name]
        tensors = {what: getattr(found, what) for what in ("C", "mean", "G", "pulled", "G_q", "G_k")}
        return replace(found, **{k: t.to(**self.place) for k, t in tensors.items() if t is not None})

    @abstractmethod
    def structure(self, rank: int, ranks: Ranks = _WHOLE) -> dict[str, Node]:
        """Return what stands at each name when so much of the inner width remains.

        Args:
            rank: the width that remains.
            ranks: how it divides, for a group with several widths.
        """

    @abstractmethod
    def options(self, statistics: Statistics, config: MoDeGPT) -> list[Option]:
        """Return every aligned width below the present one, with its predicted loss."""

    @abstractmethod
    def fill(self, new: Mapping[str, Any], statistics: Statistics, config: MoDeGPT) -> dict[str, Any]:
        """Fill the modules that :meth:`structure` led to, and report what they leave."""


def _size(nodes: Mapping[str, Node]) -> int:
    """Parameters of resized layers."""
    sizes = [n for n in nodes.values() if isinstance(n, ResizedNode)]
    return sum(n.out_features * n.in_features + n.bias * n.out_features for n in sizes)


def _resized(
    layer: Layer, rows: int | None = None, columns: int | None = None, bias: bool | None = None
) -> ResizedNode:
    return ResizedNode(
        layer.out_features if rows is None else rows,
        layer.in_features if columns is None else columns,
        layer.bias is not None if bias is None else bias,
    )


def _matrix(layer: Layer) -> Tensor:
    return layer.matrix().detach().double()


def _pulled(layer: Layer, known: SiteStatistics, config: MoDeGPT) -> Tensor:
    """``Wᵀ G W``, G with its ridge; G is the identity where outputs count alike."""
    if config.recipe == "paper":
        return linalg.pull(_matrix(layer))
    return linalg.pull(_matrix(layer), known.G, known.pulled, linalg.GRADIENT_RIDGE)


def _moment(known: SiteStatistics, centered: bool) -> Tensor:
    return known.C - torch.outer(known.mean, known.mean) if centered else known.C


class Mlp(Group):
    """Channels between up (and gate) and down. Order of layers: gate (if any), up, down."""

    @property
    def down(self) -> Layer:
        """The layer out of the MLP."""
        return self.layers[-1]

    def structure(self, rank: int, ranks: Ranks = _WHOLE) -> dict[str, Node]:
        into = {
            name: _resized(layer, rows=rank * (layer.out_features // self.down.in_features))
            for name, layer in zip(self.names[:-1], self.layers[:-1], strict=True)
        }
        return {**into, self.names[-1]: _resized(self.down, columns=rank)}

    def options(self, statistics: Statistics, config: MoDeGPT) -> list[Option]:
        width = self.down.in_features
        C, K, order = self._order(statistics, config)
        errors = linalg.nystrom_errors(C, K, order)
        step = min(config.align, width)
        kept = range(step, width, step)
        return [Option(k, _size(self.structure(k)), 0.5 * float(errors[k])) for k in kept]

    def fill(self, new: Mapping[str, Any], statistics: Statistics, config: MoDeGPT) -> dict[str, Any]:
        C, K, order = self._order(statistics, config)
        down = cast(Resized, new[self.names[-1]])
        kept = order[: down.in_features].sort().values
        weight = _matrix(self.down)
        refitted, root = linalg.nystrom_refit(weight, C, kept)
        bias = self.down.bias
        if bias is not None and self._centered(config):
            mean = self.known(statistics, self.names[-1]).mean
            bias = bias.double() + weight @ mean - refitted @ mean[kept]
        down.fill(refitted, bias, columns=kept)
        width = self.down.in_features
        for name, layer in zip(self.names[:-1], self.layers[:-1], strict=True):
            parts = layer.out_features // width  # 2 where gate and up are one matrix
            rows = torch.cat([kept + width * part for part in range(parts)])
            new[name].fill(layer.matrix()[rows], None if layer.bias is None else layer.bias[rows], rows=rows)
        error = linalg.nystrom_errors(C, K, order)
        total = float(error[0])
        return {
            "relative error": math.sqrt(float(error[len(kept)]) / total) if total else 0.0,
            "output error": lord.output_error(weight, weight.index_add(1, kept, -refitted), C),
            "spectrum": lord.thinned(-error.diff() / total) if total else [],  # what each channel adds
            "tokens": statistics[self.names[-1]].tokens,
            "ridge": root.ridge,
            "condition": root.condition,
            "factored": root.method,
        }

    def _centered(self, config: MoDeGPT) -> bool:
        return config.recipe == "loss" and self.down.bias is not None

    def _order(self, statistics: Statistics, config: MoDeGPT) -> tuple[Tensor, Tensor, Tensor]:
        """The channels' second moment, what they are worth, and their order, the dearest first."""
        known = self.known(statistics, self.names[-1])
        C, K = _moment(known, self._centered(config)), _pulled(self.down, known, config)
        selection = config.selection or {"loss": "loss", "paper": "leverage"}[config.recipe]
        if selection == "leverage":
            return C, K, linalg.leverage_scores(C).argsort(descending=True, stable=True)
        if selection == "pivoted":
            return C, K, linalg.pivoted_order(C)
        return C, K, linalg.elimination_order(C, K, max(1, len(C) // 96))


class Heads(Group):
    """What Q–K and V–O share: the geometry of the heads."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.attention = site.modules[0]
        self.width = layouts.head_width(self.attention)
        self.rotary = _attention(self.attention).rotary

    def _with_attention(self, layers: dict[str, Node]) -> dict[str, Node]:
        parts = _attention(self.attention)
        q, k, v, o = (_inside(parts, part) for part in (parts.q, parts.k, parts.v, parts.o))
        return {self.site.names[0]: AttentionNode(q, k, v, o), **layers}


def _attention(module: nn.Module) -> layouts.Attention:
    found = layouts.LAYOUTS[cast(Any, module).config.model_type].attention
    assert found is not None
    return found


def _inside(attention: layouts.Attention, part: str) -> str:
    """The name of a projection in the module that attends; empty where it stands outside."""
    name = part.removeprefix(f"{attention.name}.")
    return "" if name == part else name


class QueryKey(Heads):
    """Dimensions of queries and keys, the same in a key head and in the query heads that read it.

    They go by units: pairs of rows ``(j, j + h/2)`` where positions turn them together, else single rows.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.q, self.k = self.layers
        self.key_heads = self.k.out_features // self.width
        self.group = self.q.out_features // self.k.out_features
        self.unit = 2 if self.rotary else 1
        self.units = self.width // self.unit

    def structure(self, rank: int, ranks: Ranks = _WHOLE) -> dict[str, Node]:
        rows = self.key_heads * rank
        q, k = _resized(self.q, rows=rows * self.group), _resized(self.k, rows=rows)
        return self._with_attention({self.names[0]: q, self.names[1]: k})

    def options(self, statistics: Statistics, config: MoDeGPT) -> list[Option]:
        if config.recipe == "loss" and any(statistics[name].G is None for name in self.names):
            return []  # more outputs than inputs: the gradient's moments by row were not kept
        order, H = self._order(statistics, config)
        step = max(self.unit, min(config.align, self.width) // self.unit * self.unit)
        heads = torch.arange(self.key_heads, **self.place)[:, None]
        found = []
        for rank in range(step, self.width, step):
            out = (heads * self.units + order[:, rank // self.unit :]).flatten()
            loss = 0.5 * float(H[out][:, out].sum())
            found.append(Option(rank, _size(self.structure(rank)), max(loss, 0.0)))
        return found

    def fill(self, new: Mapping[str, Any], statistics: Statistics, config: MoDeGPT) -> dict[str, Any]:
        order, _ = self._order(statistics, config)
        rank = new[self.names[1]].out_features // self.key_heads
        units = order[:, : rank // self.unit].sort(1).values
        dims = torch.cat([units + part * self.units for part in range(self.unit)], 1)  # (key heads, rank)
        for name, layer, copies in ((self.names[0], self.q, self.group), (self.names[1], self.k, 1)):
            of_head = dims.repeat_interleave(copies, 0)
            rows = (torch.arange(len(of_head), **self.place)[:, None] * self.width + of_head).flatten()
            bias = None if layer.bias is None else layer.bias[rows]
            new[name].fill(layer.matrix()[rows], bias, rows=rows)
        return {"tokens": statistics[self.names[0]].tokens}

    def _order(self, statistics: Statistics, config: MoDeGPT) -> tuple[Tensor, Tensor]:
        """The units of each key head, the dearest first, ``(key heads, units)``; and what they cost.

        The cost of leaving units R out is ``½ Σ H[R,R]``. A dimension that q lacks is as good as one that k
        lacks, so both sides' gradients predict it: H is the mean of ``G_q ∘ C_q`` and ``G_k ∘ C_k``, summed
        over the rows of each unit.
        """
        q, k = (self._moment(n, layer, statistics) for n, layer in zip(self.names, self.layers, strict=True))
        if config.recipe == "paper":
            scores = [self._by_unit(torch.diag(C.diagonal())).diagonal() for C in (q, k)]
            score = scores[0] * scores[1]  # (C_Q,jj + C_Q,j'j') (C_K,jj + C_K,j'j'), summed over the group
            order = score.view(self.key_heads, self.units).argsort(dim=1, descending=True, stable=True)
            return order, torch.diag(score)
        G_q, G_k = (self._gradient(self.known(statistics, name)) for name in self.names)
        H = 0.5 * (self._by_unit(G_q * q) + self._by_unit(G_k * k))
        orders = []
        for head in range(self.key_heads):
            mine = slice(head * self.units, (head + 1) * self.units)
            orders.append(_cheapest_first(H[mine, mine]).flip(0))
        return torch.stack(orders), H

    def _moment(self, name: str, layer: Layer, statistics: Statistics) -> Tensor:
        """The second moment of a projection's output, before any rotation."""
        known, W = self.known(statistics, name), _matrix(layer)
        C = W @ known.C @ W.T
        if layer.bias is not None:
            bias, shift = layer.bias.detach().double(), W @ known.mean
            C = C + torch.outer(shift, bias) + torch.outer(bias, shift + bias)
        return C

    @staticmethod
    def _gradient(known: SiteStatistics) -> Tensor:
        assert known.G is not None
        return linalg.with_ridge(known.G, linalg.GRADIENT_RIDGE * float(known.G.diagonal().mean()))

    def _by_unit(self, matrix: Tensor) -> Tensor:
        """Add up the rows and columns of each unit, over the heads of a group."""
        rows = torch.arange(len(matrix), **self.place)
        heads = rows // (len(matrix) // self.key_heads)
        S = matrix.new_zeros(len(matrix), self.key_heads * self.units)
        S[rows, heads * self.units + rows % self.units] = 1.0
        return S.T @ matrix @ S


def _cheapest_first(H: Tensor) -> Tensor:
    """Return indices in the order in which leaving them out, one more each time, costs ``Σ H[R,R]`` least."""
    cost, order = H.diagonal().clone(), []
    for _ in range(len(H)):
        pick = int(cost.argmin())
        order.append(pick)
        cost = cost + 2 * H[:, pick]
        cost[order] = math.inf
    return torch.tensor(order, device=H.device)


class ValueOutput(Heads):
    """Dimensions of values. Each key head's values get a basis of their own, of which the first ones stay."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.v, self.o = self.layers
        self.key_heads = self.v.out_features // self.width
        self.heads = self.o.in_features // self.width
        self.group = self.heads // self.key_heads

    def structure(self, rank: int, ranks: Ranks = _WHOLE) -> dict[str, Node]:
        bias = self.v.bias is not None or self.o.bias is not None  # softmax rows add up to one
        v = _resized(self.v, rows=self.key_heads * rank, bias=False)
        o = _resized(self.o, columns=self.heads * rank, bias=bias)
        return self._with_attention({self.names[0]: v, self.names[1]: o})

    def options(self, statistics: Statistics, config: MoDeGPT) -> list[Option]:
        _, _, C, K = self._turned(statistics, config)
        errors = self._errors(C, K)
        step = min(config.align, self.width)
        ranks = range(step, self.width, step)
        return [Option(rank, _size(self.structure(rank)), 0.5 * float(errors[rank])) for rank in ranks]

    def fill(self, new: Mapping[str, Any], statistics: Statistics, config: MoDeGPT) -> dict[str, Any]:
        rank = new[self.names[0]].out_features // self.key_heads
        T, W, C, K = self._turned(statistics, config)
        known = self.known(statistics, self.names[1])
        first = torch.arange(self.width, **self.place) < rank
        rows, columns = (first.repeat(heads).nonzero().flatten() for heads in (self.key_heads, self.heads))
        # Each key head's T stands once for every query head of its group.
        own = _diagonal_blocks(T, self.heads)[:: self.group, :rank]
        new[self.names[0]].fill(_block_diagonal(own) @ _matrix(self.v), rows=rows)
        out = linalg.nystrom_refit(W, C, columns)[0] if config.recipe == "loss" else W[:, columns]
        bias = self._output_bias(_matrix(self.o), out @ T[columns], known, config)
        new[self.names[1]].fill(out, bias, columns=columns)
        errors = self._errors(C, K)
        total = float(errors[0])
        return {
            "relative error": math.sqrt(float(errors[rank]) / total) if total else 0.0,
            "tokens": known.tokens,
        }

    def _output_bias(
        self, weight: Tensor, kept: Tensor, known: SiteStatistics, config: MoDeGPT
    ) -> Tensor | None:
        """O's bias: its own, V's carried through (softmax rows add up to one), and the mean error.

        With ``z`` the attention's output and ``b`` V's bias in it, ``y = W z`` becomes ``W' P (z − b)``; the
        paper's ``b_O + W b`` is exact where nothing is left out.
        """
        if self.v.bias is None and self.o.bias is None:
            return None
        bias = weight.new_zeros(self.o.out_features)
        if self.o.bias is not None:
            bias += self.o.bias
        carried = weight.new_zeros(self.o.in_features)
        if self.v.bias is not None:
            per_head = self.v.bias.double().view(self.key_heads, self.width)
            carried = per_head.repeat_interleave(self.group, 0).flatten()
        if config.recipe == "paper":
            return bias + weight @ carried
        return bias + weight @ known.mean - kept @ (known.mean - carried)

    def _output_moment(self, known: SiteStatistics) -> Tensor:
        return _moment(known, self.v.bias is not None or self.o.bias is not None)

    def _bases(self, statistics: Statistics, config: MoDeGPT) -> tuple[Tensor, Tensor]:
        """For each key head T and T⁻¹, ``(key heads, h, h)``: T's first rows are the dimensions to keep.

        With N the second moment of the head's values, ``N = L Lᵀ``, and K what the output projections of its
        query heads do with them, T is ``Aᵀ L⁻¹`` for A the eigenvectors of ``Lᵀ K L``: the joint optimum over
        the group for one N. The paper takes N from the projection (no bias), we from what attention gives.
        """
        known = self.known(statistics, self.names[1])
        across = _diagonal_blocks(_pulled(self.o, known, config), self.heads)
        K = across.view(self.key_heads, self.group, self.width, self.width).sum(1)
        if config.recipe == "loss":
            own = _diagonal_blocks(self._output_moment(known), self.heads)
            N = own.view(self.key_heads, self.group, self.width, self.width).mean(1)
        else:
            V = _matrix(self.v).view(self.key_heads, self.width, -1)
            N = V @ self.known(statistics, self.names[0]).C @ V.mT
        forward, backward = [], []
        for n, k in zip(N, K, strict=True):
            if not n.trace() > 0:  # a head that was pruned: any basis will do
                n = torch.eye(self.width, dtype=n.dtype, device=n.device)
            root = linalg.factor_spd(n)
            _, A = linalg.eigenpairs(root.lower.T @ k @ root.lower, self.width)
            forward.append(root.solve_transposed(A).T)
            backward.append(root.lower @ A)
        return torch.stack(forward), torch.stack(backward)

    def _turned(self, statistics: Statistics, config: MoDeGPT) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All heads' bases on one diagonal, T; in them O's weight, its input's moment, and ``Wᵀ G W``."""
        forward, backward = self._bases(statistics, config)
        known = self.known(statistics, self.names[1])
        T, back = (_block_diagonal(bases.repeat_interleave(self.group, 0)) for bases in (forward, backward))
        C, K = T @ self._output_moment(known) @ T.T, back.T @ _pulled(self.o, known, config) @ back
        return T, _matrix(self.o) @ back, C, K

    def _errors(self, C: Tensor, K: Tensor) -> Tensor:
        """The weighted error of each rank, ``(h + 1,)``."""
        by_rank = torch.arange(len(C), **self.place).view(self.heads, self.width).T.flatten()
        return linalg.nystrom_errors(C, K, by_rank)[:: self.heads]


class FusedAttention(Group):
    """Q–K and V–O together, where one matrix gives queries, keys and values; each has its own width.

    Both are done on the rows of that matrix as if they were layers, and put together again.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.attention = site.modules[0]
        self.qkv, self.o = self.layers
        self.split = layouts.split_of(self.attention, self.qkv.out_features)
        q, k, v = (_part(self.qkv, rows) for rows in self._rows())
        self.parts = {"q": q, "k": k, "v": v}
        self.qk = QueryKey(Site(("", "q", "k"), (self.attention, q, k), QK))
        self.vo = ValueOutput(Site(("", "v", "o"), (self.attention, v, self.o.module), VO))
        self.width = self.qk.width

    def structure(self, rank: int, ranks: Ranks = _WHOLE) -> dict[str, Node]:
        """Return the nodes for ``ranks[QK]`` and ``ranks[VO]``, of which ``rank`` is the sum."""
        nodes = self._nodes(ranks)
        sizes = tuple(cast(ResizedNode, nodes[part]).out_features for part in self.parts)
        parts = _attention(self.attention)
        node = AttentionNode("", "", "", _inside(parts, parts.o), _inside(parts, parts.qkv), sizes)
        found: dict[str, Node] = {
            self.site.names[0]: node,
            self.names[0]: _resized(self.qkv, rows=sum(sizes)),
        }
        if ranks[VO] < self.width:
            found[self.names[1]] = nodes["o"]
        return found

    def _nodes(self, ranks: Ranks) -> dict[str, Node]:
        """The parts as layers of their own."""
        nodes: dict[str, Node] = {name: _resized(layer_of(part)) for name, part in self.parts.items()}
        if ranks[QK] < self.width:
            nodes |= self.qk.structure(ranks[QK])
        if ranks[VO] < self.width:
            nodes |= self.vo.structure(ranks[VO])
        return nodes

    def options(self, statistics: Statistics, config: MoDeGPT) -> list[Option]:
        known = self._known(statistics)
        qk, vo = self.qk.options(known, config), self.vo.options(known, config)
        if config.shares == "loss":
            whole = [Option(None, sum(map(lord.size_of, g.layers)), 0.0) for g in (self.qk, self.vo)]
            pairs = combined({QK: [whole[0], *qk], VO: [whole[1], *vo]})
            ranks = [{QK: self.width, VO: self.width, **pair.ranks} for pair in pairs]
            losses = [pair.loss for pair in pairs]
        else:  # what either leaves out is measured on a scale of its own: the same width for both
            widths = [a.rank for a in qk if a.rank in {b.rank for b in vo}]
            ranks = [{QK: cast(int, rank), VO: cast(int, rank)} for rank in widths]
            losses = [0.0] * len(ranks)
        return [
            Option(sum(pair.values()), self._size(pair), loss, pair)
            for pair, loss in zip(ranks, losses, strict=True)
            if sum(pair.values()) < 2 * self.width
        ]

    def _size(self, ranks: Ranks) -> int:
        nodes = self.structure(0, ranks)
        kept = 0 if self.names[1] in nodes else lord.size_of(self.o)
        return _size(nodes) + kept

    def fill(self, new: Mapping[str, Any], statistics: Statistics, config: MoDeGPT) -> dict[str, Any]:
        known, ranks = self._known(statistics), self._ranks(new)
        nodes = self._nodes(ranks)
        built: dict[str, Any] = {name: nodes[name].build(part) for name, part in self.parts.items()}
        for name, part in self.parts.items():  # what is whole stays as it is; the rest is filled below
            if built[name].rows is None:
                built[name].fill(layer_of(part).matrix(), layer_of(part).bias)
        facts: dict[str, Any] = {"tokens": known["q"].tokens}
        if ranks[QK] < self.width:
            self.qk.fill(built, known, config)
        if ranks[VO] < self.width:
            facts |= self.vo.fill({**built, "o": new[self.names[1]]}, known, config)
        biases, rows = [], []
        for layer, outputs in zip(built.values(), self._rows(), strict=True):
            biases.append(layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias)
            rows.append(outputs if layer.rows is None else outputs[layer.rows])
        weight = torch.cat([layer.weight for layer in built.values()])
        new[self.names[0]].fill(weight, torch.cat(biases), torch.cat(rows))
        return {**facts, "ranks": ranks}

    def _rows(self) -> tuple[Tensor, ...]:
        """Which outputs of the one matrix are queries, keys and values."""
        return torch.split(torch.arange(sum(self.split), **self.place), list(self.split))

    def _ranks(self, new: Mapping[str, Any]) -> dict[str, int]:
        """The widths that the new modules have."""
        heads = self.o.in_features // self.width
        vo = new[self.names[1]].in_features // heads if self.names[1] in new else self.width
        key_heads = self.qk.key_heads
        left = new[self.names[0]].out_features - key_heads * vo
        return {QK: left // (heads + key_heads), VO: vo}

    def _known(self, statistics: Statistics) -> dict[str, SiteStatistics]:
        """What is known of the parts, as of layers."""
        both = statistics[self.names[0]]
        q, k = (replace(both, G=G, pulled=None, G_q=None, G_k=None) for G in (both.G_q, both.G_k))
        return {"q": q, "k": k, "v": both, "o": statistics[self.names[1]]}


def _part(layer: Layer, rows: Tensor) -> nn.Module:
    """Some outputs of a layer as a layer of their own, on the same memory."""
    first, count = int(rows[0]), len(rows)
    bias = None if layer.bias is None else layer.bias.detach().narrow(0, first, count)
    return stock_linear("linear", layer.matrix().detach().narrow(0, first, count), bias)


def _diagonal_blocks(matrix: Tensor, count: int) -> Tensor:
    """Return the blocks on the diagonal, ``(count, n / count, n / count)``."""
    blocks = matrix.view(count, len(matrix) // count, count, len(matrix) // count)
    return torch.stack([blocks[i, :, i] for i in range(count)])


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Return ``(n·a, n·b)`` from blocks ``(n, a, b)``."""
    n, a, b = blocks.shape
    return torch.einsum(
        "nab,nm->namb", blocks, torch.eye(n, dtype=blocks.dtype, device=blocks.device)
    ).reshape(n * a, n * b)


_GROUPS: dict[str, type[Group]] = {MLP: Mlp, QK: QueryKey, VO: ValueOutput, ATTENTION: FusedAttention}
