"""LoRA, and its variants with another scale, another start or a rescaled weight.

``ΔW = scale · B A`` with ``A: r × in``, ``B: out × r`` and ``scale = α/r`` (Hu et al. 2021, arXiv
2106.09685, section 4.1) or ``α/√r`` (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732, theorem 3.2).

DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5): ``W' = m ∘ (W + ΔW) / ‖W + ΔW‖``, one magnitude for
each row of the ``out × in`` matrix, the norm treated as a constant in the gradient (section 4.3).

PiSSA (Meng et al. 2024, arXiv 2404.02948, equations 2–4) starts from the leading singular triples of W,
OLoRA (Büyükakyüz 2024, arXiv 2406.01775) from its QR factors. The papers subtract the start from the
base. Here the base stays unchanged: a frozen copy ``B₀ A₀`` of the start is kept, and the delta is
``scale · (B A − B₀ A₀)``. It trains as the papers' form does, is exactly zero at the start, and other
adapters can use the same base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lowrank_ft import solve
from lowrank_ft.algorithms.base import (
    FactorType,
    Family,
    LowRankConfig,
    Method,
    Share,
    Statistics,
    generator_for,
)
from lowrank_ft.anatomy.sites import Site, check_patterns, lookup
from lowrank_ft.errors import ConfigError, TargetError
from lowrank_ft.modules.delta import Delta, DeltaNode, LowRankForm
from lowrank_ft.modules.layer import Layer, layer_of
from lowrank_ft.solve.allocation import Handle
from lowrank_ft.structure.registry import register_method, register_node

Scaling = Literal["standard", "rslora"]
Start = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"]


@dataclass(frozen=True)
class ScaledOptions(LowRankConfig):
    """Options of every update that is a scaled product of two factors."""

    alpha: float | None = None
    """The update is multiplied by alpha/rank (or alpha/√rank). By default alpha is the rank."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Exceptions to `alpha`: from name, name ending, glob or "re:…" to alpha; the first match counts."""
    scaling: Scaling = "standard"
    """"standard" is alpha/rank; "rslora" is alpha/√rank, so that large ranks learn as fast as small ones."""
    dropout: float = 0.0
    """Probability of dropping an element of the update's input in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        alphas = [*self.alpha_pattern.values(), *([] if self.alpha is None else [self.alpha])]
        if not all(math.isfinite(alpha) and alpha > 0 for alpha in alphas):
            raise ConfigError(f"alpha must be positive and finite, but is among {alphas}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), but is {self.dropout}.")

    def check_patterns(self, sites: Sequence[Site]) -> None:
        """Raise ``TargetError`` for a pattern that matches no site."""
        check_patterns(self.alpha_pattern, [name for site in sites for name in site.names], "alpha_pattern")
        super().check_patterns(sites)

    def alpha_of(self, name: str, rank: int) -> float:
        """Return alpha for the layer ``name`` of that rank."""
        default = float(rank) if self.alpha is None else self.alpha
        return lookup(self.alpha_pattern, name, default)

    def check_dropout(self, site: Site) -> None:
        """Raise ``TargetError`` if dropout cannot act on a layer's input."""
        if layer_of(site.modules[0]).kind == "embedding" and self.dropout > 0:
            raise TargetError(
                f"{site.names[0]} is an Embedding, whose input cannot be dropped. Exclude it, or set "
                f"dropout=0."
            )


@dataclass(frozen=True)
class LoRAOptions(ScaledOptions):
    """Options of every adapter that is a LoRA, with any start."""

    dora: bool = False
    """Train a magnitude for each output as well (DoRA)."""

    def node(self, site: Site, rank: int, *, anchored: bool) -> LoRANode:
        """Return the structure of a LoRA on a site.

        Raises:
            TargetError: dropout on an embedding.
        """
        self.check_dropout(site)
        alpha = self.alpha_of(site.names[0], rank)
        return LoRANode(rank, alpha, self.scaling, self.dropout, self.dora, anchored)


@dataclass(frozen=True)
class LoRA(LoRAOptions):
    """LoRA: a trained low-rank update of each frozen weight."""

    init: Start = "kaiming"
    """Start of A, with B at zero: "kaiming" (uniform), "gaussian" or "orthogonal". Or of both factors, from
    the weight: "pissa" (its leading singular triples) or "olora" (its QR factors)."""


