"""A factor made of a basis, materialised once for each step of the optimiser.

``M = scale · Σ c_i S_i`` changes only when the coefficients do. So it is built once and used by every
forward of every micro-batch (and by what activation checkpointing runs again), as a LoRA's own factor would
be; its gradient is summed over the micro-batches and projected on the basis once, in the backward that
accelerate (and so Trainer) synchronises in: before gradients are clipped, and before the optimiser looks at
them. Both are exact, since building and projecting are linear.

Outside of accelerate every backward projects, which is as exact and costs one projection each.
"""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lowrank_ft import basis
from lowrank_ft.basis.philox import Stream
from lowrank_ft.quant import blockwise


class Combination:
    """One factor: its basis, and the factor built from its present coefficients.

    The basis matrices are scaled so that coefficients of size 1 give entries of the variance that the paper's
    uniform ones have, 1/3 (Koohpayegani et al. 2024, arXiv 2310.02556, section 3).

    Attributes:
        stream: the basis; its matrix 0 is the frozen start, the others have a coefficient each.
        shape: of the factor.
        bases: k, how many coefficients there are.
        start: standard deviation of the start's entries; 0 for none.
    """

    def __init__(self, stream: Stream, shape: tuple[int, int], bases: int, start: float) -> None:
        self.stream, self.shape, self.bases = stream, shape, bases
        deviation = 1.0 if stream.kind == "rademacher" else 1 / math.sqrt(3)  # of a basis entry
        self.scale = 1 / math.sqrt(3 * bases) / deviation
        self.first = start / deviation / self.scale  # the start's coefficient
        self._value: Tensor | None = None
        self._made_from: tuple[Any, ...] = ()
        self._gradient: Tensor | None = None  # summed over micro-batches, not projected yet
        self._backward = -1  # in which it was last added to

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # what is known now is no part of a graph
    def value(self, coefficients: nn.Parameter, bits: int = 32) -> Tensor:
        """Return the factor, differentiable in the coefficients.

        Args:
            coefficients: ``(bases,)``.
            bits: round them to this many first; the gradient passes through the rounding as it is.
        """
        factor = self._materialized(coefficients, bits)
        if torch.is_grad_enabled() and coefficients.requires_grad:
            return cast(Tensor, _Materialized.apply(coefficients, self, factor))  # type: ignore[no-untyped-call]
        return factor

    def _materialized(self, coefficients: nn.Parameter, bits: int) -> Tensor:
        version = -1 if coefficients.is_inference() else coefficients._version
        made_from = (version, coefficients.data_ptr(), coefficients.device, coefficients.dtype, bits)
        if self._value is None or self._made_from != made_from:
            # An inference tensor, if one was made here, could not be used by training later.
            with torch.inference_mode(False), torch.no_grad():
                rounded = _wide(blockwise.rounded(coefficients.detach().clone(), bits))
                every = torch.cat([rounded.new_full((1,), self.first), rounded])
                flat = basis.combine(self.stream, every, math.prod(self.shape), self.scale)
                self._value, self._made_from = flat.view(self.shape).to(coefficients.dtype), made_from
        return self._value

    def receive(self, gradient: Tensor, coefficients: nn.Parameter) -> Tensor:
        """Take a gradient of the factor; return the coefficients', zero until the last micro-batch."""
        backward = _current_backward()
        if self._gradient is not None and coefficients.grad is None and backward != self._backward:
            self._gradient = None
            warnings.warn(_THROWN_AWAY, RuntimeWarning, stacklevel=2)
        self._backward = backward
        if self._gradient is not None:
            gradient = self._gradient.add_(gradient)
        if not _synchronizes():
            self._gradient = gradient if gradient is self._gradient else gradient.clone()
            return torch.zeros_like(coefficients)
        self._gradient = None
        # An optimiser runs next, and some optimisers change parameters without raising the version counter.
        self._made_from = ()
        projected = basis.project(self.stream, _wide(gradient), self.bases + 1, self.scale)
        return projected[1:].to(coefficients.dtype)


class _Materialized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: nn.Parameter, combination: Combination, factor: Tensor) -> Tensor:
        ctx.coefficients, ctx.combination = coefficients, combination
        return factor.detach()  # an alias, so that the factor itself stays outside of the graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.combination.receive(gradient, ctx.coefficients), None, None


_THROWN_AWAY = (
    "Gradients of micro-batches were set to None before accelerate had said that they were the last of a "
    "step, so they are lost. If this loop is not accelerate's, an interrupted one left its state behind: "
    "call accelerate.state.GradientState._reset_state()."
)


def _wide(tensor: Tensor) -> Tensor:
    """In the dtype that bases are combined in: never less than float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _synchronizes() -> bool:
    """Whether the gradients of this backward are complete, as far as accelerate knows."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return True
    return bool(state.GradientState().sync_gradients)


def _current_backward() -> int:
    """A number for the backward that runs now. torch has no public one."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return -1 if current is None else int(current())
