"""The hand-over contract: when a student may continue a cache that the full model wrote, and how it does.

A student attends to keys and values of the full model (OverFill, arXiv 2508.08446, section 3.1). That is meaningful
only if both models have the same KV geometry: layers, KV heads, head dim, which layers slide and how far, and the same
rotary embedding, because cached keys are already rotated. `check_hand_over` compares exactly these.

Two ways to continue:

- decoding: both models write and read one store of static tensors (`overfill.shared_cache`);
- training: `PrefixCache` holds the full model's prompt states as constants and lets each layer see
  [prefix, own states]. It never grows: `update` is a pure function of its arguments, so activation checkpointing may
  run a layer a second time. It can keep the student's own states of the first run, which the KV match compares with
  the full model's.

Letters: B batch, P prompt, L layers, H KV heads, K head dim, N new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

from overfill.errors import UserError


def head_dim(config: PretrainedConfig) -> int:
    """Channels per head, also where the config leaves it to be hidden size / heads."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_geometry(config: PretrainedConfig) -> dict[str, Any]:
    """What two models must share to share a cache, by the names of `config.json`."""
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * layers
    slides = "sliding_attention" in types
    return {
        "num_hidden_layers": layers,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": head_dim(config),
        "rope_parameters": getattr(config, "rope_parameters", None),
        "layer_types": list(types),
        "sliding_window": window if slides else None,
        "vocab_size": config.vocab_size,
    }


def check_hand_over(full: PretrainedConfig, student: PretrainedConfig) -> None:
    """Refuse two models that cannot share a cache.

    Raises:
        UserError: names the first field of the config in which they differ.
    """
    wanted, found = kv_geometry(full), kv_geometry(student)
    for field, value in wanted.items():
        if found[field] != value:
            raise UserError(
                f"student config: {field} is {found[field]}, the full model's is {value}; a student continues the full "
                "model's KV cache, so it may be narrower (hidden_size, intermediate_size) but must share this field"
            )


class PrefixLayer(CacheLayerMixin):
    """One layer's constant prefix [B, H, P, K]; `update` returns it followed by the new states, and does not grow."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, keep_new: bool) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True
        self.keep_new = keep_new
        self.new_keys: Tensor | None = None
        self.new_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: a prefix exists from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[B, H, N, K] -> [B, H, P + N, K], in the dtype of the new states."""
        if self.keep_new and self.new_keys is None:
            # Kept once: a recomputation under activation checkpointing must not replace the states of the first run,
            # which are those in the graph of the KV match.
            self.new_keys, self.new_values = key_states, value_states
        if self.get_seq_length() == 0:
            return key_states, value_states
        keys, values = self.keys.to(key_states.dtype), self.values.to(value_states.dtype)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(P + N, 0): every layer shows its whole prefix; a sliding window is the business of the mask."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """P."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class PrefixCache(Cache):
    """The full model's prompt states as a constant prefix for a student that is being trained.

    Use one object per forward pass. Without `keys` and `values` the prefix is empty: the student reads the prompt
    itself and the cache only keeps its states.
    """

    layers: list[PrefixLayer]

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], keep_new: bool) -> None:
        super().__init__(layers=[PrefixLayer(k, v, keep_new) for k, v in zip(keys, values, strict=True)])

    @classmethod
    def empty(cls, config: PretrainedConfig, batch: int, like: Tensor) -> PrefixCache:
        """A prefix of no tokens that keeps the new states; `like` gives dtype and device."""
        none = like.new_empty(batch, config.num_key_value_heads, 0, head_dim(config))
        layers = config.num_hidden_layers
        return cls([none] * layers, [none] * layers, keep_new=True)

    def new_states(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, H, N, K] per layer that the student wrote, in its graph.

        Raises:
            RuntimeError: asked for before a forward pass, or without `keep_new`.
        """
        states = [(layer.new_keys, layer.new_values) for layer in self.layers]
        if any(keys is None for keys, _ in states):
            raise RuntimeError("no new keys and values were kept: pass keep_new=True and run a forward pass first")
        return states  # type: ignore[return-value]
