"""The base class of views, which present any layer with a weight as a matrix, out × in.

Methods write their mathematics once, for the matrix. A view knows how its layer stores and applies it:
GPT-2's ``Conv1D`` stores the transpose, an embedding is a matrix applied to one-hot tokens, and a
convolution's matrix is its unfolded kernel. A class that overrides ``forward`` (scaled embeddings, padded
convolutions, layers that cast) runs its *own* ``forward`` with a substituted weight, so that the update is
scaled, padded or cast like the base weight.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from lowrank_ft.modules.fused import Frozen


class Layer(ABC):
    """A view of a module with a weight, as the matrix ``out_features × in_features``.

    Attributes:
        module: the module; its weight is read, never written.
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
        """Number of parameters of the dense layer, bias included, even if the module stores fewer."""
        return self.out_features * self.in_features + (0 if self.bias is None else self.out_features)

    @property
    def max_rank(self) -> int:
        """``min(out, in)``: the largest rank an update of this layer can have."""
        return min(self.out_features, self.in_features)

    @property
    def modes(self) -> tuple[str, ...]:
        """The names of the axes of :meth:`tensor`: ``"out"``, ``"in"``, and a convolution's kernel axes."""
        return ("out", "in")

    @property
    def is_stock(self) -> bool:
        """Whether a call runs torch's own forward and nothing else (no hooks).

        Only then may a fused kernel read the weight without calling the module.
        """
        return self._has_stock_forward and self.is_bare

    @property
    def is_plain(self) -> bool:
        """Whether the module's class has torch's own forward."""
        return self._has_stock_forward

    @property
    def is_bare(self) -> bool:
        """Whether a call runs the forward of the module's class and nothing else (no hooks).

        Only then may that forward be called with another weight instead of calling the module.
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
        """Return the weight's multiplication and its tensors, for a fused kernel.

        None if the module itself must be called: if it is not linear, if it does more than multiply, or if
        its weight or bias is trained.
        """
        return None

    def matrix(self) -> Tensor:
        """The weight as ``out × in``; it shares the weight's memory if the layout allows that."""
        return self.to_matrix(self.weight)

    def to_matrix(self, weight: Tensor) -> Tensor:
        """Turn a weight in the stored layout into ``out × in``."""
        return weight

    def to_weight(self, matrix: Tensor) -> Tensor:
        """Turn an ``out × in`` matrix into the stored layout."""
        return matrix

    def tensor(self) -> Tensor:
        """The weight with the axes of :attr:`modes`: the matrix, or a convolution's stored weight."""
        return self.matrix()

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of :meth:`tensor`, without computing it."""
        return (self.out_features, self.in_features)

    def tensor_to_matrix(self, tensor: Tensor) -> Tensor:
        """Turn a tensor with the axes of :attr:`modes` into ``out × in``."""
        return tensor

    @abstractmethod
    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run the layer's own forward, without bias, with ``weight`` (stored layout) in place of its own."""

    def run_with(self, x: Tensor, weight: Tensor) -> Tensor:
        """Run the layer's own forward, with its bias, with ``weight`` (stored layout) in place of its own."""
        return cast(Tensor, torch.func.functional_call(self.module, {"weight": weight}, (x,)))

    @abstractmethod
    def run_factors(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Apply ``B A`` (``out × r`` and ``r × in``) to ``x`` without forming the product."""

    def run_matrix(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Apply an ``out × in`` matrix to ``x`` as the layer applies its own, without bias."""
        return self.run(x, self._cast(self.to_weight(matrix), x))

    def rows(self, x: Tensor) -> Tensor:
        """Reshape an input into the rows that the matrix multiplies, ``(…, in_features)``; keep token ids."""
        return x

    def output_rows(self, y: Tensor) -> Tensor:
        """Reshape an output, or its gradient, to ``(…, out_features)``."""
        return y

    def per_channel(self, vector: Tensor) -> Tensor:
        """Reshape a vector of one value per output feature so that it broadcasts over the output."""
        return vector

    def clone_with(self, matrix: Tensor) -> nn.Module:
        """Return a copy of the module with ``matrix`` as its weight; everything else is shared."""
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
        """Whether the layer is stock and frozen."""
        is_trained = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
        return self.is_stock and not is_trained

    def _cast(self, tensor: Tensor, x: Tensor) -> Tensor:
        """Cast a parameter to the input's dtype, unless autocast will choose the dtype."""
        return tensor if torch.is_autocast_enabled(x.device.type) else tensor.to(x.dtype)

    def _run_overridden(self, x: Tensor, weight: Tensor) -> Tensor:
        """Call the module's own forward with another weight, and with zeros as its bias."""
        tensors = {"weight": weight}
        if self.bias is not None:
            tensors["bias"] = weight.new_zeros(self._outputs_of(weight))
        return cast(Tensor, torch.func.functional_call(self.module, tensors, (x,)))

    def _outputs_of(self, weight: Tensor) -> int:
        return weight.shape[0]
