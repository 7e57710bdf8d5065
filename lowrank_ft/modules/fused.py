"""A dense layer and its low-rank update as one autograd function.

``y = x Wᵀ + b + scale · (x Aᵀ) Bᵀ``, with W and b frozen. Differences from the same formula in separate
operations:

* the update is accumulated into the output (and its gradient into the input's gradient), so no
  ``tokens × out`` temporary exists;
* the input is saved once, in its own dtype; the q, k and v projections save the same tensor;
* no gradient is computed for W, nor for x if x needs none;
* an input that is the product of two tensors that autograd saves anyway (the SwiGLU ``act(gate) · up`` before
  every down projection) is not saved but multiplied again in backward, which costs one elementwise product
  and is bit-identical;
* a quantised weight is unpacked in forward and again in backward, and no dense copy is saved.

The order of summation differs, so logits differ from those of separate operations in the last bits. With
B = 0 outputs are still bit-identical to the base layer's, since only zeros are accumulated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Product = tuple[Tensor, Tensor]


class Frozen(Protocol):
    """Multiplication by a frozen weight. Its tensors are arguments, so that autograd can save them."""

    def multiply(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        """Return ``x Wᵀ + b``, ``(…, out)``."""

    def backpropagate(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return ``g W`` for a gradient g of the output, ``(n, out)``."""


