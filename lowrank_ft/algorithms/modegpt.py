"""MoDeGPT: reduce the inner width of modules, not the rank of layers (Lin et al. 2024, arXiv 2408.09632).

A transformer block has three pairs of matrices with an inner width between them. Each pair has its own
decomposition, which suits the function between the two:

* **MLP** (Nyström). Keep the channels J of the hidden layer, and refit the down projection:
  ``W_down C[:,J] C[J,J]⁻¹``, C the second moment of its input.
* **Q–K** (CR). Keep the same rows of ``W_Q`` and ``W_K`` in a head; with rotary embedding, pairs of rows that
  are rotated together.
* **V–O** (SVD). Change the basis of the values so that the last dimensions of a head matter least, and drop
  these.

The paper's recipe chooses channels by ridge leverage scores and divides the budget among blocks by an entropy
rule on their influence. Ours predicts how much every width of every module raises the loss
(``½ ‖G^½ ΔW C^½‖²``, G the second moment of the gradient at the module's output). Factoring the layers
individually (LoRD) is an alternative, predicted in the same unit. The budget is spent where it raises the
loss least.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lowrank_ft.algorithms import lord
from lowrank_ft.algorithms.base import (
    CompressorConfig,
    Counts,
    Family,
    Method,
    Need,
    Options,
    Share,
    Statistics,
)
from lowrank_ft.algorithms.modegpt_groups import GROUPS, groups_of
from lowrank_ft.anatomy import layouts
from lowrank_ft.anatomy.sites import Site, stock_modules
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.layer import find_layer, layer_of
from lowrank_ft.modules.lowrank import LowRank, low_rank_node, supports_low_rank
from lowrank_ft.modules.resized import Resized
from lowrank_ft.solve.allocation import (
    Handle,
    Option,
    allocate,
    combined,
    keep_by_entropy,
    same_width,
    uniform,
)
from lowrank_ft.solve.factors import Cut
from lowrank_ft.structure.node import Node
from lowrank_ft.structure.registry import register_method


@dataclass(frozen=True)
class MoDeGPT(CompressorConfig):
    """MoDeGPT: remove channels of MLPs and dimensions of attention heads, each by its own decomposition."""

    recipe: Literal["loss", "paper"] = "loss"
    """"loss": spend the budget by predicted loss (needs a backward pass). "paper": choose channels by
    leverage scores, preserve each module's output, and share the budget by an entropy rule (no gradients)."""
    selection: Literal["loss", "leverage", "pivoted"] | None = None
    """How an MLP's channels are chosen: by backward elimination under the loss, by ridge leverage scores (the
    paper), or by pivoted Cholesky. By default "loss" or "leverage", by the recipe."""
    allocation: Literal["loss", "entropy", "uniform"] | None = None
    """How modules share the budget: by predicted loss, by the paper's entropy rule on the blocks' influence,
    or with the same width in every block (which stock checkpoints can hold). By default "loss" or "entropy",
    by the recipe."""
    low_rank: bool = True
    """With allocation by loss: factor the layers of a module individually where that raises the loss less."""
    epsilon: float = 0.1
    """Temperature of the paper's entropy rule; inf removes the same share of every block."""

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
    spending = frozenset({"ratio", "ratio_of", "epsilon"})

    def needs(self) -> frozenset[Need]:
        """Inputs, and for the loss gradients."""
        by_loss = self.config.recipe == "loss"
        return frozenset({Need.INPUT, Need.OUTPUT_GRADIENT} if by_loss else {Need.INPUT})

    def sites(self, model: nn.Module, chosen: list[Site]) -> list[Site]:
        """Group the targeted layers by module; other layers are sites of their own.

        Raises:
            TargetError: no layout for the model's family; a module of which only some layers are targeted.
        """
        layout = layouts.layout_of(model)
        modules = stock_modules(model)
        layers = {site.names[0]: site for site in chosen}
        groups: list[Site] = []
        for name in list(layers):
            for role, names in groups_of(layout, name, modules):
                if name != names[-1]:
                    continue
                parts = [n for n in names if n in layers]
                missing = [n for n in names if n not in layers and find_layer(modules[n]) is not None]
                if missing:
                    raise TargetError(
                        f"{missing[0]} belongs to the same module as {parts[0]}: target both, or neither."
                    )
                groups.append(Site(names, tuple(modules[n] for n in names), role))
        taken = {name for site in groups for name in site.names}
        alone = [site for name, site in layers.items() if name not in taken]
        partial = [s.names[0] for s in alone if any(groups_of(layout, s.names[0], modules))]
        if partial:
            raise TargetError(
                f"{partial[0]} is one of several layers of a module, and the others are not targeted: target "
                f"all of them, or none."
            )
        order = {name: i for i, name in enumerate(modules)}
        return sorted([*groups, *alone], key=lambda site: min(order[n] for n in site.layers))

    def check(self, site: Site) -> None:
        """Refuse layers that are not linear."""
        for name, module in site.layers.items():
            if isinstance(module, Resized):
                raise TargetError(f"{name} is resized already: exclude it, or start from the original model.")
            if not supports_low_rank(layer_of(module, name)):
                raise TargetError(
                    f"{name} is a {type(module).__name__}, which {self.name!r} cannot take apart: exclude it."
                )

    def options(self, site: Site, statistics: Statistics) -> list[Option]:
        """Return the options of a site: unchanged, resized, or with its layers factored individually."""
        config, dense = self.config, size_of(site)
        options, handle = [Option(None, dense, 0.0)], dict[str, Tensor]()
        if site.role in GROUPS:
            resized = GROUPS[site.role](site).options(statistics, config)
            options += resized
            handle.update(resized[0].handle if resized else {})
        if config.shares == "loss" and config.low_rank:
            factored = self._factored(site, statistics)
            options += combined(factored)
            for name, of_layer in factored.items():
                handle.update({f"{name}.{key}": t for key, t in of_layer[-1].handle.items()})
        influence = _influence(site, statistics) if config.shares == "entropy" else None
        if influence is not None:
            handle["influence"] = torch.tensor(influence, dtype=torch.float64)
        small = (1 - config.min_saving) * dense
        return [replace(o, handle=handle) for o in options if o.size == dense or o.size <= small]

    def choose(self, sites: Sequence[Site], options: Options, counts: Counts) -> list[Share]:
        """Spend the budget.

        Raises:
            ConfigError: a budget that these layers cannot meet.
        """
        dense = {site.name: size_of(site) for site in sites}
        budget = self.config.budget(sum(dense.values()), counts)
        if self.config.shares == "loss":
            chosen = allocate(options, budget)
        elif self.config.shares == "entropy":
            chosen = self._by_entropy(sites, options, dense, budget)
        else:
            chosen = same_width(options, {site.name: site.role for site in sites}, budget)
        by_loss = self.config.recipe == "loss"
        return [Share.of(chosen[site.name], predicts=by_loss) for site in sites]

    def structure(self, site: Site, share: Share) -> Mapping[str, Node]:
        """Return resized layers, or factors for individual layers."""
        if share.rank is None:
            layers = {name: layer_of(module) for name, module in site.layers.items()}
            return {
                name: low_rank_node(layers[name], rank, layers[name].bias is not None)
                for name, rank in share.ranks.items()
            }
        return GROUPS[site.role](site).structure(share.rank, share.ranks)

    def values(
        self, site: Site, new: Mapping[str, Any], statistics: Statistics, handle: Handle | None = None
    ) -> Mapping[str, Any]:
        """Fill the modules of :meth:`structure`, and return their errors; for factored layers, by layer."""
        if not any(isinstance(module, LowRank) for module in new.values()):
            return GROUPS[site.role](site).fill(new, statistics, self.config, handle)
        facts = {}
        for name, module in new.items():
            layer, moments = layer_of(site.layers[name]), statistics[name]
            centers = lord.centers(layer)
            if handle:
                target = lord.target_of(layer, moments, centers=centers)
                cut = Cut.of_tensors(target, handle, f"{name}.")
            else:
                cut = lord.decompose(layer, moments, "loss", centers=centers).cut(module.rank)
            facts[name] = lord.fill(cast(LowRank, module), layer, moments, cut, centers=centers)
        return facts

    def _factored(self, site: Site, statistics: Statistics) -> dict[str, list[Option]]:
        """The options of each layer under LoRD with objective="loss"."""
        options = {}
        for name, module in site.layers.items():
            layer = layer_of(module)
            centers = lord.centers(layer)
            decomposed = lord.decompose(layer, statistics[name], "loss", centers=centers)
            options[name] = lord.rank_options(
                layer, decomposed, centers=centers, align=self.config.align, min_saving=0.0
            )
        return options

    def _by_entropy(
        self,
        sites: Sequence[Site],
        options: Mapping[str, Sequence[Option]],
        dense: Mapping[str, int],
        budget: int,
    ) -> dict[str, Option]:
        """Share the budget by the blocks' influence; sites that cannot be resized stay unchanged."""
        fixed = {key: choices[0] for key, choices in options.items() if len(choices) == 1}
        movable = {key: choices for key, choices in options.items() if key not in fixed}
        left = budget - sum(option.size for option in fixed.values())
        block_of = {s.name: layouts.block_index(s.names[0]) or 0 for s in sites if s.name in movable}
        influence = dict.fromkeys(block_of.values(), 0.0)
        if not math.isinf(self.config.epsilon):
            influence = {block_of[name]: _influence_of(name, options) for name in block_of}
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


def size_of(site: Site) -> int:
    """Return how many parameters the dense layers of a site have."""
    return sum(layer_of(module).size for module in site.layers.values())


def _influence(site: Site, statistics: Statistics) -> float | None:
    """The influence of the block that contains a site; None for layers outside the resized groups."""
    return statistics[site.name].influence if site.role in GROUPS else None


def _influence_of(name: str, options: Options) -> float:
    influence = options[name][0].handle.get("influence")
    if influence is None:
        raise ConfigError(
            f"The entropy rule needs the blocks' influence, and the block of {name} has no influence: it is "
            f"in no chain of blocks, or changes its input's shape. Use allocation='uniform' instead."
        )
    return float(influence)
