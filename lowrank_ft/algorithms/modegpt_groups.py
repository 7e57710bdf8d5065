"""The groups of layers that MoDeGPT resizes: the options of each, and the filling of its new layers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from lowrank_ft import solve
from lowrank_ft.algorithms import lord
from lowrank_ft.algorithms.base import Statistics
from lowrank_ft.anatomy import layouts
from lowrank_ft.anatomy.layouts import Layout
from lowrank_ft.anatomy.sites import Site
from lowrank_ft.calibration.statistics import SiteStatistics
from lowrank_ft.modules.attention import AttentionNode
from lowrank_ft.modules.layer import Layer, layer_of, stock_linear
from lowrank_ft.modules.resized import Resized, ResizedNode
from lowrank_ft.solve.allocation import (
    Handle,
    Option,
    combined,
)
from lowrank_ft.structure import heads
from lowrank_ft.structure.node import Node


class Cutting(Protocol):
    """The fields that a group reads of :class:`~lowrank_ft.algorithms.modegpt.MoDeGPT`."""

    @property
    def recipe(self) -> Literal["loss", "paper"]:
        """How errors are weighed."""

    @property
    def selection(self) -> Literal["loss", "leverage", "pivoted"] | None:
        """How an MLP's channels are chosen."""

    @property
    def align(self) -> int:
        """Widths are multiples of this."""

    @property
    def shares(self) -> str:
        """How modules share the budget."""


MLP, QK, VO, ATTENTION = "mlp", "q-k", "v-o", "attention"


