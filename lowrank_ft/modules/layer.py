"""One view over every layer that carries a weight: a matrix, out × in, and how to run it.

Methods write their mathematics once, on the matrix; this file knows that GPT-2's ``Conv1D`` stores the
transpose, that an embedding is a matrix applied to one-hot tokens, and that a convolution's matrix is its
unfolded kernel. Subclasses that override ``forward`` (scaled embeddings, padded convolutions, layers that
cast) are run through *their own* ``forward`` with another weight put in, so that what they do to the base
weight they also do to the update.
"""

from __future__ import annotations

import copy
import math
import sys
from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ft.errors import TargetError
from lowrank_ft.modules.fused import DENSE, DenseWeight, Frozen
from lowrank_ft.structure.replacement import Replacement


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


class LinearLayer(Layer):
    """``nn.Linear`` and its subclasses: the matrix is the weight."""

    kind = "linear"
    module: nn.Linear

    def __init__(self, module: nn.Linear) -> None:
        super().__init__(module)
        self.out_features, self.in_features = module.out_features, module.in_features

    @property
    def _has_stock_forward(self) -> bool:
        return type(self.module).forward is nn.Linear.forward

    def frozen(self) -> tuple[Frozen, tuple[Tensor, ...]] | None:
        return (DENSE, (self.weight,)) if self._can_fuse else None

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight) if self._has_stock_forward else self._run_overridden(x, weight)

    def run_factors(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        hidden = self.run(x, self._cast(A, x))
        return F.linear(hidden, self._cast(B, hidden))


class TransposedLinearLayer(Layer):
    """transformers' ``Conv1D`` (GPT-2): a linear layer that stores ``in × out``."""

    kind = "transposed-linear"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.in_features, self.out_features = self.weight.shape

    @property
    def _has_stock_forward(self) -> bool:
        return type(self.module) is _transformers_conv1d()

    def frozen(self) -> tuple[Frozen, tuple[Tensor, ...]] | None:
        return (DenseWeight(transposed=True), (self.weight,)) if self._can_fuse else None

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def to_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight.T)

    def run_factors(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, self._cast(A, x)), self._cast(B, x))


class EmbeddingLayer(Layer):
    """``nn.Embedding``: the matrix is the transposed table, ``dimension × vocabulary``.

    ``A`` is then ``r × vocabulary`` and ``B`` is ``dimension × r``, as in PEFT.
    """

    kind = "embedding"
    module: nn.Embedding

    def __init__(self, module: nn.Embedding) -> None:
        super().__init__(module)
        if module.max_norm is not None:
            raise TargetError("An Embedding with max_norm rewrites its own weight and cannot be adapted.")
        self.out_features, self.in_features = module.embedding_dim, module.num_embeddings

    @property
    def _has_stock_forward(self) -> bool:
        return type(self.module).forward is nn.Embedding.forward

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def to_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self._has_stock_forward:
            return self._run_overridden(x, weight)
        m = self.module
        return F.embedding(x, weight, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq)

    def run_factors(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(self.run(x, A.T.to(self.weight.dtype)), B.to(self.weight.dtype))

    def _cast(self, tensor: Tensor, x: Tensor) -> Tensor:
        return tensor.to(self.weight.dtype)  # x holds token ids


class ConvLayer(Layer):
    """``nn.Conv1d/2d/3d`` with any stride, padding, dilation and groups.

    The matrix is the unfolded kernel, ``out × (in/groups · k…)``. Without groups ``B A`` runs as a
    convolution to ``r`` channels and a 1×1 convolution; with groups as one convolution by the small dense
    product, since factored execution would carry ``r`` channels for every group.
    """

    kind = "conv"
    module: nn.modules.conv._ConvNd

    def __init__(self, module: nn.modules.conv._ConvNd) -> None:
        super().__init__(module)
        self.out_features = module.out_channels
        self.in_features = module.weight.numel() // module.out_channels

    @property
    def groups(self) -> int:
        """Groups of channels that do not see each other."""
        return self.module.groups

    @property
    def spatial(self) -> int:
        """Dimensions of the kernel."""
        return self.weight.dim() - 2

    @property
    def modes(self) -> tuple[str, ...]:
        """The stored axes: ``out``, ``in`` (of one group), and the kernel's."""
        return ("out", "in", *(f"kernel{i}" for i in range(self.spatial)))

    @property
    def _has_stock_forward(self) -> bool:
        return type(self.module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def tensor(self) -> Tensor:
        return self.weight

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The stored weight's."""
        return tuple(self.weight.shape)

    def tensor_to_matrix(self, tensor: Tensor) -> Tensor:
        return self.to_matrix(tensor)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def to_weight(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, *self.weight.shape[1:])

    def rows(self, x: Tensor) -> Tensor:
        """The patches, by the layer's own forward (stride, padding) with one kernel for each entry.

        Raises:
            TargetError: a convolution with groups, whose matrix multiplies other patches in each.
        """
        if self.groups > 1:
            raise TargetError(
                f"A convolution with groups={self.groups} has no one matrix of patches: exclude it."
            )
        eye = torch.eye(self.in_features, dtype=x.dtype, device=x.device)
        return self.output_rows(self.run(x, self.to_weight(eye)))

    def output_rows(self, y: Tensor) -> Tensor:
        return y.movedim(-self.spatial - 1, -1)

    def per_channel(self, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1,) * self.spatial)

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self._has_stock_forward:
            return self._run_overridden(x, weight)
        return self._convolve(x, weight, None)

    def run_with(self, x: Tensor, weight: Tensor) -> Tensor:
        if not self._has_stock_forward:
            return super().run_with(x, weight)
        return self._convolve(x, weight, self.bias)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, cast(Any, self.module)._conv_forward(x, weight, bias))

    def positions(self, x: Tensor) -> tuple[int, int]:
        """Return how many positions the input has and the output will have, batch included; but for borders.

        Args:
            x: the layer's input.
        """
        before = x.shape[-self.spatial :]
        after = [self._strided(size, step) for size, step in zip(before, self.module.stride, strict=True)]
        samples = x.shape[0] if x.dim() == self.spatial + 2 else 1
        return samples * math.prod(before), samples * math.prod(after)

    def _strided(self, size: int, step: int) -> int:
        """The size of a side after a stride."""
        return -(-size // step)

    def run_factors(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if self.groups > 1:
            return self.run_matrix(x, B @ A)
        return self._pointwise(self.run(x, self._cast(self.to_weight(A), x)), B)

    def run_tucker(self, x: Tensor, outer: Tensor | None, core: Tensor, inner: Tensor | None) -> Tensor:
        """Apply ``core ×_out outer ×_in inner`` without forming it: 1×1, a small convolution, 1×1.

        With groups each of the three has as many, so every group carries the ranks' channels.

        Args:
            x: the layer's input.
            outer: ``(out, r_out)``, of the ``out`` mode; None where the core has that mode whole.
            core: with the axes of :attr:`modes`, ranks in place of channels.
            inner: ``(in/groups, r_in)``, of the ``in`` mode, likewise.
        """
        if inner is not None:
            x = self._pointwise(x, inner.T.repeat(self.groups, 1), self.groups)
        if outer is not None:
            core = core.repeat(self.groups, *(1,) * (core.dim() - 1))
        x = self.run(x, self._cast(core, x))
        return x if outer is None else self._pointwise(x, outer, self.groups)

    def _pointwise(self, x: Tensor, matrix: Tensor, groups: int = 1) -> Tensor:
        """Multiply the channels at every position by a matrix."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.spatial - 1]
        weight = self._cast(matrix, x)
        return convolve(x, weight.reshape(*weight.shape, *(1,) * self.spatial), groups=groups)


class TransposedConvLayer(ConvLayer):
    """``nn.ConvTranspose1d/2d/3d``, which store ``in × out/groups × k…``.

    The matrix is what it is for a convolution, ``out × (in/groups · k…)``.
    """

    kind = "transposed-conv"
    module: nn.modules.conv._ConvTransposeNd

    @property
    def modes(self) -> tuple[str, ...]:
        """The stored axes: ``in``, ``out`` (of one group), and the kernel's."""
        _, _, *kernel = super().modes
        return ("in", "out", *kernel)

    @property
    def _has_stock_forward(self) -> bool:
        stock = (nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward)
        return type(self.module).forward in stock

    def to_matrix(self, weight: Tensor) -> Tensor:
        inputs = weight.shape[0] // self.groups
        by_group = weight.reshape(self.groups, inputs, weight.shape[1], -1).transpose(1, 2)
        return by_group.reshape(self.groups * weight.shape[1], -1)

    def to_weight(self, matrix: Tensor) -> Tensor:
        inputs, outputs = self.weight.shape[0] // self.groups, matrix.shape[0] // self.groups
        by_group = matrix.reshape(self.groups, outputs, inputs, -1).transpose(1, 2)
        return by_group.reshape(self.weight.shape[0], outputs, *self.weight.shape[2:])

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        m: Any = self.module
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.spatial - 1]
        options = (m.stride, m.padding, m.output_padding, m.groups, m.dilation)
        return cast(Tensor, convolve(x, weight, bias, *options))

    def _strided(self, size: int, step: int) -> int:
        return size * step

    def run_tucker(self, x: Tensor, outer: Tensor | None, core: Tensor, inner: Tensor | None) -> Tensor:
        if inner is not None:
            by_group = inner.reshape(self.groups, -1, inner.shape[1]).transpose(1, 2)
            x = self._pointwise(x, by_group.flatten(0, 1), self.groups)
            core = core.repeat(self.groups, *(1,) * (core.dim() - 1))
        x = self.run(x, self._cast(core, x))
        return x if outer is None else self._pointwise(x, outer.repeat(self.groups, 1), self.groups)

    def _outputs_of(self, weight: Tensor) -> int:
        return weight.shape[1] * self.groups


def layer_of(module: nn.Module, name: str = "") -> Layer:
    """Return the :class:`Layer` view of ``module``.

    Raises:
        TargetError: the module carries no weight of a kind that can be adapted.
    """
    view = find_layer(module)
    if view is None:
        raise TargetError(
            f"{name or 'The module'} is a {type(module).__name__}, which cannot be adapted. Linear, Conv1D "
            f"(GPT-2), Embedding, Conv1d/2d/3d and ConvTranspose1d/2d/3d layers can: exclude it, or name the "
            f"layers inside it."
        )
    view.name = name
    return view


def find_layer(module: nn.Module) -> Layer | None:
    """Like :func:`layer_of`, but None for modules that cannot be adapted."""
    if type(module).__module__.startswith("bitsandbytes."):
        return None
    if isinstance(module, Replacement):
        return cast("Layer | None", module.view())
    if isinstance(module, nn.Linear):
        return LinearLayer(module)
    if isinstance(module, nn.Embedding):
        return EmbeddingLayer(module)
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvLayer(module)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return TransposedConvLayer(module)
    conv1d = _transformers_conv1d()
    if conv1d is not None and isinstance(module, conv1d):
        return TransposedLinearLayer(module)
    return None


def stock_linear(kind: str, matrix: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a stock layer of a kind, ``"linear"`` or ``"transposed-linear"``, with these values.

    Args:
        kind: as in :attr:`Layer.kind`.
        matrix: ``(out, in)``.
        bias: ``(out,)``; a Conv1D without one gets zeros, since it always has one.
    """
    out_features, in_features = matrix.shape
    if kind == "linear":
        shell: nn.Module = nn.Linear(in_features, out_features, bias is not None, device="meta")
        shell.weight = nn.Parameter(matrix)
    else:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):  # no random values are drawn on meta
            shell = Conv1D(out_features, in_features)
        shell.weight = nn.Parameter(matrix.T.contiguous())
        bias = matrix.new_zeros(out_features) if bias is None else bias
    if bias is not None:
        shell.bias = nn.Parameter(bias.detach().clone())
    return shell


def _transformers_conv1d() -> type[nn.Module] | None:
    """Transformers' Conv1D class if transformers is loaded; importing it here would cost a second."""
    module = sys.modules.get("transformers.pytorch_utils")
    return cast("type[nn.Module] | None", getattr(module, "Conv1D", None))