@dataclass(frozen=True)
class ScaledNode(DeltaNode):
    """The structure of a scaled product of two factors."""

    rank: int
    alpha: float
    scaling: Scaling = "standard"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"The rank must be at least 1, but is {self.rank}.")

    @property
    def scale(self) -> float:
        """The factor on ``B A``."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)


@register_node
@dataclass(frozen=True)
class LoRANode(ScaledNode):
    """The structure of a LoRA on one layer."""

    kind: ClassVar[str] = "lora"
    dora: bool = False
    anchored: bool = False  # the delta is measured from a frozen start, B₀ A₀
    carries: bool = False  # the LoRA holds part of the layer's weight, so the layer needs it
    dtype: FactorType = "auto"  # of the factors; "auto" is the layer's, but never half precision

    def delta(self, layer: Layer) -> Delta:
        """Return the LoRA for ``layer``."""
        return LoRADelta(self, layer)


class LoRADelta(Delta):
    """``A: (rank, in)``, ``B: (out, rank)``; anchored also ``A0``, ``B0``; DoRA also ``magnitude (out,)``."""

    node: LoRANode
    A0: Tensor
    B0: Tensor

    def __init__(self, node: LoRANode, layer: Layer) -> None:
        super().__init__(node, layer)
        shape_A, shape_B = (node.rank, layer.in_features), (layer.out_features, node.rank)
        self.A = self.new_parameter(*shape_A)
        self.B = self.new_parameter(*shape_B)
        if node.anchored:
            self.register_buffer("A0", self.new_tensor(*shape_A))
            self.register_buffer("B0", self.new_tensor(*shape_B))
        if node.dora:
            self.magnitude = self.new_parameter(layer.out_features)
        if node.dtype != "auto":
            self.to(getattr(torch, node.dtype))
        self.dropout = node.dropout
        self.rescales, self.carries = node.dora, node.carries

    @torch.no_grad()
    def start_from(self, B: Tensor, A: Tensor) -> None:
        """Fill the factors and their frozen copies, so that the delta is zero and measured from there.

        Args:
            B: ``(out, rank)``.
            A: ``(rank, in)``.
        """
        for tensor, values in ((self.A, A), (self.B, B), (self.A0, A), (self.B0, B)):
            tensor.copy_(values)
        if self.node.dora:
            self.magnitude.copy_(self.row_norms())

    def as_lora(self) -> LowRankForm:
        """Return ``(A, B)``; anchored, the exact form of rank 2r.

        ``B A − B₀ A₀ = (B − B₀) A + B₀ (A − A₀)``: both terms are exactly zero at the start, whereas the
        difference of the two products could leave rounding errors.
        """
        if not self.node.anchored:
            return LowRankForm(self.A, self.B, self.node.scale)
        A = torch.cat([self.A, self.A - self.A0])
        B = torch.cat([self.B - self.B0, self.B0], dim=1)
        return LowRankForm(A, B, self.node.scale)

    def gain(self) -> Tensor | None:
        """Return ``m / ‖W + ΔW‖`` by rows; the norm carries no gradient."""
        return self.magnitude / self.row_norms() if self.node.dora else None

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """Return ``‖W + scale · B A‖`` by rows, ``(out,)``, without forming the sum.

        ``‖w‖² + 2 scale ⟨w A ᵀ, b⟩ + scale² b (A Aᵀ) bᵀ``: out · in · r products and no ``out × in``
        temporary.
        """
        A, B, scale = self.as_lora()
        W = self.layer.matrix()
        squares = torch.linalg.vector_norm(W, dim=1, dtype=A.dtype).square()
        cross = ((W @ A.T.to(W.dtype)).to(A.dtype) * B).sum(1)
        own = ((B @ (A @ A.T)) * B).sum(1)
        total: Tensor = squares + 2 * scale * cross + scale**2 * own
        return total.clamp_min(torch.finfo(total.dtype).tiny).sqrt()


@register_method
class LoRAMethod(Method[LoRA]):
    """LoRA and its variants."""

    name = "lora"
    family = Family.ADAPTER
    Config = LoRA

    def structure(self, site: Site, share: Share) -> Mapping[str, LoRANode]:
        """Return one LoRA for each layer."""
        anchored = self.config.init in ("pissa", "olora")
        return {site.names[0]: self.config.node(site, cast(int, share.rank), anchored=anchored)}

    def values(
        self, site: Site, new: Mapping[str, Any], statistics: Statistics, handle: Handle | None = None
    ) -> None:
        """Start with ``ΔW = 0``."""
        (name,) = site.names
        delta = cast(LoRADelta, new[name])
        layer = layer_of(site.modules[0])
        with torch.no_grad():
            if delta.node.anchored:
                _start_from_weight(delta, layer.matrix(), self.config.init)
                return
            _start_at_random(delta, layer, self.config.init, generator_for(self.config.seed, name))
            if delta.node.dora:
                delta.magnitude.copy_(delta.row_norms())


def _start_at_random(delta: LoRADelta, layer: Layer, start: Start, generator: torch.Generator) -> None:
    """Fill one factor at random and the other with zeros: B, or for embeddings A, as in PEFT."""
    filled, zero = (delta.B, delta.A) if layer.kind == "embedding" else (delta.A, delta.B)
    shape = filled.shape
    values = torch.empty(shape)
    if layer.kind == "embedding":
        values.normal_(generator=generator)
    elif start == "kaiming":  # uniform in ±1/√in, as nn.Linear starts
        bound = 1 / math.sqrt(shape[1])
        values.uniform_(-bound, bound, generator=generator)
    elif start == "gaussian":
        values.normal_(std=1 / shape[0], generator=generator)
    else:
        nn.init.orthogonal_(values, generator=generator)
    filled.copy_(values)
    zero.zero_()


def _start_from_weight(delta: LoRADelta, W: Tensor, start: Start) -> None:
    """Fill both factors, and the frozen start, from W: its leading singular triples, or its QR factors."""
    rank, scale = delta.node.rank, delta.node.scale
    if start == "pissa":
        U, S, Vt = solve.truncated_svd(W, rank)
        root = (S / scale).sqrt()
        B, A = U * root, root[:, None] * Vt
    else:  # OLoRA leaves the scale out: its base loses scale · Q R
        B, A = solve.thin_qr(W, rank)
    delta.start_from(B, A)
