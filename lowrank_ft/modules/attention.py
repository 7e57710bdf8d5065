"""Attention with narrower heads: some dimensions of queries and keys, or of values, were removed."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lowrank_ft.errors import StateError, TargetError
from lowrank_ft.structure import heads
from lowrank_ft.structure.node import Node
from lowrank_ft.structure.registry import register_node
from lowrank_ft.structure.replacement import Container

# Families whose attention reads the sliding window from the config, not from an attribute of the module.
_WINDOW_OF_CONFIG = ("mistral", "phi3")
# Families that scale queries before the product with the keys, which could overflow in float16 otherwise.
_SCALES_QUERIES = ("opt",)


@register_node
@dataclass(frozen=True)
class AttentionNode(Node):
    """An attention module whose projections are resized.

    The node holds the names of the projections. Their sizes are in their own nodes.

    Attributes:
        q, k, v: the projections.
        o: the output projection; empty if it lies outside of the module.
        qkv: the fused projection that replaces q, k and v; empty if there is none.
        split: how many outputs of the fused projection are queries, keys and values.
    """

    kind: ClassVar[str] = "attention"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    qkv: str = ""
    split: tuple[int, ...] = ()

    def build(self, module: nn.Module, name: str = "") -> ResizedAttention:
        """Build the module; its children are those of ``module``, which are replaced afterwards.

        Raises:
            TargetError: the module lacks a projection, or is not an attention module.
        """
        parts = [self.qkv] if self.qkv else [self.q, self.k, self.v]
        missing = [part for part in (*parts, self.o) if part and part not in module._modules]
        if missing or not hasattr(module, "scaling") or (self.qkv and len(self.split) != 3):
            raise TargetError(
                f"A {type(module).__name__} is no attention with the projections {', '.join(parts)}"
                + (f": it has no {missing[0]}." if missing else ".")
            )
        return ResizedAttention(self, module)


class ResizedAttention(Container):
    """Attention with heads of any width.

    It computes the stock module's function with three differences: the width of queries and keys may differ
    from that of values; scores are scaled by the stock factor (``1/√h`` for the *original* head width h, not
    the reduced one); and the rotary embedding rotates each pair of dimensions by its angle in the original
    head. The indices of the kept dimensions come from the projections (``Resized.rows``).

    Attributes:
        node: the names of the projections.
    """

    def __init__(self, node: AttentionNode, stock: nn.Module) -> None:
        super().__init__()
        self.node = node
        self._modules.update(stock._modules)
        shell = copy.copy(stock)  # it has the attributes of the stock module, but no weights
        for patched in ("forward", "_hf_hook", "_old_forward"):  # accelerate binds these to the stock module
            shell.__dict__.pop(patched, None)
        shell._modules = dict.fromkeys(stock._modules)
        self.__dict__["_shell"] = shell
        self.__dict__["_arguments"] = tuple(inspect.signature(type(stock).forward).parameters)[2:]
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
        *args: Any,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention.

        Args:
            hidden_states: ``(batch, tokens, width)``.
            *args: the stock module's positional arguments, in its order.
            position_embeddings: cosines and sines, ``(batch, tokens, h)``; None without rotary embedding.
            attention_mask: the mask that the model made for its attention backend.
            past_key_values: a cache; it holds keys and values of the reduced widths.
            **kwargs: passed to the attention backend, except for arguments of the stock forward.

        Returns:
            the output, ``(batch, tokens, width)``, and the backend's attention weights or None.

        Raises:
            StateError: attention weights are requested.
        """
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        stock_arguments: tuple[str, ...] = self.__dict__["_arguments"]
        if args:
            named: dict[str, Any] = {
                "position_embeddings": position_embeddings,
                "attention_mask": attention_mask,
                "past_key_values": past_key_values,
            }
            named.update(zip(stock_arguments, args, strict=False))
            return self.forward(hidden_states, **named, **kwargs)
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            raise StateError(
                "transformers records attention weights by the class of the stock module, and would omit "
                "those of resized modules. Use the dense model, or the one that export(model, dir, 'dense') "
                "writes."
            )
        query, key, value = self._projected(hidden_states)
        if position_embeddings is not None:
            query, key = self._rotated(query, key, position_embeddings)
        if past_key_values is not None:
            cache = getattr(past_key_values, "self_attention_cache", past_key_values)
            key, value = cache.update(key, value, self.layer_idx)
        backend = self.config._attn_implementation
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(backend, self._eager_forward())
        if backend == "eager" and getattr(self, "reorder_and_upcast_attn", False):  # GPT-2's option
            query, key = query.float(), key.float()
        scaling = self.scaling
        if self.config.model_type in _SCALES_QUERIES:
            query, scaling = query * scaling, 1.0
        kwargs = {name: value for name, value in kwargs.items() if name not in stock_arguments}
        if hasattr(self, "sliding_window"):
            kwargs["sliding_window"] = self.sliding_window
        elif self.config.model_type in _WINDOW_OF_CONFIG:
            kwargs["sliding_window"] = getattr(self.config, "sliding_window", None)
        out, weights = attend(
            self, query, key, value, attention_mask,
            dropout=self._dropout() if self.training else 0.0, scaling=scaling, **kwargs,
        )  # fmt: skip
        out = out.reshape(*hidden_states.shape[:-1], -1).contiguous()
        if self.node.o:
            out = self._child(self.node.o)(out)
        if "resid_dropout" in self._modules:  # GPT-2's
            out = self._child("resid_dropout")(out)
        return out, weights

    def _child(self, name: str) -> nn.Module:
        return cast(nn.Module, self._modules[name])

    def _eager_forward(self) -> Any:
        """The eager attention function of the model family, if its file defines one."""
        family = sys.modules[type(self.__dict__["_shell"]).__module__]
        return getattr(family, "eager_attention_forward", None)

    @property
    def _key_heads(self) -> int:
        if self.node.qkv:
            stock = _stock_outputs(self._child(self.node.qkv))
            return heads.split_of(self, stock)[1] // heads.head_width(self)
        return _stock_outputs(self._child(self.node.k)) // heads.head_width(self)

    @property
    def _groups(self) -> int:
        """Number of query heads for each key head."""
        return int(getattr(self, "num_key_value_groups", 1))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, ``(batch, heads, tokens, width of a head)``."""
        node, key_heads = self.node, self._key_heads
        if node.qkv:
            query, key, value = torch.split(self._child(node.qkv)(x), list(node.split), -1)
        else:
            query, key, value = (self._child(name)(x) for name in (node.q, node.k, node.v))
        query = self._normed("q_norm", query.view(*x.shape[:-1], key_heads * self._groups, -1))
        key = self._normed("k_norm", key.view(*x.shape[:-1], key_heads, -1))
        value = value.view(*x.shape[:-1], key_heads, -1)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def _normed(self, norm: str, x: Tensor) -> Tensor:
        return self._child(norm)(x) if norm in self._modules else x

    def _rotated(self, query: Tensor, key: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rotate queries and keys by the angles of the dimensions that were kept."""
        cos, sin = (self._angles(part) for part in angles)
        key = _rotate(key, cos, sin)
        if self._groups > 1 and cos.shape[1] > 1:
            cos, sin = (part.repeat_interleave(self._groups, 1) for part in (cos, sin))
        return _rotate(query, cos, sin), key

    def _angles(self, part: Tensor) -> Tensor:
        """Select cosines or sines of the kept dimensions: ``(batch, heads or 1, tokens, width)``."""
        rows = getattr(self._child(self.node.qkv or self.node.k), "rows", None)
        if rows is None:
            return part.unsqueeze(1)
        if self.node.qkv:
            rows = torch.split(rows, list(self.node.split))[1]
        kept = (rows % heads.head_width(self)).view(self._key_heads, -1)
        return part[..., kept].transpose(1, 2)

    def _dropout(self) -> float:
        """The stock module's dropout probability for attention weights."""
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            dropout = getattr(self, name, None)
            if dropout is not None:
                return float(dropout.p if isinstance(dropout, nn.Dropout) else dropout)
        return 0.0


def _stock_outputs(projection: nn.Module) -> int:
    """The number of outputs of the stock projection."""
    shape = getattr(projection, "stock_shape", None)
    return cast(int, projection.out_features if shape is None else shape[0])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair ``(j, j + width/2)`` by its angle."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
