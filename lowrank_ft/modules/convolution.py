"""Views of convolutions: as a matrix, the unfolded kernel, or as a tensor, the stored kernel."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ft.errors import TargetError
from lowrank_ft.modules.view import Layer


class ConvLayer(Layer):
    """``nn.Conv1d/2d/3d`` with any stride, padding, dilation and groups.

    The matrix is the unfolded kernel, ``out × (in/groups · k…)``. Without groups ``B A`` runs as a
    convolution to ``r`` channels and a 1×1 convolution. With groups it runs as one convolution with the small
    dense product, since factored execution would need ``r`` channels for every group.
    """

    kind = "conv"
    module: nn.modules.conv._ConvNd

    def __init__(self, module: nn.modules.conv._ConvNd) -> None:
        super().__init__(module)
        self.out_features = module.out_channels
        self.in_features = module.weight.numel() // module.out_channels

    @property
    def groups(self) -> int:
        """Number of groups of the convolution."""
        return self.module.groups

    @property
    def spatial(self) -> int:
        """Number of spatial dimensions."""
        return self.weight.dim() - 2

    @property
    def modes(self) -> tuple[str, ...]:
        """The stored axes: ``out``, ``in`` (of one group), and those of the kernel."""
        return ("out", "in", *(f"kernel{i}" for i in range(self.spatial)))

    @property
    def _has_stock_forward(self) -> bool:
        return type(self.module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)

    def tensor(self) -> Tensor:
        return self.weight

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the stored weight."""
        return tuple(self.weight.shape)

    def tensor_to_matrix(self, tensor: Tensor) -> Tensor:
        return self.to_matrix(tensor)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def to_weight(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, *self.weight.shape[1:])

    def rows(self, x: Tensor) -> Tensor:
        """Return the patches: the layer's own forward (stride, padding) with a one-hot kernel for each entry.

        Raises:
            TargetError: a convolution with groups, where each group has its own patches.
        """
        if self.groups > 1:
            raise TargetError(
                f"A convolution with groups={self.groups} has other patches in each group: exclude it."
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
        """Return the number of positions of the input and of the output, batch included, borders ignored.

        Args:
            x: the layer's input.
        """
        before = x.shape[-self.spatial :]
        after = [self._strided(size, step) for size, step in zip(before, self.module.stride, strict=True)]
        samples = x.shape[0] if x.dim() == self.spatial + 2 else 1
        return samples * math.prod(before), samples * math.prod(after)

    def _strided(self, size: int, step: int) -> int:
        """The output size along an axis of this size and stride."""
        return -(-size // step)

    def run_factors(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if self.groups > 1:
            return self.run_matrix(x, B @ A)
        return self._pointwise(self.run(x, self._cast(self.to_weight(A), x)), B)

    def run_tucker(self, x: Tensor, outer: Tensor | None, core: Tensor, inner: Tensor | None) -> Tensor:
        """Apply ``core ×_out outer ×_in inner`` without forming it: 1×1, a small convolution, 1×1.

        With groups each of the three has the same number of groups, so every group has the ranks' channels.

        Args:
            x: the layer's input.
            outer: ``(out, r_out)``, factor of the ``out`` mode; None if the core has that mode at full size.
            core: with the axes of :attr:`modes`, ranks in place of channels.
            inner: ``(in/groups, r_in)``, factor of the ``in`` mode; None if the core has it at full size.
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

    The matrix is ``out × (in/groups · k…)``, as for a convolution.
    """

    kind = "transposed-conv"
    module: nn.modules.conv._ConvTransposeNd

    @property
    def modes(self) -> tuple[str, ...]:
        """The stored axes: ``in``, ``out`` (of one group), and those of the kernel."""
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
