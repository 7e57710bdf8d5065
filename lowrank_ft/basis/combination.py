"""A factor made of a basis, materialised once for each step of the optimiser.

``M = scale · Σ c_i S_i`` changes only when the coefficients do. So it is built once for each optimiser step
and used in the forward of every micro-batch, also when activation checkpointing repeats a forward. Its
gradient is summed over the micro-batches and projected onto the basis once, in the backward in which
accelerate (and so Trainer) synchronises gradients: before they are clipped, and before the optimiser reads
them. Both are exact, since building and projecting are linear.

Without accelerate every backward projects, which is just as exact but costs one projection each.
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

    The basis matrices are scaled so that with coefficients of size 1 the entries have the variance of the
    paper's uniform ones, 1/3 (Koohpayegani et al. 2024, arXiv 2310.02556, section 3).

    Attributes:
        stream: the basis; its matrix 0 is the frozen start, the others have a coefficient each.
        shape: the shape of the factor.
        bases: k, the number of coefficients.
        start: standard deviation of the start's entries; 0 for no start.
    """

    def __init__(self, stream: Stream, shape: tuple[int, int], bases: int, start: float) -> None:
        self.stream, self.shape, self.bases = stream, shape, bases
        deviation = 1.0 if stream.kind == "rademacher" else 1 / math.sqrt(3)  # of one entry of the basis
        self.scale = 1 / math.sqrt(3 * bases) / deviation
        self.first = start / deviation / self.scale  # the start's coefficient
        self._value: Tensor | None = None
        self._made_from: tuple[Any, ...] = ()
        self._gradient: Tensor | None = None  # summed over micro-batches, not projected yet
        self._backward = -1  # the last backward that added to it

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph must not contain the cached value
    def value(self, coefficients: nn.Parameter, bits: int = 32) -> Tensor:
        """Return the factor, differentiable in the coefficients.

        Args:
            coefficients: ``(bases,)``.
            bits: round the coefficients to this many bits first; the gradient ignores the rounding.
        """
        factor = self._materialized(coefficients, bits)
        if torch.is_grad_enabled() and coefficients.requires_grad:
            return cast(Tensor, _Materialized.apply(coefficients, self, factor))  # type: ignore[no-untyped-call]
        return factor

    def _materialized(self, coefficients: nn.Parameter, bits: int) -> Tensor:
        version = -1 if coefficients.is_inference() else coefficients._version
        made_from = (version, coefficients.data_ptr(), coefficients.device, coefficients.dtype, bits)
        if self._value is None or self._made_from != made_from:
            # A factor that was built in inference mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                rounded = _wide(blockwise.rounded(coefficients.detach().clone(), bits))
                with_start = torch.cat([rounded.new_full((1,), self.first), rounded])
                flat = basis.combine(self.stream, with_start, math.prod(self.shape), self.scale)
                self._value, self._made_from = flat.view(self.shape).to(coefficients.dtype), made_from
        return self._value

    def receive(self, gradient: Tensor, coefficients: nn.Parameter) -> Tensor:
        """Add a gradient of the factor; return the coefficients' gradient, 0 until the last micro-batch."""
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
    "Gradients of micro-batches were set to None before accelerate marked the last micro-batch of the step, "
    "so they are lost. If this loop does not use accelerate, an interrupted one left its state behind: call "
    "accelerate.state.GradientState._reset_state()."
)


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype in which bases are combined: float64 stays, all others become float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _synchronizes() -> bool:
    """Whether the gradients are complete after this backward, according to accelerate."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return True
    return bool(state.GradientState().sync_gradients)


def _current_backward() -> int:
    """The number of the backward that is running; torch has no public function for it."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return -1 if current is None else int(current())