@dataclass(frozen=True)
class DenseWeight:
    """A stock weight; multiplication is bit-identical, since it uses the operations of the stock layer.

    Attributes:
        transposed: whether it is stored as ``(in, out)``, as in GPT-2.
    """

    transposed: bool = False

    def multiply(self, x: Tensor, tensors: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        """Return ``x Wᵀ + b``."""
        (weight,) = tensors
        weight = weight.to(x.dtype)
        if not self.transposed:
            return F.linear(x, weight, bias)
        flat = x.reshape(-1, x.shape[-1])
        out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return out.view(*x.shape[:-1], -1)

    def backpropagate(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """Return ``g W``."""
        weight = tensors[0].to(grad.dtype)
        return grad @ (weight.T if self.transposed else weight)


DENSE = DenseWeight()


def low_rank_linear(
    x: Tensor,
    weight: Tensor | tuple[Tensor, ...],
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    *,
    frozen: Frozen = DENSE,
    dropped: Tensor | None = None,
) -> Tensor:
    """Return ``x Wᵀ + b + scale · (x Aᵀ) Bᵀ``.

    Args:
        x: ``(…, in)``.
        weight: ``(out, in)``, or the tensors that ``frozen`` takes. They get no gradient.
        bias: ``(out,)`` or None. Frozen.
        A: ``(rank, in)``, of any float dtype; cast to that of ``x``.
        B: ``(out, rank)``, of any float dtype; cast to that of ``x``.
        scale: factor on the update.
        frozen: how to multiply by the weight.
        dropped: ``x`` after dropout; the input of the update. None for ``x`` itself.

    Returns:
        ``(…, out)``, in the dtype of ``x``.
    """
    source = x if dropped is None else dropped
    product = _kept_product(source) if A.requires_grad and torch.is_grad_enabled() else None
    tensors = (weight,) if isinstance(weight, Tensor) else weight
    args = (x, dropped, bias, A, B, scale, frozen, product, *tensors)
    return cast(Tensor, _LowRankLinear.apply(*args))  # type: ignore[no-untyped-call]


def frozen_linear(x: Tensor, frozen: Frozen, weight: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
    """Return ``x Wᵀ + b`` for a packed weight, which is unpacked again in backward.

    Args:
        x: ``(…, in)``.
        frozen: how to multiply by the weight.
        weight: the tensors that ``frozen`` takes. They get no gradient.
        bias: ``(out,)`` or None; it may be trainable.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    bias = None if bias is None else bias.to(x.dtype)
    return cast(Tensor, _FrozenLinear.apply(x, bias, frozen, *weight))  # type: ignore[no-untyped-call]


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, frozen: Frozen, *weight: Tensor) -> Tensor:
        ctx.save_for_backward(*weight)
        ctx.frozen = frozen
        return frozen.multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, flat = ctx.saved_tensors, grad.reshape(-1, grad.shape[-1])
        grad_x = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = ctx.frozen.backpropagate(flat, weight).view(*grad.shape[:-1], -1)
            if ctx.needs_input_grad[1]:
                grad_bias = flat.sum(0)
        return grad_x, grad_bias, None, *(None for _ in weight)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        frozen: Frozen,
        product: Product | None,
        *weight: Tensor,
    ) -> Tensor:
        source = x if dropped is None else dropped
        # The thin product comes first, while x is still in the processor's cache.
        hidden = source.reshape(-1, source.shape[-1]) @ A.to(x.dtype).T
        out = frozen.multiply(x, weight, bias)
        out.view(-1, out.shape[-1]).addmm_(hidden, B.to(x.dtype).T, alpha=scale)

        keep = ctx.needs_input_grad[3]  # the input is saved for A's gradient only
        kept = product if product is not None else (source,)
        ctx.save_for_backward(A, B, hidden, *weight, *(kept if keep else ()))
        ctx.scale, ctx.frozen, ctx.has_dropped = scale, frozen, dropped is not None
        ctx.weights = len(weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # All dtypes were chosen in the forward: a backward inside an autocast block must not change them.
        if torch.is_autocast_enabled(grad.device.type):
            with torch.autocast(grad.device.type, enabled=False):
                return _gradients(ctx, grad)
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """One gradient for each argument of ``forward``."""
    A, B, hidden, *rest = ctx.saved_tensors
    weight, kept = tuple(rest[: ctx.weights]), rest[ctx.weights :]
    need_x, need_dropped, _, need_A, need_B, *_ = ctx.needs_input_grad
    grad_x = grad_dropped = grad_A = grad_B = None
    shape, flat = grad.shape[:-1], grad.reshape(-1, grad.shape[-1])
    # The thin products come first, while the gradient is in the cache; the wide one would evict it.
    grad_hidden = (flat @ B.to(grad.dtype)).mul_(ctx.scale)
    if need_B:
        grad_B = (flat.T @ hidden).mul_(ctx.scale).to(B.dtype)
    if need_A:
        source = kept[0] if len(kept) == 1 else kept[0] * kept[1]
        grad_A = (grad_hidden.T @ source.reshape(-1, source.shape[-1])).to(A.dtype)
    if need_dropped:
        grad_dropped = (grad_hidden @ A.to(grad.dtype)).view(*shape, -1)
    if need_x:
        grad_x = ctx.frozen.backpropagate(flat, weight)
        if not ctx.has_dropped:
            grad_x.addmm_(grad_hidden, A.to(grad.dtype))
        grad_x = grad_x.view(*shape, -1)
    return grad_x, grad_dropped, None, grad_A, grad_B, None, None, None, *(None for _ in weight)


def _kept_product(x: Tensor) -> Product | None:
    """Return (a, b) if x is a · b and autograd saves a and b anyway, for the backward of that product.

    Return None while saved-tensor hooks are active (activation checkpointing, offloading), since reading a
    saved tensor would run their unpack hook in the middle of the forward.
    """
    if torch.compiler.is_compiling() or _saved_tensor_hooks_are_on():
        return None
    node = x.grad_fn
    if node is None or node.name() != "MulBackward0":
        return None
    a, b = node._saved_self, node._saved_other  # type: ignore[attr-defined]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None  # if a factor is a scalar or needs no gradient, the other one is not saved
    if not (a.shape == b.shape == x.shape and a.dtype == b.dtype == x.dtype):
        return None  # with broadcasting, saving both factors could take more memory than saving x
    # Detached aliases still share the version counter, so an in-place change is caught in backward.
    return a.detach(), b.detach()


def _saved_tensor_hooks_are_on() -> bool:
    """Whether ``saved_tensors_hooks`` are active. torch has no public function for this.

    If the private function is missing, return True: the input is then saved, at the cost of memory.
    """
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top_hooks is None or top_hooks(True) is not None
