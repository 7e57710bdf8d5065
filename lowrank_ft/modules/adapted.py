"""A layer with any number of adapters, some of them active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lowrank_ft.errors import StateError
from lowrank_ft.modules.delta import Delta, DeltaNode, LowRankForm
from lowrank_ft.modules.fused import low_rank_linear
from lowrank_ft.modules.host import Host
from lowrank_ft.modules.layer import layer_of
from lowrank_ft.structure.node import DenseNode, Node
from lowrank_ft.structure.registry import register_node
from lowrank_ft.structure.replacement import Factored


@register_node
@dataclass(frozen=True)
class AdaptedNode(Node):
    """A layer (``base``: dense or compressed) with named adapters (``deltas``)."""

    kind: ClassVar[str] = "adapted"
    deltas: Mapping[str, DeltaNode]
    base: Node = field(default_factory=DenseNode)

    def build(self, module: nn.Module, name: str = "") -> Adapted:
        """Build the base, and attach the deltas to it."""
        host = Adapted(self.base.build(module, name))
        for adapter, node in self.deltas.items():
            host.attach(adapter, node, node.build(host.base, name))
        return host


class Adapted(Host):
    """``y = gain ∘ (W x + Σ ΔW x) + b`` over the active adapters.

    Attributes:
        base: the layer; its weight is never changed.
        parts: the adapters by name.
        active: names of the adapters that the forward uses.
    """

    nodes: dict[str, DeltaNode]  # type: ignore[assignment]

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base, like=layer_of(base).weight)
        self.layer = layer_of(base)

    def structure(self) -> AdaptedNode:
        """Return the node of this layer, its adapters in the order they were attached."""
        return AdaptedNode(dict(self.nodes), self.base_node())

    @property
    def deltas(self) -> dict[str, Delta]:
        """The adapters by name."""
        return {name: cast(Delta, part) for name, part in self.parts.items()}

    def check_active(self, names: Sequence[str]) -> None:
        """Refuse two active adapters if one rescales the whole weight, since their updates do not add up."""
        rescaling = [n for n in names if n in self.parts and self.deltas[n].rescales]
        if rescaling and len(names) > 1:
            raise StateError(
                f"The adapter {rescaling[0]!r} rescales the whole weight (DoRA), so it cannot be active "
                f"together with {[n for n in names if n != rescaling[0]]}. Activate one at a time."
            )

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer with its active adapters."""
        deltas = cast("tuple[Delta, ...]", self.running)
        if not deltas:
            return cast(Tensor, self.base(x))
        out = self._fused(x, deltas)
        if out is None:
            out = self._joined(x, deltas)
        if out is None:
            out = self.base(x)
            for delta in deltas:
                out = out + delta(x)
        gain = deltas[0].gain()
        return out if gain is None else self._rescale(out, gain)

    def merged(self) -> nn.Module:
        """Return the layer with the active updates added to its weight in float32, rounded once.

        A factored layer stays factored, with a larger rank, if every update is low-rank.
        """
        deltas = cast("tuple[Delta, ...]", self.running)
        if not deltas:
            return self.base
        with torch.no_grad():
            if isinstance(self.base, Factored) and not deltas[0].rescales:
                forms = [form for delta in deltas if (form := delta.as_lora()) is not None]
                if len(forms) == len(deltas):
                    A, B, scale = _summed(forms)
                    return self.base.widened(B * scale, A)
            weight = self.layer.matrix()
            total = weight.to(torch.promote_types(weight.dtype, torch.float32))
            for delta in deltas:
                total = total + delta.weight().to(total.dtype)
                gain = delta.gain()
                if gain is not None:
                    total = total * gain.to(total.dtype)[:, None]
            return self.layer.clone_with(total.to(weight.dtype))

    def _fused(self, x: Tensor, deltas: tuple[Delta, ...]) -> Tensor | None:
        """Run layer and updates in one kernel; None if the layer is not plain or an update not low-rank."""
        frozen_weight, bias = self.layer.frozen(), self.layer.bias
        if frozen_weight is None:
            return None
        frozen, weight = frozen_weight
        if len(deltas) > 1 and any(delta.drops for delta in deltas):
            return None  # each adapter drops other elements of the input, and the kernel takes one input
        forms = [delta.as_lora() for delta in deltas]
        dtype = _compute_dtype(x, self.layer.weight)
        if dtype is None or any(form is None for form in forms):
            return None
        A, B, scale = _summed(cast("list[LowRankForm]", forms))
        x = x.to(dtype)
        dropped = deltas[0].drop(x) if deltas[0].drops else None
        bias = None if bias is None else bias.to(dtype)
        return low_rank_linear(x, weight, bias, A, B, scale, frozen=frozen, dropped=dropped)

    def _joined(self, x: Tensor, deltas: tuple[Delta, ...]) -> Tensor | None:
        """Run the layer once with the updates added to its weight; None if that is more work or less exact.

        In a half-precision weight, small updates would be lost to rounding.
        """
        layer, weight = self.layer, self.layer.weight
        if weight.dtype in (torch.float16, torch.bfloat16) or not layer.is_bare:
            return None
        if any(delta.drops or not delta.joins_weight(x) for delta in deltas):
            return None
        for delta in deltas:
            weight = weight + layer.to_weight(delta.weight()).to(weight.dtype)
        return layer.run_with(x, weight)

    def _rescale(self, out: Tensor, gain: Tensor) -> Tensor:
        """Multiply the output without its bias by ``gain``; where ``gain`` is 1, no bit changes."""
        gain = self.layer.per_channel(gain.to(out.dtype))
        if self.layer.bias is None:
            return out * gain
        bias = self.layer.per_channel(self.layer.bias.to(out.dtype))
        return out + (out - bias) * (gain - 1)


def _summed(forms: list[LowRankForm]) -> LowRankForm:
    """Combine several updates into one, whose rank is the sum of their ranks."""
    if len(forms) == 1:
        return forms[0]
    A = torch.cat([form.A for form in forms])
    B = torch.cat([form.B * form.scale for form in forms], dim=1)
    return LowRankForm(A, B, 1.0)


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype a linear layer would compute in; None if the stock layer would raise."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype if x.dtype == weight.dtype else None
