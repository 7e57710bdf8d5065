"""Divide one budget among many layers: each layer has options, each option a size and a predicted loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_ft.errors import ConfigError

Handle = Mapping[str, Tensor]  # tensors that options() computed and values() needs again


@dataclass(frozen=True)
class Option:
    """One way to store a layer, or a group of coupled ones.

    Attributes:
        rank: rank of the factors, or the inner width that the group keeps; None for neither.
        size: how much of the budget the option uses (parameters, or bytes).
        loss: the predicted rise of the model's loss, in nats per token where the method predicts it, else an
            error that compares the options of one layer; 0 for a dense layer.
        ranks: for a group whose layers are factored separately, the rank of each, by name; if ``rank`` is set
            too, how it is divided among the widths of a group that has several.
        scheme: how the weights are quantised, if they are: any hashable value.
        measured: the divergence of the model's output with this option alone, in nats per token; None where
            it was not measured.
        handle: tensors by name, shared by all options of a site. The new weights are computed from them
            without a second decomposition.
    """

    rank: int | None
    size: int
    loss: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    scheme: Any = None
    measured: float | None = None
    handle: Handle = field(default_factory=dict, compare=False, repr=False)


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """Choose one option for each layer so that the sizes fit the budget and the sum of losses is small.

    Steps along the layers' lower convex hulls are taken in descending order of loss saved per unit of size,
    which is the Lagrangian solution. The rest of the budget is spent greedily on single changes that fit.

    Args:
        options: each layer's options, at least one; the smallest of every layer must fit together.
        budget: the most that the sizes may add up to.

    Raises:
        ConfigError: the smallest options are above the budget.
    """
    hulls = {name: _hull(choices) for name, choices in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(option.size for option in chosen.values())
    if left < 0:
        raise ConfigError(
            f"The budget of {budget:,} is below {budget - left:,}, the least that these layers can have. Ask "
            f"for a lower ratio, or target more layers."
        )
    steps = [(_gain(low, high), name, high) for name, hull in hulls.items() for low, high in _pairs(hull)]
    full: set[str] = set()
    for _, name, high in sorted(steps, key=lambda step: -step[0]):
        cost = high.size - chosen[name].size
        if name in full or cost > left:
            full.add(name)  # the later steps on this layer's hull start from this one
            continue
        chosen[name], left = high, left - cost
    return _fill(options, chosen, left)


def solve(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """Choose one option for each layer by the integer program ``min Σ loss, Σ size ≤ budget``, with HiGHS.

    Args:
        options: each layer's options, at least one.
        budget: the most that the sizes may add up to.

    Raises:
        ConfigError: the smallest options are above the budget.
    """
    from scipy import optimize, sparse

    relaxed = allocate(options, budget)  # raises if there is no solution
    useful = {name: undominated(choices) for name, choices in options.items()}
    flat = [(name, option) for name, choices in useful.items() for option in choices]
    losses = torch.tensor([option.loss for _, option in flat], dtype=torch.float64)
    sizes = [float(option.size) for _, option in flat]
    row = {name: i for i, name in enumerate(useful)}
    one_per_layer = sparse.csr_array(
        ([1.0] * len(flat), ([row[name] for name, _ in flat], range(len(flat)))), (len(row), len(flat))
    )
    solution = optimize.milp(
        (losses / losses.max().clamp_min(1e-300)).numpy(),
        integrality=[1] * len(flat),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_per_layer, 1, 1),
            optimize.LinearConstraint(sparse.csr_array([sizes]) / budget, -math.inf, 1),
        ],
        options={"mip_rel_gap": 1e-5, "time_limit": 60},
    )
    if solution.x is None:
        raise ConfigError(f"HiGHS found no solution ({solution.message}): use solver='lagrangian'.")
    chosen = {flat[i][0]: flat[i][1] for i, x in enumerate(solution.x) if x > 0.5}
    # HiGHS meets the budget only up to a tolerance.
    over = sum(option.size for option in chosen.values()) > budget
    return relaxed if over else chosen


def same_for_all(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """Choose one scheme and rank for all layers: the pair of the smallest total loss that fits the budget.

    Raises:
        ConfigError: no pair fits.
    """
    kinds: dict[tuple[Any, int | None], dict[str, Option]] = {}
    for name, choices in options.items():
        for option in choices:
            kinds.setdefault((option.scheme, option.rank), {})[name] = option
    fitting = [
        chosen
        for chosen in kinds.values()
        if len(chosen) == len(options) and sum(o.size for o in chosen.values()) <= budget
    ]
    if not fitting:
        raise ConfigError(
            f"No one scheme for all layers fits the budget of {budget:,} bytes: raise the budget."
        )
    return min(fitting, key=lambda chosen: sum(o.loss for o in chosen.values()))


def undominated(choices: Sequence[Option]) -> list[Option]:
    """Return the options that no other option beats in both size and loss, in ascending size."""
    kept: list[Option] = []
    for option in sorted(choices, key=lambda o: (o.size, o.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def combined(layers: Mapping[str, Sequence[Option]]) -> list[Option]:
    """Return options for a group whose layers are factored separately: the hull of all combinations.

    Args:
        layers: each layer's options, by name.

    Returns:
        options with ``ranks``; layers that ``ranks`` does not name stay dense.
    """
    hulls = {name: _hull(choices) for name, choices in layers.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    steps = [(_gain(low, high), name, high) for name, hull in hulls.items() for low, high in _pairs(hull)]
    options = [_sum(chosen)]
    for _, name, high in sorted(steps, key=lambda step: -step[0]):
        chosen[name] = high
        options.append(_sum(chosen))
    return options


def _sum(chosen: Mapping[str, Option]) -> Option:
    ranks = {name: option.rank for name, option in chosen.items() if option.rank is not None}
    size, loss = sum(o.size for o in chosen.values()), sum(o.loss for o in chosen.values())
    return Option(None, size, loss, ranks)


def uniform(
    options: Mapping[str, Sequence[Option]],
    dense: Mapping[str, int],
    budget: int,
    keep: Mapping[str, float] | None = None,
) -> dict[str, Option]:
    """Let every layer keep a share of its dense size, rounded so that the sizes fit the budget.

    Args:
        options: each layer's options.
        dense: each layer's size before compression.
        budget: the most that the sizes may add up to.
        keep: the share that each layer keeps; by default the same for all.

    Raises:
        ConfigError: the smallest options are above the budget.
    """
    even = budget / sum(dense.values())
    target = {name: dense[name] * (even if keep is None else keep[name]) for name in options}
    chosen = {}
    for name, choices in options.items():
        fitting = [option for option in choices if option.size <= target[name]]
        smallest = min(choices, key=lambda option: option.size)
        chosen[name] = max(fitting, key=lambda option: option.size) if fitting else smallest
    left = budget - sum(option.size for option in chosen.values())
    if left < 0:
        raise ConfigError(f"The budget of {budget:,} is below the least these layers can have.")
    # Spend what rounding left of the budget: widen first the layers furthest below their target.
    behind = sorted(options, key=lambda name: chosen[name].size - target[name])
    moved = True
    while moved:
        moved = False
        for name in behind:
            larger = [o for o in options[name] if chosen[name].size < o.size <= chosen[name].size + left]
            if larger:
                step = min(larger, key=lambda option: option.size)
                left -= step.size - chosen[name].size
                chosen[name], moved = step, True
    return chosen


def same_width(
    options: Mapping[str, Sequence[Option]], kinds: Mapping[str, str], budget: int
) -> dict[str, Option]:
    """Give all modules of a kind the same width: the largest share of their widths that fits the budget.

    The rest of the budget is not spent, since it would widen some modules of a kind and not others.

    Args:
        options: each module's options: its full size and smaller widths.
        kinds: each module's kind, by module name.
        budget: the most that the sizes may add up to.

    Raises:
        ConfigError: the smallest widths are above the budget.
    """
    smaller = {name: sorted(o.rank for o in choices if o.rank) for name, choices in options.items()}
    widths = {kind: next((smaller[n] for n in kinds if kinds[n] == kind), []) for kind in kinds.values()}
    steps = sorted({(i + 1) / (len(w) + 1) for w in widths.values() for i in range(len(w))}, reverse=True)
    for share in (1.0, *steps):
        chosen = {}
        for name, choices in options.items():
            kept = math.floor(share * (len(smaller[name]) + 1) + 1e-9)
            by_rank = {option.rank: option for option in choices}
            whole = kept > len(smaller[name])
            fixed = whole or not smaller[name]
            chosen[name] = by_rank[None if fixed else smaller[name][max(kept, 1) - 1]]
        if sum(option.size for option in chosen.values()) <= budget:
            return chosen
    raise ConfigError(
        f"The budget of {budget:,} is below the least that these modules can have. Ask for a lower ratio."
    )


def keep_by_entropy(
    influence: Mapping[int, float],
    sizes: Mapping[int, int],
    budget: int,
    epsilon: float,
    least: Mapping[int, int],
) -> dict[int, float]:
    """Return the share that each block keeps: ``1 − c · softmax(−s/ε)``, with c such that the budget is met.

    Equation 10 of MoDeGPT (arXiv 2408.09632), ``φ = L φ̄ softmax(−s/ε)``, can remove more from a block than it
    has; the excess is removed from the other blocks.

    Args:
        influence: s of each block, by block index.
        sizes: number of parameters of each block.
        budget: how many parameters all blocks together may keep.
        epsilon: ε, the temperature.
        least: the smallest number of parameters that each block can keep.

    Raises:
        ConfigError: the budget is below the sum of ``least``.
    """
    blocks = list(sizes)
    weights = torch.softmax(-torch.tensor([influence[b] for b in blocks], dtype=torch.float64) / epsilon, 0)
    size = torch.tensor([float(sizes[b]) for b in blocks], dtype=torch.float64)
    most = 1 - torch.tensor([least[b] / sizes[b] for b in blocks], dtype=torch.float64)
    remove = float(size.sum()) - budget
    if remove > float((most * size).sum()):
        raise ConfigError(
            f"The budget of {budget:,} is below {sum(least.values()):,}, the least that these modules can "
            f"have. Ask for a lower ratio."
        )
    clipped = torch.zeros(len(blocks), dtype=torch.bool)
    while True:
        rest = remove - float((most * size)[clipped].sum())
        if not (weights * size)[~clipped].sum() > 0:  # with a tiny ε only clipped blocks have any weight
            weights = torch.ones_like(weights)
        phi = torch.where(clipped, most, rest / (weights * size)[~clipped].sum() * weights)
        over = (phi > most) & ~clipped
        if not over.any():
            return dict(zip(blocks, (1 - phi).tolist(), strict=True))
        clipped |= over


def _hull(choices: Sequence[Option]) -> list[Option]:
    """The lower convex hull of the options, in ascending size."""
    hull: list[Option] = []
    for option in sorted(choices, key=lambda o: (o.size, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _pairs(hull: Sequence[Option]) -> Iterator[tuple[Option, Option]]:
    return itertools.pairwise(hull)


def _gain(low: Option, high: Option) -> float:
    """Loss saved per unit of size."""
    return (low.loss - high.loss) / (high.size - low.size) if high.size > low.size else float("inf")


def _fill(options: Mapping[str, Sequence[Option]], chosen: dict[str, Option], left: int) -> dict[str, Option]:
    """Spend what is left of the budget, each time on the change that saves the most loss per unit of size."""
    while True:
        best: tuple[float, str, Option] | None = None
        for name, choices in options.items():
            current = chosen[name]
            for option in choices:
                if current.size < option.size <= current.size + left and option.loss < current.loss:
                    gain = _gain(current, option)
                    if best is None or gain > best[0]:
                        best = (gain, name, option)
        if best is None:
            return chosen
        _, name, option = best
        left -= option.size - chosen[name].size
        chosen[name] = option
