"""Deltas: the update that one adapter adds to one layer. A new adapter method needs a node and a delta."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ft.modules.layer import ConvLayer, Layer, layer_of
from lowrank_ft.structure.node import Node


class LowRankForm(NamedTuple):
    """An update written as a LoRA: ``ΔW = scale · B A``.

    Attributes:
        A: ``(rank, in)``.
        B: ``(out, rank)``.
        scale: factor on the product.
    """

    A: Tensor
    B: Tensor
    scale: float


class DeltaNode(Node):
    """The structure of an adapter on one layer.

    Unlike other nodes it replaces nothing: the engine attaches the delta to the layer's host.
    """

    def build(self, module: nn.Module, name: str = "") -> Delta:
        """Return the delta for the layer ``module``, with parameters allocated but not filled."""
        return self.delta(layer_of(module, name))

    @abstractmethod
    def delta(self, layer: Layer) -> Delta:
        """Return the delta for ``layer``."""


class Delta(nn.Module):
    """An update ``ΔW`` of one layer's weight, trained while the weight is frozen.

    A subclass overrides :meth:`as_lora` if the update has a low-rank form (the fused kernel, merging and
    export then need no more code), else :meth:`weight`.

    Attributes:
        node: the structure this delta was built from.
        layer: the view of the adapted layer, for its shapes and its forward.
        dropout: probability of dropping an element of the delta's input in training.
        rescales: whether :meth:`gain` is ever not None.
        carries: whether the delta holds a part of the layer's original weight, so that it must stay active.
    """

    dropout: float = 0.0
    rescales: bool = False
    carries: bool = False

    def __init__(self, node: DeltaNode, layer: Layer) -> None:
        super().__init__()
        self.node = node
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return ``ΔW x`` for the layer's input ``x``."""
        form = self.as_lora()
        x = self.drop(x)
        if form is None:
            return self.layer.run_matrix(x, self.weight())
        return self.layer.run_factors(x, form.A, form.B * form.scale)

    def joins_weight(self, x: Tensor) -> bool:
        """Whether adding ``ΔW`` to the weight and running the layer once is less work than running both.

        Backward then computes a gradient of the weight's size. That pays for small weights, such as those of
        grouped convolutions.

        Args:
            x: the layer's input.
        """
        return isinstance(self.layer, ConvLayer) and self.layer.groups > 1

    def weight(self) -> Tensor:
        """Return ``ΔW``, ``out × in``, computed in float32 at least, even from half-precision factors."""
        form = self.as_lora()
        if form is None:
            raise TypeError(f"{type(self).__name__} must override as_lora() or weight().")
        A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in form[:2])
        return (B @ A) * form.scale

    def as_lora(self) -> LowRankForm | None:
        """Return the exact low-rank form of the update, differentiable, or None if it has none."""
        return None

    def gain(self) -> Tensor | None:
        """Return a factor for each row of ``W + ΔW``, ``(out,)`` (DoRA); None if they are all 1."""
        return None

    def packed(self) -> dict[str, Tensor]:
        """Return the tensors to save in an adapter checkpoint; by default the whole state dict."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items()}

    @torch.no_grad()
    def unpack(self, packed: Mapping[str, Tensor]) -> None:
        """Fill the delta with the tensors that :meth:`packed` returned."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(packed[name])

    @property
    def fingerprint(self) -> bytes:
        """Bytes that identify data which the update needs and checkpoints do not store; empty by default.

        A checkpoint records their digest and refuses to load when the digest has changed.
        """
        return b""

    def drop(self, x: Tensor) -> Tensor:
        """Return ``x`` after this delta's dropout; ``x`` itself outside training."""
        return F.dropout(x, self.dropout, self.training) if self.drops else x

    @property
    def drops(self) -> bool:
        """Whether dropout is active: its probability is not 0, and the delta is in training mode."""
        return self.dropout > 0 and self.training

    def new_parameter(self, *shape: int) -> nn.Parameter:
        """Return an unfilled parameter on the layer's device, in the layer's dtype or at least float32.

        Half-precision weights get float32 adapters, since bfloat16 would round the optimiser's small steps
        away. They are cast to the compute dtype in the forward.
        """
        return nn.Parameter(self.new_tensor(*shape))

    def new_tensor(self, *shape: int) -> Tensor:
        """Return an unfilled tensor with the device and dtype of :meth:`new_parameter`."""
        weight = self.layer.weight
        half = weight.dtype in (torch.float16, torch.bfloat16)
        return torch.empty(*shape, dtype=torch.float32 if half else weight.dtype, device=weight.device)


def digest_of(parts: Mapping[str, nn.Module]) -> str | None:
    """Return the SHA-256 of the fingerprints of an adapter's parts, by name; None if all are empty."""
    fingerprints = {name: part.fingerprint for name, part in parts.items() if isinstance(part, Delta)}
    if not any(fingerprints.values()):
        return None
    return hashlib.sha256(b"".join(fingerprints[name] for name in sorted(fingerprints))).hexdigest()
