"""A model that reads tokens into a shared store, eagerly or through a compiled step.

Reading one token per row costs what its bytes cost: all weights once. Eager PyTorch does not get there: on a GPU Python
launches kernels more slowly than they run, on a CPU the general matrix kernels read weights at half the speed of
memory. `compiled` is one graph per shape: CUDA graphs on a GPU; on a CPU inductor around linear layers of our own
(`overfill.fast_linear`), on the same weights. Passes over more than `FEW_TOKENS` tokens per row are bound by arithmetic
and run without a graph.

Letters: B batch, C columns, N tokens of a pass, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from overfill import huge_pages, kernels
from overfill.attention import NAME, ON_CPU, column_masks, our_attention
from overfill.errors import UserError
from overfill.fast_linear import WEIGHTS, fast_twin
from overfill.shared_cache import CacheView, KVStore, Place, Scatter

DECODERS = ("eager", "compiled", "auto")
FEW_TOKENS = 17
"""A compiled step reads at most so many tokens per row: a draft of 16 and the token before it."""
BLOCK = 64
"""A compiled step on a CPU sees the store up to a multiple of so many columns."""
GPU_BLOCK = 256
"""The same on a GPU, where every size is a CUDA graph of its own."""

_Step = Callable[[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]], Tensor]


def choose_decoder(wanted: str, device: torch.device) -> str:
    """`eager` or `compiled`, from `eager`, `compiled` or `auto`, which compiles where that is possible.

    Raises:
        UserError: no such decoder, or `compiled` where it is not possible; says why.
    """
    if wanted not in DECODERS:
        raise UserError(f"decoder: {wanted!r} is none of {', '.join(DECODERS)}")
    obstacle = None if wanted == "eager" else _obstacle(device)
    if wanted == "compiled" and obstacle:
        raise UserError(obstacle)
    return "eager" if wanted == "eager" or obstacle else "compiled"


def _obstacle(device: torch.device) -> str | None:
    if device.type == "cpu":
        try:
            kernels.load()
        except UserError as error:
            return str(error)
        return None
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "decoder: compiled needs triton on a GPU, which is not installed; use eager"
        return None
    return f"decoder: nothing is compiled for {device.type}; use eager"


class Reader:
    """A model, and how it reads a few tokens per row.

    Args:
        decoder: `eager` or `compiled`.
        weights: `stored`, or `int8` (on a CPU): see `overfill.fast_linear`.

    Compiled or rounded on a CPU, the model's weights move to another place in memory (`overfill.huge_pages`).

    Raises:
        UserError: these weights are not possible here, or kernels cannot be built.
    """

    def __init__(self, model: PreTrainedModel, decoder: str, weights: str = "stored") -> None:
        self.decoder = decoder
        self.compile_seconds = 0.0
        """Spent so far in building kernels and in first calls of a shape, in which it is compiled."""
        self._steps: dict[tuple[object, ...], _Step] = {}
        before = time.perf_counter()
        on_cpu = model.device.type == "cpu"
        if weights not in WEIGHTS:
            raise UserError(f"weights: {weights!r} is none of {', '.join(WEIGHTS)}")
        if weights == "int8" and not on_cpu:
            raise UserError(f"weights: int8 is for a CPU, not for {model.device.type}; use weights=stored")
        fast = on_cpu and (decoder == "compiled" or weights == "int8")
        self.source = model
        self.model = fast_twin(model, weights) if fast else model
        if fast:
            huge_pages.move(self.model)  # the weights that are stored are the model's own: it is moved, too
        self.attention = ON_CPU if on_cpu and decoder == "compiled" else NAME
        self.compile_seconds += time.perf_counter() - before

    def read(
        self,
        store: KVStore,
        tokens: Tensor,
        positions: Tensor,
        place: Place,
        mask: Any,
        last: bool = True,
    ) -> Tensor:
        """Read tokens [B, N] at position ids [B, N], eagerly; logits [B, 1, V] of the last, or [B, N, V] of all."""
        with our_attention(self.model, self.attention):
            return self.model(
                input_ids=tokens.to(self.model.device),
                attention_mask=_to(mask, self.model.device),
                position_ids=positions.to(self.model.device),
                past_key_values=CacheView(store, place),
                use_cache=True,
                logits_to_keep=1 if last else 0,
            ).logits

    def hidden(self, store: KVStore, tokens: Tensor, positions: Tensor, place: Place, mask: Any) -> Tensor:
        """The same without the head: final hidden states [B, N, width]."""
        with our_attention(self.model, self.attention):
            return self.model.base_model(
                input_ids=tokens.to(self.model.device),
                attention_mask=_to(mask, self.model.device),
                position_ids=positions.to(self.model.device),
                past_key_values=CacheView(store, place),
                use_cache=True,
            ).last_hidden_state

    def step(self, store: KVStore, valid: Tensor, padding: Tensor, tokens: Tensor, columns: Tensor, end: int) -> Tensor:
        """Read tokens [B, N] at each row's own columns [B, N], none of them at `end` or beyond; logits [B, N, V].

        Args:
            valid: bool [B, C], columns that may be attended to once they are written.
            padding: int64 [B], columns of padding before a row's first token.
        """
        if not self.compiles(tokens):
            seen = store.first(end)
            mask = column_masks(self.model.config, valid[:, :end], columns)
            return self.read(seen, tokens, columns - padding[:, None], Scatter(columns), mask, last=False)
        block = BLOCK if tokens.device.type == "cpu" else GPU_BLOCK
        seen = store.first(min(store.columns, -(-end // block) * block))
        return self._compiled(seen, valid[:, : seen.columns], padding, tokens, columns)

    def compiles(self, tokens: Tensor) -> bool:
        """Whether a step of tokens [B, N] runs as a graph: few enough, and all on one device."""
        return self.decoder == "compiled" and tokens.shape[1] <= FEW_TOKENS and tokens.device == self.model.device

    def _compiled(self, store: KVStore, valid: Tensor, padding: Tensor, tokens: Tensor, columns: Tensor) -> Tensor:
        columns_of_graph = 0 if tokens.device.type == "cpu" else store.columns
        key = (*tokens.shape, columns_of_graph, store.keys[0].dtype)
        known = key in self._steps
        before = time.perf_counter()
        if not known:
            self._steps[key] = compile_step(self.model, tokens.device)
        tokens, columns, valid, padding = (_packed(tensor) for tensor in (tokens, columns, valid, padding))
        if tokens.device.type == "cpu":
            _mark_dynamic(store, valid)
        else:
            for states in (*store.keys, *store.values):
                torch._dynamo.mark_static_address(states)  # or every token would copy the cache into the graph's own
            torch.compiler.cudagraph_mark_step_begin()
        with our_attention(self.model, self.attention):
            logits = self._steps[key](tokens, columns, valid, padding, store.keys, store.values)
        if not known:
            self.compile_seconds += time.perf_counter() - before
        return logits if tokens.device.type == "cpu" else logits.clone()  # the next replay writes over a graph's output


def compile_step(model: PreTrainedModel, device: torch.device) -> _Step:
    """A graph that reads tokens [B, N] at columns [B, N] into a store; logits [B, N, V]."""

    def step(
        tokens: Tensor, columns: Tensor, valid: Tensor, padding: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        return model(
            input_ids=tokens,
            attention_mask=column_masks(model.config, valid, columns),
            position_ids=torch.where(valid.gather(1, columns), columns - padding[:, None], 0),
            past_key_values=CacheView(KVStore(keys, values), Scatter(columns)),
            use_cache=True,
        ).logits

    # PyTorch counts compilations per code object, and refuses after eight: every shape gets one of its own.
    own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, step.__defaults__, step.__closure__)
    if device.type != "cpu":
        return torch.compile(own, fullgraph=True, dynamic=False, mode="reduce-overhead")
    # Asking every token whether each weight is still what it was costs 1 % of a step; whoever calls keeps a graph for
    # every shape and dtype, and the layout is the same.
    unguarded = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    return torch.compile(own, fullgraph=True, dynamic=False, options=unguarded)


def _mark_dynamic(store: KVStore, valid: Tensor) -> None:
    """One graph for every length of the store: nothing but the attention kernel depends on it."""
    for tensor in (*store.keys, *store.values):
        torch._dynamo.mark_dynamic(tensor, 2)
    torch._dynamo.mark_dynamic(valid, 1)


def _packed(tensor: Tensor) -> Tensor:
    """The same values in a layout that depends on nothing but the shape."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _to(mask: Any, device: torch.device) -> Any:
    if isinstance(mask, dict):
        return {name: part.to(device) for name, part in mask.items()}
    return None if mask is None else mask.to(device)
