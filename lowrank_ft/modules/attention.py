"""Attention whose heads lost some of their dimensions: of queries and keys, or of values, or of both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lowrank_ft.errors import StateError
from lowrank_ft.manifest import Node
from lowrank_ft.modules.replacement import Container
from lowrank_ft.registry import register_node


@register_node
@dataclass(frozen=True)
class AttentionNode(Node):
    """An attention module whose projections are resized.

    The sizes are those of its projections, which are nodes of their own; this node says what they are
    called.
    """

    kind: ClassVar[str] = "attention"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"

    def build(self, module: nn.Module) -> ResizedAttention:
        """Build the module; its children are those of ``module``, to be replaced in their turn."""
        return ResizedAttention(self, module)


class ResizedAttention(Container):
    """A decoder's attention with heads of any width.

    It computes what the stock module computes, with three differences: the width of queries and keys may be
    another than that of values; scores are scaled by the stock module's factor (``1/√h`` of the *original*
    head, not of what is left); and the rotary embedding turns each pair by the angle it had in the original
    head. The indices come from the projections (``Resized.rows``).

    Attributes:
        node: what the projections are called.
    """

    def __init__(self, node: AttentionNode, stock: nn.Module) -> None:
        super().__init__()
        self.node = node
        self._modules.update(stock._modules)
        shell = copy.copy(stock)  # attributes of the stock module, and none of its weights
        for patched in ("forward", "_hf_hook", "_old_forward"):  # accelerate's, bound to the stock module
            shell.__dict__.pop(patched, None)
        shell._modules = dict.fromkeys(stock._modules)
        self.__dict__["_shell"] = shell
        self.train(stock.training)

    def structure(self) -> AttentionNode:
        """Return the node of this module."""
        return self.node

    def dense(self) -> nn.Module:
        """Return the stock module around the same projections."""
        stock = copy.copy(self.__dict__["_shell"])
        stock._modules = dict(self._modules)
        return cast(nn.Module, stock.train(self.training))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: ``(batch, tokens, width)``.
            position_embeddings: cosines and sines, ``(batch, tokens, h)``; None without rotary embedding.
            attention_mask: what the model made for its attention backend.
            past_key_values: a cache; it holds keys and values of the reduced widths.
            **kwargs: handed to the attention backend, as the stock module does.

        Raises:
            StateError: attention weights are asked for.
        """
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        queries_per_key = getattr(self, "num_key_value_groups", 1)
        k, v = self._children("k"), self._children("v")
        key_heads = _stock_outputs(k) // self.head_dim
        query = self._heads(self._children("q"), hidden_states, key_heads * queries_per_key, "q_norm")
        key = self._heads(k, hidden_states, key_heads, "k_norm")
        value = self._heads(v, hidden_states, key_heads, None)
        if position_embeddings is not None:
            cos, sin = (self._angles(part, k, key_heads) for part in position_embeddings)
            key = _rotate(key, cos, sin)
            if queries_per_key > 1 and cos.shape[1] > 1:
                cos, sin = (part.repeat_interleave(queries_per_key, 1) for part in (cos, sin))
            query = _rotate(query, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, _eager
        )
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise StateError(
                "transformers records attention weights by the class of the stock module, and would leave "
                "out those of resized ones. Ask the dense model, or what export(model, dir, 'dense') writes."
            )
        if hasattr(self, "sliding_window"):
            kwargs["sliding_window"] = self.sliding_window
        elif self.config.model_type == "mistral":  # the one stock module that reads it off the config
            kwargs["sliding_window"] = getattr(self.config, "sliding_window", None)
        dropout = getattr(self, "attention_dropout", getattr(self, "dropout", 0.0))
        out, weights = attend(
            self, query, key, value, attention_mask,
            dropout=dropout if self.training else 0.0, scaling=self.scaling, **kwargs,
        )  # fmt: skip
        out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self._children("o")(out), weights

    def _children(self, part: str) -> nn.Module:
        return cast(nn.Module, self._modules[getattr(self.node, part)])

    def _heads(self, projection: nn.Module, x: Tensor, heads: int, norm: str | None) -> Tensor:
        """Project and split into heads, ``(batch, heads, tokens, width of a head)``."""
        out = projection(x).view(*x.shape[:-1], heads, -1)
        if norm is not None and norm in self._modules:
            out = self._modules[norm](out)  # type: ignore[misc]
        return cast(Tensor, out.transpose(1, 2))

    def _angles(self, part: Tensor, projection: nn.Module, heads: int) -> Tensor:
        """Choose cosines or sines by the dimensions that are left: ``(batch, heads or 1, tokens, width)``."""
        rows = getattr(projection, "rows", None)
        if rows is None:
            return part.unsqueeze(1)
        kept = (rows % self.head_dim).view(heads, -1)
        return part[..., kept].transpose(1, 2)


def _stock_outputs(projection: nn.Module) -> int:
    """How many outputs a projection had before any were taken."""
    shape = getattr(projection, "stock_shape", None)
    return cast(int, projection.out_features if shape is None else shape[0])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair ``(j, j + width/2)`` by its angle."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attend by plain products, the softmax in float32, as transformers' own eager attention does."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    scores = (query * scaling) @ key.transpose(2, 3)  # in this order float16 does not overflow
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights
