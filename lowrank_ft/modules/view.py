"""One view over every layer that carries a weight: a matrix, out × in, and how to run it.

Methods write their mathematics once, on the matrix; this file knows that GPT-2's ``Conv1D`` stores the
transpose, that an embedding is a matrix applied to one-hot tokens, and that a convolution's matrix is its
unfolded kernel. Subclasses that override ``forward`` (scaled embeddings, padded convolutions, layers that
cast) are run through *their own* ``forward`` with another weight put in, so that what they do to the base
weight they also do to the update.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lowrank_ft.modules.fused import Frozen


class Layer(ABC):
    """A weight-bearing module, seen as the matrix ``out_features × in_features``.

    Attributes:
        module: the layer itself; its weight is read, never written.
        out_features: rows of the matrix; channels of the output.
        in_features: columns of the matrix: input features, vocabulary size, or ``in/groups · k · k``.
        name: the module's name in the stock model, if it was passed to :func:`layer_of`.
    """

    kind: ClassVar[str]
    out_features: int
    in_features: int
    name: str = ""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def weight(self) -> Tensor:
        """The stored weight, in the module's own layout."""
        return cast(Tensor, self.module.weight)

    @property
    def bias(self) -> Tensor | None:
        """The module's bias, or None."""
        return cast("Tensor | None", getattr(self.module, "bias", None))

    @property
    def size(self) -> int:
        """How many parameters the dense layer has, bias included; also where the module stores fewer."""
        return self.out_features * self.in_features + (0 if self.bias is None else self.out_features)

    @property
    def max_rank(self) -> int:
        """``min(out, in)``: the largest rank an update of this layer can have."""
        return min(self.out_features, self.in_features)

    @property
    def modes(self) -> tuple[str, ...]:
        """The axes of :meth:`tensor`: ``"out"`` and ``"in"``, and for a convolution its kernel's."""
        return ("out", "in")

    @property
    def is_stock(self) -> bool:
        """Whether the module runs torch's own forward with nothing hooked in between.

        Only then may a fused kernel read the weight and skip the module.
        """
        return self._has_stock_forward and self.is_bare

    @property
    def is_plain(self) -> bool:
        """Whether the module's class has torch's own forward."""
        return self._has_stock_forward

    @property
    def is_bare(self) -> bool:
        """Whether calling the module runs its class's forward and nothing else.

        Only then may that forward be called with another weight in place of the module.
        """
        m = self.module
        return (
            "forward" not in m.__dict__  # accelerate's offloading replaces it on the instance
            and not m._forward_hooks
            and not m._forward_pre_hooks
            and not m._backward_hooks
            and not m._backward_pre_hooks
        )

    def frozen(self) -> tuple[Frozen, tuple[Tensor, ...]] | None:
        """Return how the weight multiplies, and its tensors; None where the module itself must be called.

        Where a fused kernel may not read the weight: layers that are not linear, that do more than multiply,
        or whose weight or bias trains.
        """
        return None

    def matrix(self) -> Tensor:
        """The weight as ``out × in`` (a view where the layout allows one)."""
        return self.to_matrix(self.weight)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Turn a weight in the stored layout into ``out × in``."""
        return weight

    def to_weight(self, matrix: Tensor) -> Tensor:
        """Turn an ``out × in`` matrix into the stored layout."""
        return matrix

    def tensor(self) -> Tensor:
        """The weight with an axis for each of :attr:`modes`: the matrix, or a convolution's stored weight."""
        return self.matrix()

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of :meth:`tensor`, which of a factored layer is a product."""
        return (self.out_features, self.in_features)

    def tensor_to_matrix(self, tensor: Tensor) -> Tensor:
        """Turn a tensor with the axes of :attr:`modes` into ``out × in``."""
        return tensor

    @abstractmethod
    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run the layer's own forward, without bias, with ``weight`` (stored layout) in its place."""

    def run_with(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run the layer's own forward, bias and all, with ``weight`` (stored layout) in place of its own."""
        return cast(Tensor, torch.func.functional_call(self.module, {"weight": weight}, (x,)))

    @abstractmethod
    def run_factors(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Apply ``B A`` (``out × r`` and ``r × in``) to ``x`` without forming the product."""

    def run_matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Apply an ``out × in`` matrix to ``x`` the way the layer applies its own."""
        return self.run(x, self._cast(self.to_weight(matrix), x))

    def rows(self, x: Tensor) -> Tensor:
        """Turn an input into what the matrix multiplies: ``(…, in_features)``; token ids stay as they are."""
        return x

    def output_rows(self, y: Tensor) -> Tensor:
        """Turn an output, or its gradient, into ``(…, out_features)``."""
        return y

    def per_channel(self, vector: Tensor) -> Tensor:
        """Shape one value for each output feature so that it broadcasts over the layer's output."""
        return vector

    def clone_with(self, matrix: Tensor) -> nn.Module:
        """Return a module like this one whose weight is ``matrix``; everything else is shared."""
        module = copy.copy(self.module)
        module._parameters = dict(module._parameters)
        module._buffers = dict(module._buffers)
        weight = self.to_weight(matrix).contiguous()
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        return module

    @property
    @abstractmethod
    def _has_stock_forward(self) -> bool: ...

    @property
    def _can_fuse(self) -> bool:
        """Whether the layer is stock, and frozen."""
        trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return self.is_stock and not trains

    def _cast(self, tensor: Tensor, x: Tensor) -> Tensor:
        """Cast a parameter to the compute dtype, unless autocast is going to choose it."""
        return tensor if torch.is_autocast_enabled(x.device.type) else tensor.to(x.dtype)

    def _run_overridden(self, x: Tensor, weight: Tensor) -> Tensor:
        """Call the module's own forward with another weight, and zeros for a bias."""
        tensors = {"weight": weight}
        if self.bias is not None:
            tensors["bias"] = weight.new_zeros(self._outputs_of(weight))
        return cast(Tensor, torch.func.functional_call(self.module, tensors, (x,)))

    def _outputs_of(self, weight: Tensor) -> int:
        return weight.shape[0]
