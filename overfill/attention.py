"""Attention over a shared store: masks in terms of columns, and grouped queries without repeating keys.

A query at column c sees the columns up to c that hold real tokens, and with a sliding window of w only the last w of
them. Real tokens of a row are contiguous, so distances in columns are distances in positions.

With a mask, `transformers` repeats the keys and values of grouped-query attention as often as heads share them, except
for a single query outside of a compiled graph. When decoding, that is several times the cache in memory traffic per
token; here the queries of a group are stacked instead and the cache is read once.

Letters: B batch, C columns, N tokens of a pass, Q query heads, H KV heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from overfill.kv_cache import kv_geometry

NAME, ON_CPU = "overfill_grouped", "overfill_grouped_cpu"
"""Our attention functions: of PyTorch's kernels, and with the one of `overfill.kernels`."""
STACKED_QUERIES = 256
"""Up to so many stacked queries the mask, which is stacked too, costs next to nothing."""

Mask = Tensor | dict[str, Tensor] | None


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention, as a `transformers` attention function.

    Args:
        query: [B, Q, N, K]. key, value: [B, H, C, K]. attention_mask: bool [B, 1, N, C], true where a query may look;
            None: causal, with C = N, or a single query that may look everywhere.

    Returns:
        [B, N, Q, K] and None.
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None or groups * length > STACKED_QUERIES:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    stacked = query.reshape(batch, key.shape[1], groups * length, width)
    mask = attention_mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    return out.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


def grouped_attention_on_cpu(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The same through the kernel of `overfill.kernels` where it fits: few queries with a mask over a bf16 cache."""
    _, heads, length, width = query.shape
    few = heads // key.shape[1] * length <= STACKED_QUERIES
    if attention_mask is None or not few or key.dtype != torch.bfloat16 or query.dtype != key.dtype or width % 16:
        return grouped_attention(module, query, key, value, attention_mask, scaling, **kwargs)
    scale = width**-0.5 if scaling is None else scaling
    return torch.ops.overfill.grouped_attention(query, key, value, attention_mask, scale), None


AttentionInterface.register(NAME, grouped_attention)
AttentionInterface.register(ON_CPU, grouped_attention_on_cpu)


@contextmanager
def our_attention(model: PreTrainedModel, name: str = NAME) -> Iterator[None]:
    """Inside, the model attends through one of our functions, whatever it was loaded with."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def column_masks(config: PretrainedConfig, valid: Tensor, columns: Tensor) -> Mask:
    """Masks of queries at columns [B, N] over a store whose real columns are `valid` [B, C], as the model takes them.

    A query always sees its own column, so that padding, whose result nobody reads, stays finite."""
    index = torch.arange(valid.shape[1], device=valid.device)
    here = columns[:, :, None]
    seen = (valid[:, None, :] & (index <= here)) | (index == here)
    geometry = kv_geometry(config)
    types, window = set(geometry["layer_types"]), geometry["sliding_window"]
    if window is None or "sliding_attention" not in types:
        return seen[:, None]
    near = (seen & (index > here - window))[:, None]
    return near if len(types) == 1 else {"full_attention": seen[:, None], "sliding_attention": near}


def window_of(config: PretrainedConfig) -> int | None:
    """Width of the sliding window of any layer; None where all layers see everything."""
    return kv_geometry(config)["sliding_window"]
