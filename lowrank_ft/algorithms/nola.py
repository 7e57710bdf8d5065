"""NOLA: a LoRA whose factors are combinations of random matrices, so that an adapter is a few kilobytes.

Koohpayegani et al. 2024, arXiv 2310.02556, equation 3: ``A = Σ α_i A_i``, ``B = Σ β_j B_j`` with frozen
random ``A_i: r × in`` and ``B_j: out × r``; only the coefficients α and β are trained and saved. Here the
entries of the random matrices are signs, a pure function of a seed, the layer's name and an index
(:mod:`lowrank_ft.basis.philox`), so the same adapter is bit-identical on every machine.
``basis="uniform"`` draws the paper's uniform entries from the same function.

A frozen random matrix is added to the combination in ``A``, as in the paper's code for language models: with
α and β both zero ``ΔW = 0``, and yet β has a gradient.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from lowrank_ft.algorithms.base import Family, Method, Share, Statistics, generator_for
from lowrank_ft.algorithms.lora import ScaledNode, ScaledOptions
from lowrank_ft.anatomy.sites import Site
from lowrank_ft.basis import philox
from lowrank_ft.basis.combination import Combination
from lowrank_ft.basis.philox import Stream
from lowrank_ft.errors import ConfigError
from lowrank_ft.modules.delta import Delta, LowRankForm
from lowrank_ft.modules.layer import Layer
from lowrank_ft.quant import blockwise
from lowrank_ft.solve.allocation import Handle
from lowrank_ft.structure.registry import register_method, register_node

CoefficientStart = Literal["kaiming", "coefficients"]
Basis = Literal["rademacher", "uniform"]


@dataclass(frozen=True)
class NOLA(ScaledOptions):
    """NOLA: a LoRA made of random matrices, of which only the coefficients are trained and saved."""

    bases: int = 128
    """Number of random matrices in each factor, one coefficient for each: a layer trains twice as many."""
    basis: Basis = "rademacher"
    """Entries of the random matrices: signs, or the paper's uniform ones, which are slower to draw."""
    init: CoefficientStart = "kaiming"
    """Start of A: "kaiming" is a frozen random matrix, with coefficients of zero; "coefficients" has random
    coefficients, and no such matrix. B starts at zero. (For embeddings, A and B are exchanged.)"""
    bits: Literal[32, 16, 8, 4] = 32
    """Bits of a coefficient in a checkpoint; with fewer than 32, evaluation too uses the rounded values."""
    train_rounded: bool = False
    """Use the rounded coefficients in training too; gradients pass through the rounding unchanged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bases < 1:
            raise ConfigError(f"bases must be at least 1, but is {self.bases}.")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"The seed of a basis has 64 bits and no sign, but is {self.seed}.")
        if self.train_rounded and self.bits == 32:
            raise ConfigError("train_rounded has no meaning with bits=32: set bits to 16, 8 or 4.")


@register_node
@dataclass(frozen=True)
class NOLANode(ScaledNode):
    """The structure of a NOLA on one layer."""

    kind: ClassVar[str] = "nola"
    bases: int = 128
    basis: Basis = "rademacher"
    init: CoefficientStart = "kaiming"
    bits: Literal[32, 16, 8, 4] = 32
    train_rounded: bool = False
    seed: int = 0
    version: int = philox.VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version != philox.VERSION:
            raise ConfigError(
                f"The adapter's bases are of version {self.version}, and this package makes version "
                f"{philox.VERSION}: use the release it was saved with."
            )
        if self.bases < 1 or not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"bases={self.bases} or seed={self.seed} is out of range.")

    def delta(self, layer: Layer) -> Delta:
        """Return the NOLA for ``layer``."""
        return NOLADelta(self, layer)


class NOLADelta(Delta):
    """``coefficients_A`` and ``coefficients_B``, ``(bases,)`` each."""

    node: NOLANode

    def __init__(self, node: NOLANode, layer: Layer) -> None:
        super().__init__(node, layer)
        self.coefficients_A = self.new_parameter(node.bases)
        self.coefficients_B = self.new_parameter(node.bases)
        self.dropout = node.dropout
        embedding = layer.kind == "embedding"  # as in PEFT, its A starts at zero, its B standard normal
        kaiming = 1 / math.sqrt(3 * layer.in_features)
        start_A, start_B = (0.0, 1.0) if embedding else (kaiming, 0.0)
        if node.init == "coefficients":
            start_A = start_B = 0.0
        self.A = self._combination("A", (node.rank, layer.in_features), start_A)
        self.B = self._combination("B", (layer.out_features, node.rank), start_B)

    def _combination(self, factor: Literal["A", "B"], shape: tuple[int, int], start: float) -> Combination:
        stream = Stream(self.node.seed, self.layer.name, factor, self.node.basis)
        return Combination(stream, shape, self.node.bases, start)

    def as_lora(self) -> LowRankForm:
        """Return the two factors; they are built once for each step of the optimiser."""
        bits = self.node.bits if self.rounds else 32
        A = self.A.value(self.coefficients_A, bits)
        B = self.B.value(self.coefficients_B, bits)
        return LowRankForm(A, B, self.node.scale)

    @property
    def rounds(self) -> bool:
        """Whether the coefficients are rounded to ``bits`` in the present mode."""
        return self.node.train_rounded or not (self.training and torch.is_grad_enabled())

    def packed(self) -> dict[str, Tensor]:
        """Return the coefficients as a checkpoint stores them, in ``bits`` bits."""
        packed = {}
        for name, values in super().packed().items():
            packed.update(blockwise.pack(name, values, self.node.bits))
        return packed

    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        """Fill the coefficients from the tensors that :meth:`packed` returned."""
        coefficients = self.state_dict().items()
        super().unpack(
            {name: blockwise.unpack(name, packed, self.node.bits, values) for name, values in coefficients}
        )

    @cached_property
    def fingerprint(self) -> bytes:
        """The first block of each factor's first basis matrix."""
        words = [*self.A.stream.first_block(1), *self.B.stream.first_block(1)]
        return struct.pack("<8I", *words)


@register_method
class NOLAMethod(Method[NOLA]):
    """LoRA in a random basis."""

    name = "nola"
    family = Family.ADAPTER
    Config = NOLA

    def structure(self, site: Site, share: Share) -> Mapping[str, NOLANode]:
        """Return one NOLA for each layer."""
        self.config.check_dropout(site)
        name, rank, c = site.names[0], cast(int, share.rank), self.config
        node = NOLANode(
            rank, c.alpha_of(name, rank), c.scaling, c.dropout, c.bases, c.basis, c.init, c.bits,
            c.train_rounded, c.seed,
        )  # fmt: skip
        return {name: node}

    def values(
        self, site: Site, new: Mapping[str, Any], statistics: Statistics, handle: Handle | None = None
    ) -> None:
        """Start with ``ΔW = 0``."""
        delta = cast(NOLADelta, new[site.names[0]])
        filled, zero = delta.coefficients_A, delta.coefficients_B
        if delta.layer.kind == "embedding":
            filled, zero = zero, filled
        with torch.no_grad():
            zero.zero_()
            filled.zero_()
            if self.config.init == "coefficients":
                filled.copy_(
                    torch.randn(len(filled), generator=generator_for(self.config.seed, site.names[0]))
                )
