"""Sizes of attention heads, computed from a stock attention module."""

from __future__ import annotations

from typing import Any, cast

from torch import nn


def split_of(attention: nn.Module, outputs: int) -> tuple[int, int, int]:
    """Return how many of a fused projection's outputs are queries, keys and values.

    Args:
        attention: the stock attention module.
        outputs: number of outputs of the projection.
    """
    queries = cast(Any, attention).config.num_attention_heads * head_width(attention)
    keys = (outputs - queries) // 2
    return queries, keys, keys


def head_width(attention: nn.Module) -> int:
    """Return the width of a stock attention module's heads."""
    width = getattr(attention, "head_dim", None)
    return int(cast(Any, attention).attention_head_size if width is None else width)
