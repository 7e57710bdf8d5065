"""Linear layers and embeddings as one matrix, and :func:`layer_of`, which returns the view of any layer."""

from __future__ import annotations

import sys
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ft.errors import TargetError
from lowrank_ft.modules.convolution import ConvLayer, TransposedConvLayer
from lowrank_ft.modules.fused import DENSE, DenseWeight, Frozen
from lowrank_ft.modules.view import Layer
from lowrank_ft.structure.replacement import Replacement

__all__ = [
    "ConvLayer",
    "EmbeddingLayer",
    "Layer",
    "LinearLayer",
    "TransposedConvLayer",
    "TransposedLinearLayer",
    "find_layer",
    "layer_of",
    "stock_linear",
]


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
    """Return the :class:`Layer` view of ``module``, or None if it cannot be adapted."""
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
    """Return an ``nn.Linear`` or transformers' ``Conv1D`` with these values.

    Args:
        kind: ``"linear"`` or ``"transposed-linear"`` (see :attr:`Layer.kind`).
        matrix: ``(out, in)``.
        bias: ``(out,)`` or None. A ``Conv1D`` always has a bias: None then becomes zeros.
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
    """Transformers' Conv1D class, if transformers is imported already; an import would take a second."""
    module = sys.modules.get("transformers.pytorch_utils")
    return cast("type[nn.Module] | None", getattr(module, "Conv1D", None))
