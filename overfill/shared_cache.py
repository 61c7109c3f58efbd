"""The cache that both models write and read: static tensors, sized once.

The full model writes its keys and values where the student reads them, so nothing is handed over, and nothing grows: a
`KVStore` has C columns from the start, and every forward pass sees it through a `CacheView` that says which columns the
pass fills. Writing a column again replaces it, which is all that a KV refresh and the rejection of a draft need.

Letters: B batch, C columns, H KV heads, K head dim, N tokens of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin

from overfill.kv_cache import head_dim


@dataclass
class KVStore:
    """Keys and values of all layers, each [B, H, C, K]."""

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def allocate(
        cls, config: PretrainedConfig, batch: int, columns: int, dtype: torch.dtype, device: torch.device
    ) -> KVStore:
        """An empty store. Zeros, since what a mask hides is still multiplied by zero and must be finite.

        Columns are outermost in memory, so that the strides of a view of some of them do not depend on how many there
        are: a compiled step takes them for constants."""
        shape = (columns, batch, config.num_key_value_heads, head_dim(config))

        def side() -> list[Tensor]:
            layers = range(config.num_hidden_layers)
            return [torch.zeros(shape, dtype=dtype, device=device).permute(1, 2, 0, 3) for _ in layers]

        return cls(side(), side())

    @property
    def columns(self) -> int:
        """C."""
        return self.keys[0].shape[2]

    def repeat(self, times: int | Tensor) -> KVStore:
        """Each row `times` times, next to each other, or with int64 [B] each row as often as it says; a copy."""

        def repeated(states: Tensor) -> Tensor:
            return states.permute(2, 0, 1, 3).repeat_interleave(times, dim=1).permute(1, 2, 0, 3)

        return KVStore(*([repeated(states) for states in side] for side in (self.keys, self.values)))

    def first(self, columns: int) -> KVStore:
        """A view of the first columns."""
        return KVStore(*([t[:, :, :columns] for t in side] for side in (self.keys, self.values)))

    def as_dynamic(self, config: PretrainedConfig, columns: int) -> DynamicCache:
        """The first columns as a cache that `transformers` models can go on with; nothing is copied."""
        pairs = zip(self.keys, self.values, strict=True)
        return DynamicCache([(k[:, :, :columns], v[:, :, :columns]) for k, v in pairs], config=config)


class Place(Protocol):
    """Which columns a pass fills."""

    def write(self, store: Tensor, new: Tensor) -> Tensor:
        """Put new states [B, H, N, K] into a store [B, H, C, K]; returns the states that the pass may attend to, in the
        new states' dtype and on their device."""
        ...


@dataclass(frozen=True)
class Span:
    """The same columns, start to stop, in every row."""

    start: int
    stop: int

    def write(self, store: Tensor, new: Tensor) -> Tensor:
        """Returns the columns up to `stop`; of a pass that starts at 0 its own states, as exact as they came."""
        store[:, :, self.start : self.stop].copy_(new)
        return new if self.start == 0 else store[:, :, : self.stop].to(new.device, new.dtype)


@dataclass(frozen=True)
class Scatter:
    """Columns [B, N] of each row's own."""

    columns: Tensor

    def write(self, store: Tensor, new: Tensor) -> Tensor:
        """Returns the whole store."""
        columns = self.columns.to(store.device)
        rows = torch.arange(len(columns), device=store.device)[:, None]
        store[rows, :, columns] = new.transpose(1, 2).to(store.device, store.dtype)
        return store.to(new.device, new.dtype)


class ViewLayer(CacheLayerMixin):
    """One layer's keys and values as a forward pass sees them."""

    is_sliding = False
    is_compileable = True

    def __init__(self, keys: Tensor, values: Tensor, place: Place) -> None:
        super().__init__()
        self.keys, self.values, self.place = keys, values, place
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, H, N, K] where the pass belongs; returns what it may attend to."""
        return self.place.write(self.keys, key_states), self.place.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not asked for: masks are made in `overfill.attention`."""
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """Not known here: rows may stand at different columns. Positions are given with each pass."""
        return 0

    def get_max_length(self) -> int:
        """C."""
        return self.keys.shape[2]


class CacheView(Cache):
    """A store as one forward pass sees it. Use one object per pass."""

    def __init__(self, store: KVStore, place: Place) -> None:
        pairs = zip(store.keys, store.values, strict=True)
        super().__init__(layers=[ViewLayer(keys, values, place) for keys, values in pairs])