def groups_of(
    layout: Layout, name: str, modules: Mapping[str, nn.Module]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the groups that contain a layer: the role of each, and the names of its members in the model.

    The last name is that of the layer whose output leaves the group.
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
    """A group of layers with an inner width: its options, and the filling of its resized layers."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.names = list(site.layers)
        self.layers = [layer_of(module) for module in site.layers.values()]
        self.device = self.layers[0].weight.device

    def moments_of(self, statistics: Statistics, name: str) -> SiteStatistics:
        """Return the statistics of a layer, on the layer's device."""
        moments = statistics[name]
        tensors = {what: getattr(moments, what) for what in ("C", "mean", "G", "WtGW", "G_q", "G_k")}
        return replace(moments, **{k: t.to(self.device) for k, t in tensors.items() if t is not None})

    @abstractmethod
    def structure(self, rank: int, ranks: Ranks = _WHOLE) -> dict[str, Node]:
        """Return the nodes of the group's layers for a reduced inner width.

        Args:
            rank: the width that remains.
            ranks: the parts of ``rank`` by width, for a group with several widths.
        """

    @abstractmethod
    def options(self, statistics: Statistics, config: Cutting) -> list[Option]:
        """Return every aligned width below the present one, with its predicted loss.

        All options share one handle: the tensors that :meth:`fill` would otherwise compute again.
        """

    @abstractmethod
    def fill(
        self,
        new: Mapping[str, Any],
        statistics: Statistics,
        config: Cutting,
        handle: Handle | None = None,
    ) -> dict[str, Any]:
        """Fill the modules that were built from :meth:`structure`, and report their errors.

        Args:
            new: the modules, by name.
            statistics: the layers' moments.
            config: the method's options.
            handle: the handle of the options for the same statistics; None to compute its tensors again.
        """


def _size(nodes: Mapping[str, Node]) -> int:
    """The number of parameters of resized layers."""
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


def _weighted_gram(layer: Layer, moments: SiteStatistics, config: Cutting) -> Tensor:
    """``Wᵀ G W``, with a ridge on G; in the paper's recipe G is the identity."""
    if config.recipe == "paper":
        return solve.gram_under(_matrix(layer))
    return solve.gram_under(_matrix(layer), moments.G, moments.WtGW, solve.GRADIENT_RIDGE)


def _moment(moments: SiteStatistics, centered: bool) -> Tensor:
    """The second moment of a layer's input, or its covariance."""
    return moments.C - torch.outer(moments.mean, moments.mean) if centered else moments.C


class Mlp(Group):
    """The channels of an MLP. Order of layers: gate (if any), up, down."""

    @property
    def down(self) -> Layer:
        """The down projection, whose output leaves the MLP."""
        return self.layers[-1]

    def structure(self, rank: int, ranks: Ranks = _WHOLE) -> dict[str, Node]:
        into = {
            name: _resized(layer, rows=rank * (layer.out_features // self.down.in_features))
            for name, layer in zip(self.names[:-1], self.layers[:-1], strict=True)
        }
        return {**into, self.names[-1]: _resized(self.down, columns=rank)}

    def options(self, statistics: Statistics, config: Cutting) -> list[Option]:
        width, handle = self.down.in_features, self._order(statistics, config)
        errors, step = handle["errors"], min(config.align, width)
        return [
            Option(k, _size(self.structure(k)), 0.5 * float(errors[k]), handle=handle)
            for k in range(step, width, step)
        ]

    def fill(
        self,
        new: Mapping[str, Any],
        statistics: Statistics,
        config: Cutting,
        handle: Handle | None = None,
    ) -> dict[str, Any]:
        handle = handle or self._order(statistics, config)
        order, error = (handle[key].to(self.device) for key in ("order", "errors"))
        C, down = self._channels(statistics, config), cast(Resized, new[self.names[-1]])
        kept = order[: down.in_features].sort().values
        weight = _matrix(self.down)
        refitted, root = solve.nystrom_refit(weight, C, kept)
        bias = self.down.bias
        if bias is not None and self._centered(config):
            mean = self.moments_of(statistics, self.names[-1]).mean
            bias = bias.double() + weight @ mean - refitted @ mean[kept]
        down.fill(refitted, bias, columns=kept)
        width = self.down.in_features
        for name, layer in zip(self.names[:-1], self.layers[:-1], strict=True):
            parts = layer.out_features // width  # 2 where gate and up are one matrix
            rows = torch.cat([kept + width * part for part in range(parts)])
            new[name].fill(layer.matrix()[rows], None if layer.bias is None else layer.bias[rows], rows=rows)
        total = float(error[0])
        return {
            "relative error": math.sqrt(float(error[len(kept)]) / total) if total else 0.0,
            "output error": lord.output_error(weight, weight.index_add(1, kept, -refitted), C),
            # The share of the error that each channel removes.
            "spectrum": lord.thinned(-error.diff() / total) if total else [],
            "tokens": statistics[self.names[-1]].tokens,
            "ridge": root.ridge,
            "condition": root.condition,
            "factored": root.method,
        }

    def _centered(self, config: Cutting) -> bool:
        return config.recipe == "loss" and self.down.bias is not None

    def _channels(self, statistics: Statistics, config: Cutting) -> Tensor:
        """The channels' second moment."""
        return _moment(self.moments_of(statistics, self.names[-1]), self._centered(config))

    def _order(self, statistics: Statistics, config: Cutting) -> dict[str, Tensor]:
        """The channels' ``order``, most important first, and the ``errors`` of keeping 0, 1, … of them."""
        C = self._channels(statistics, config)
        K = _weighted_gram(self.down, self.moments_of(statistics, self.names[-1]), config)
        selection = config.selection or {"loss": "loss", "paper": "leverage"}[config.recipe]
        if selection == "leverage":
            order = solve.leverage_scores(C).argsort(descending=True, stable=True)
        elif selection == "pivoted":
            order = solve.pivoted_order(C)
        else:
            order = solve.elimination_order(C, K, max(1, len(C) // 96))
        return {"order": order, "errors": solve.nystrom_errors(C, K, order)}


class Heads(Group):
    """Base of Q–K and V–O: the geometry of the attention heads."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.attention = site.modules[0]
        self.width = heads.head_width(self.attention)
        self.rotary = _attention(self.attention).rotary

    def _with_attention(self, layers: dict[str, Node]) -> dict[str, Node]:
        parts = _attention(self.attention)
        q, k, v, o = (_inside(parts, part) for part in (parts.q, parts.k, parts.v, parts.o))
        return {self.site.names[0]: AttentionNode(q, k, v, o), **layers}


def _attention(module: nn.Module) -> layouts.Attention:
    attention = layouts.LAYOUTS[cast(Any, module).config.model_type].attention
    assert attention is not None
    return attention


def _inside(attention: layouts.Attention, part: str) -> str:
    """The name of a projection inside the attention module; empty if the projection is outside it."""
    name = part.removeprefix(f"{attention.name}.")
    return "" if name == part else name


class QueryKey(Heads):
    """Dimensions of queries and keys: a key head and the query heads that use it lose the same ones.

    They are removed in units: with rotary embedding, pairs of rows ``(j, j + h/2)``, otherwise single rows.
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

    def options(self, statistics: Statistics, config: Cutting) -> list[Option]:
        if config.recipe == "loss" and any(statistics[name].G is None for name in self.names):
            return []  # G was not kept, since the layer has more outputs than inputs
        order, H = self._order(statistics, config)
        step = max(self.unit, min(config.align, self.width) // self.unit * self.unit)
        heads = torch.arange(self.key_heads, device=self.device)[:, None]
        options = []
        for rank in range(step, self.width, step):
            removed = (heads * self.units + order[:, rank // self.unit :]).flatten()
            loss = 0.5 * float(H[removed][:, removed].sum())
            options.append(Option(rank, _size(self.structure(rank)), max(loss, 0.0), handle={"order": order}))
        return options

    def fill(
        self,
        new: Mapping[str, Any],
        statistics: Statistics,
        config: Cutting,
        handle: Handle | None = None,
    ) -> dict[str, Any]:
        order = handle["order"].to(self.device) if handle else self._order(statistics, config)[0]
        rank = new[self.names[1]].out_features // self.key_heads
        units = order[:, : rank // self.unit].sort(1).values
        dims = torch.cat([units + part * self.units for part in range(self.unit)], 1)  # (key heads, rank)
        for name, layer, copies in ((self.names[0], self.q, self.group), (self.names[1], self.k, 1)):
            of_head = dims.repeat_interleave(copies, 0)
            rows = (torch.arange(len(of_head), device=self.device)[:, None] * self.width + of_head).flatten()
            bias = None if layer.bias is None else layer.bias[rows]
            new[name].fill(layer.matrix()[rows], bias, rows=rows)
        return {"tokens": statistics[self.names[0]].tokens}

    def _order(self, statistics: Statistics, config: Cutting) -> tuple[Tensor, Tensor]:
        """The units of each key head, most important first, ``(key heads, units)``; and H, their costs.

        Removing the units R costs ``½ Σ H[R,R]``. Removing a dimension of the queries has the same effect as
        removing it from the keys, so the gradients of both predict the cost: H is the mean of ``G_q ∘ C_q``
        and ``G_k ∘ C_k``, summed over the rows of each unit.
        """
        q, k = (self._moment(n, layer, statistics) for n, layer in zip(self.names, self.layers, strict=True))
        if config.recipe == "paper":
            scores = [self._by_unit(torch.diag(C.diagonal())).diagonal() for C in (q, k)]
            score = scores[0] * scores[1]  # (C_Q,jj + C_Q,j'j') (C_K,jj + C_K,j'j'), summed over the group
            order = score.view(self.key_heads, self.units).argsort(dim=1, descending=True, stable=True)
            return order, torch.diag(score)
        G_q, G_k = (self._gradient(self.moments_of(statistics, name)) for name in self.names)
        H = 0.5 * (self._by_unit(G_q * q) + self._by_unit(G_k * k))
        orders = []
        for head in range(self.key_heads):
            in_head = slice(head * self.units, (head + 1) * self.units)
            orders.append(_cheapest_first(H[in_head, in_head]).flip(0))
        return torch.stack(orders), H

    def _moment(self, name: str, layer: Layer, statistics: Statistics) -> Tensor:
        """The second moment of a projection's output, before any rotation."""
        moments, W = self.moments_of(statistics, name), _matrix(layer)
        C = W @ moments.C @ W.T
        if layer.bias is not None:
            bias, shift = layer.bias.detach().double(), W @ moments.mean
            C = C + torch.outer(shift, bias) + torch.outer(bias, shift + bias)
        return C

    @staticmethod
    def _gradient(moments: SiteStatistics) -> Tensor:
        assert moments.G is not None
        return solve.with_ridge(moments.G, solve.GRADIENT_RIDGE * float(moments.G.diagonal().mean()))

    def _by_unit(self, matrix: Tensor) -> Tensor:
        """Sum the rows and columns of each unit, over the query heads of a key head."""
        rows = torch.arange(len(matrix), device=self.device)
        heads = rows // (len(matrix) // self.key_heads)
        S = matrix.new_zeros(len(matrix), self.key_heads * self.units)
        S[rows, heads * self.units + rows % self.units] = 1.0
        return S.T @ matrix @ S


def _cheapest_first(H: Tensor) -> Tensor:
    """Return indices in the order of greedy removal: each next one raises ``Σ H[R,R]`` least."""
    cost, order = H.diagonal().clone(), []
    for _ in range(len(H)):
        pick = int(cost.argmin())
        order.append(pick)
        cost = cost + 2 * H[:, pick]
        cost[order] = math.inf
    return torch.tensor(order, device=H.device)


class ValueOutput(Heads):
    """Dimensions of values. The values of each key head get a new basis, and keep its first dimensions."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.v, self.o = self.layers
        self.key_heads = self.v.out_features // self.width
        self.heads = self.o.in_features // self.width
        self.group = self.heads // self.key_heads

    def structure(self, rank: int, ranks: Ranks = _WHOLE) -> dict[str, Node]:
        # Attention weights add up to one, so V's bias can move into O's.
        bias = self.v.bias is not None or self.o.bias is not None
        v = _resized(self.v, rows=self.key_heads * rank, bias=False)
        o = _resized(self.o, columns=self.heads * rank, bias=bias)
        return self._with_attention({self.names[0]: v, self.names[1]: o})

    def options(self, statistics: Statistics, config: Cutting) -> list[Option]:
        handle = self._bases_and_errors(statistics, config)
        errors, step = handle["errors"], min(config.align, self.width)
        return [
            Option(rank, _size(self.structure(rank)), 0.5 * float(errors[rank]), handle=handle)
            for rank in range(step, self.width, step)
        ]

    def fill(
        self,
        new: Mapping[str, Any],
        statistics: Statistics,
        config: Cutting,
        handle: Handle | None = None,
    ) -> dict[str, Any]:
        rank = new[self.names[0]].out_features // self.key_heads
        handle = handle or self._bases_and_errors(statistics, config)
        errors = handle["errors"]
        T, back = self._on_diagonal(handle)
        moments = self.moments_of(statistics, self.names[1])
        W, C = _matrix(self.o) @ back, T @ self._output_moment(moments) @ T.T
        first = torch.arange(self.width, device=self.device) < rank
        rows, columns = (first.repeat(heads).nonzero().flatten() for heads in (self.key_heads, self.heads))
        # T repeats each key head's basis for every query head of its group.
        by_key_head = _diagonal_blocks(T, self.heads)[:: self.group, :rank]
        new[self.names[0]].fill(_block_diagonal(by_key_head) @ _matrix(self.v), rows=rows)
        out = solve.nystrom_refit(W, C, columns)[0] if config.recipe == "loss" else W[:, columns]
        bias = self._output_bias(_matrix(self.o), out @ T[columns], moments, config)
        new[self.names[1]].fill(out, bias, columns=columns)
        total = float(errors[0])
        return {
            "relative error": math.sqrt(float(errors[rank]) / total) if total else 0.0,
            "tokens": moments.tokens,
        }

    def _output_bias(
        self, weight: Tensor, kept: Tensor, moments: SiteStatistics, config: Cutting
    ) -> Tensor | None:
        """O's new bias: its own bias, V's bias multiplied by W, and the mean error.

        Attention weights add up to one, so V's bias ``b`` is added to the attention's output ``z`` unchanged.
        ``y = W z`` becomes ``W' P (z − b)``; the paper's ``b_O + W b`` is exact if no dimension is removed.
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
        return bias + weight @ moments.mean - kept @ (moments.mean - carried)

    def _output_moment(self, moments: SiteStatistics) -> Tensor:
        return _moment(moments, self.v.bias is not None or self.o.bias is not None)

    def _bases(self, statistics: Statistics, config: Cutting) -> tuple[Tensor, Tensor]:
        """For each key head T and T⁻¹, ``(key heads, h, h)``: T's first rows are the dimensions to keep.

        With ``N = L Lᵀ`` the second moment of the head's values, and K the sum of ``W_Oᵀ G W_O`` over its
        query heads, T is ``Aᵀ L⁻¹`` for A the eigenvectors of ``Lᵀ K L``: the joint optimum over the group
        for one N. The paper takes N from V's outputs without bias, we from the attention's outputs.
        """
        moments = self.moments_of(statistics, self.names[1])
        by_head = _diagonal_blocks(_weighted_gram(self.o, moments, config), self.heads)
        K = by_head.view(self.key_heads, self.group, self.width, self.width).sum(1)
        if config.recipe == "loss":
            by_head = _diagonal_blocks(self._output_moment(moments), self.heads)
            N = by_head.view(self.key_heads, self.group, self.width, self.width).mean(1)
        else:
            V = _matrix(self.v).view(self.key_heads, self.width, -1)
            N = V @ self.moments_of(statistics, self.names[0]).C @ V.mT
        forward, backward = [], []
        for n, k in zip(N, K, strict=True):
            if not n.trace() > 0:  # this head was pruned: any basis will do
                n = torch.eye(self.width, dtype=n.dtype, device=n.device)
            root = solve.factor_spd(n)
            _, A = solve.eigenpairs(root.lower.T @ k @ root.lower, self.width)
            forward.append(root.solve_transposed(A).T)
            backward.append(root.lower @ A)
        return torch.stack(forward), torch.stack(backward)

    def _bases_and_errors(self, statistics: Statistics, config: Cutting) -> dict[str, Tensor]:
        """The bases T (``forward``) and T⁻¹ (``backward``), and the weighted ``errors`` of every width.

        Errors are ``(h + 1,)``, for 0, 1, … dimensions in each head.
        """
        forward, backward = self._bases(statistics, config)
        bases = {"forward": forward, "backward": backward}
        T, back = self._on_diagonal(bases)
        moments = self.moments_of(statistics, self.names[1])
        C, K = T @ self._output_moment(moments) @ T.T, back.T @ _weighted_gram(self.o, moments, config) @ back
        by_rank = torch.arange(len(C), device=self.device).view(self.heads, self.width).T.flatten()
        return {**bases, "errors": solve.nystrom_errors(C, K, by_rank)[:: self.heads]}

    def _on_diagonal(self, bases: Handle) -> tuple[Tensor, Tensor]:
        """All query heads' bases, and their inverses, as two block-diagonal matrices."""
        forward, backward = (bases[way].to(self.device) for way in ("forward", "backward"))
        return tuple(_block_diagonal(b.repeat_interleave(self.group, 0)) for b in (forward, backward))  # type: ignore[return-value]


class FusedAttention(Group):
    """Q–K and V–O together, if one layer computes queries, keys and values. Each has its own width.

    The layer is split into separate layers for queries, keys and values, whose results are concatenated.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.attention = site.modules[0]
        self.qkv, self.o = self.layers
        self.split = heads.split_of(self.attention, self.qkv.out_features)
        q, k, v = (_part(self.qkv, rows) for rows in self._rows())
        self.parts = {"q": q, "k": k, "v": v}
        self.qk = QueryKey(Site(("", "q", "k"), (self.attention, q, k), QK))
        self.vo = ValueOutput(Site(("", "v", "o"), (self.attention, v, self.o.module), VO))
        self.width = self.qk.width

    def structure(self, rank: int, ranks: Ranks = _WHOLE) -> dict[str, Node]:
        """Return the nodes for the widths ``ranks[QK]`` and ``ranks[VO]``; ``rank``, their sum, is unused."""
        nodes = self._nodes(ranks)
        sizes = tuple(cast(ResizedNode, nodes[part]).out_features for part in self.parts)
        parts = _attention(self.attention)
        node = AttentionNode("", "", "", _inside(parts, parts.o), _inside(parts, parts.qkv), sizes)
        nodes_of_group: dict[str, Node] = {
            self.site.names[0]: node,
            self.names[0]: _resized(self.qkv, rows=sum(sizes)),
        }
        if ranks[VO] < self.width:
            nodes_of_group[self.names[1]] = nodes["o"]
        return nodes_of_group

    def _nodes(self, ranks: Ranks) -> dict[str, Node]:
        """The nodes of queries, keys and values as separate layers, and of O if it is resized."""
        nodes: dict[str, Node] = {name: _resized(layer_of(part)) for name, part in self.parts.items()}
        if ranks[QK] < self.width:
            nodes |= self.qk.structure(ranks[QK])
        if ranks[VO] < self.width:
            nodes |= self.vo.structure(ranks[VO])
        return nodes

    def options(self, statistics: Statistics, config: Cutting) -> list[Option]:
        moments = self._moments_of_parts(statistics)
        qk, vo = self.qk.options(moments, config), self.vo.options(moments, config)
        if config.shares == "loss":
            uncut = [Option(None, sum(layer.size for layer in g.layers), 0.0) for g in (self.qk, self.vo)]
            pairs = combined({QK: [uncut[0], *qk], VO: [uncut[1], *vo]})
            ranks = [{QK: self.width, VO: self.width, **pair.ranks} for pair in pairs]
            losses = [pair.loss for pair in pairs]
        else:  # without gradients the two errors cannot be compared, so both get the same width
            widths = [a.rank for a in qk if a.rank in {b.rank for b in vo}]
            ranks = [{QK: cast(int, rank), VO: cast(int, rank)} for rank in widths]
            losses = [0.0] * len(ranks)
        handle = {
            f"{role}.{key}": tensor
            for role, options in ((QK, qk), (VO, vo))
            for key, tensor in (options[0].handle if options else {}).items()
        }
        return [
            Option(sum(pair.values()), self._size(pair), loss, pair, handle=handle)
            for pair, loss in zip(ranks, losses, strict=True)
            if sum(pair.values()) < 2 * self.width
        ]

    def _size(self, ranks: Ranks) -> int:
        nodes = self.structure(0, ranks)
        kept = 0 if self.names[1] in nodes else self.o.size
        return _size(nodes) + kept

    def fill(
        self,
        new: Mapping[str, Any],
        statistics: Statistics,
        config: Cutting,
        handle: Handle | None = None,
    ) -> dict[str, Any]:
        moments, ranks = self._moments_of_parts(statistics), self._ranks(new)
        nodes = self._nodes(ranks)
        built: dict[str, Any] = {name: nodes[name].build(part) for name, part in self.parts.items()}
        for name, part in self.parts.items():  # an uncut part is copied here; cut parts are filled below
            if built[name].rows is None:
                built[name].fill(layer_of(part).matrix(), layer_of(part).bias)
        facts: dict[str, Any] = {"tokens": moments["q"].tokens}
        if ranks[QK] < self.width:
            self.qk.fill(built, moments, config, _within(handle, QK))
        if ranks[VO] < self.width:
            facts |= self.vo.fill({**built, "o": new[self.names[1]]}, moments, config, _within(handle, VO))
        biases, rows = [], []
        for layer, outputs in zip(built.values(), self._rows(), strict=True):
            biases.append(layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias)
            rows.append(outputs if layer.rows is None else outputs[layer.rows])
        weight = torch.cat([layer.weight for layer in built.values()])
        new[self.names[0]].fill(weight, torch.cat(biases), torch.cat(rows))
        return {**facts, "ranks": ranks}

    def _rows(self) -> tuple[Tensor, ...]:
        """The indices of the layer's outputs that are queries, keys and values."""
        return torch.split(torch.arange(sum(self.split), device=self.device), list(self.split))

    def _ranks(self, new: Mapping[str, Any]) -> dict[str, int]:
        """The widths of the new modules."""
        heads = self.o.in_features // self.width
        vo = new[self.names[1]].in_features // heads if self.names[1] in new else self.width
        key_heads = self.qk.key_heads
        left = new[self.names[0]].out_features - key_heads * vo
        return {QK: left // (heads + key_heads), VO: vo}

    def _moments_of_parts(self, statistics: Statistics) -> dict[str, SiteStatistics]:
        """The statistics of queries, keys and values as separate layers, and of O."""
        both = statistics[self.names[0]]
        q, k = (replace(both, G=G, WtGW=None, G_q=None, G_k=None) for G in (both.G_q, both.G_k))
        return {"q": q, "k": k, "v": both, "o": statistics[self.names[1]]}


def _within(handle: Handle | None, role: str) -> Handle | None:
    """The tensors of a handle that belong to one role, without the role in their names."""
    if not handle:
        return None
    return {key.removeprefix(f"{role}."): t for key, t in handle.items() if key.startswith(f"{role}.")}


def _part(layer: Layer, rows: Tensor) -> nn.Module:
    """A separate layer with consecutive outputs of a layer, whose memory it shares."""
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


GROUPS: dict[str, type[Group]] = {MLP: Mlp, QK: QueryKey, VO: ValueOutput, ATTENTION: FusedAttention}
