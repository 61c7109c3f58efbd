"""Prefill and decode: the two steps of generation, each by its own model, on one cache.

`Engine(full, student)` is OverFill: the full model reads the prompt in parallel and the student writes on its cache
(arXiv 2508.08446, figure 1). `Engine(model, model)` is that model alone. All systems run this same code, so that what
is measured between them is the models and not the loop around them.

A `DecodeState` is what one step leaves to the next: the store, how far it is filled, and which columns are padding.
Prompts are left padded, so column P is the first new token's in every row.

Letters: B batch, C columns, P prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from overfill.attention import Mask, column_masks, window_of
from overfill.batch import positions_of
from overfill.kv_cache import check_hand_over
from overfill.reader import GPU_BLOCK, Reader, choose_decoder
from overfill.shared_cache import KVStore, Span

PREFILL_TOKENS = 8192
"""Tokens of a batch that are prefilled at once unless told otherwise: bounds what a long prompt needs beside its cache."""


@dataclass
class DecodeState:
    """Between two decode steps. Changes in place."""

    store: KVStore
    """Keys and values; the last column is never valid: what nobody shall read is written there."""
    valid: Tensor
    """bool [B, C]: columns that may be attended to once they are written."""
    padding: Tensor
    """int64 [B]: columns of padding before a row's first token."""
    length: int
    """Columns read so far, the same in every row."""
    padded: bool
    """Whether any row has padding; without, most passes need no mask."""

    @property
    def room(self) -> int:
        """Tokens that can still be read."""
        return self.store.columns - 1 - self.length

    def repeat(self, times: int | Tensor) -> None:
        """Repeat each row `times` times, next to each other; with int64 [B] each row as often as it says."""
        self.store = self.store.repeat(times)
        self.valid = self.valid.repeat_interleave(times, dim=0)
        self.padding = self.padding.repeat_interleave(times, dim=0)

    def columns(self, tokens: int) -> Tensor:
        """int64 [B, tokens]: the next columns."""
        span = torch.arange(self.length, self.length + tokens, device=self.padding.device)
        return span.expand(len(self.padding), tokens)


class Engine:
    """Two models with the same KV geometry, or one model twice.

    Args:
        decoder: how tokens are read one at a time: `eager`, `compiled` (see `overfill.reader`), or `auto`, compiled
            where that is possible. `self.decoder` says what it came to.
        weights: how the decoding model's are read: `stored`, or `int8` (on a CPU).
        readers: readers of models by `id`, of this decoder and with weights as stored, that other engines have made:
            what is there is taken, what is not is added. A model is then compiled once for all of them.

    Raises:
        UserError: the models cannot share a cache, or cannot be compiled here.
    """

    def __init__(
        self,
        prefill_model: PreTrainedModel,
        decode_model: PreTrainedModel,
        decoder: str = "eager",
        weights: str = "stored",
        readers: dict[int, Reader] | None = None,
    ) -> None:
        check_hand_over(prefill_model.config, decode_model.config)
        self.prefill_model = prefill_model
        self.decode_model = decode_model
        before = time.perf_counter()
        self.decoder = choose_decoder(decoder, decode_model.device)
        self._building = time.perf_counter() - before
        self._kept_store: KVStore | None = None
        readers = {} if readers is None else readers
        self.full = self._reader(prefill_model, readers)
        same = weights == "stored"
        self.student = self._reader(decode_model, readers) if same else Reader(decode_model, self.decoder, weights)

    @property
    def device(self) -> torch.device:
        """Where prompts go in and tokens come out."""
        return self.decode_model.device

    @property
    def compile_seconds(self) -> float:
        """Time spent building kernels and compiling so far."""
        return self._building + sum(reader.compile_seconds for reader in {self.full, self.student})

    @property
    def max_positions(self) -> int:
        """The longest sequence, prompt and response, that both models have positions for."""
        return min(model.config.max_position_embeddings for model in (self.prefill_model, self.decode_model))

    @torch.no_grad()
    def prefill(
        self, prompt_ids: Tensor, prompt_mask: Tensor, room: int, chunk: int | None = None
    ) -> tuple[Tensor, DecodeState]:
        """Read left-padded prompts [B, P]; logits [B, V] of the first new token, and the state to decode from.

        Args:
            room: columns for new tokens.
            chunk: prompt columns that are read at once; None: as many as make `PREFILL_TOKENS` tokens of the batch.
        """
        batch, width = prompt_ids.shape
        device = self.device
        store = self._store(batch, width + room + 1)
        valid = torch.ones(batch, store.columns, dtype=torch.bool, device=device)
        valid[:, :width] = prompt_mask.to(device)
        valid[:, -1] = False
        padded = not bool(prompt_mask.all())
        padding = (~prompt_mask).sum(1).to(device)
        state = DecodeState(store, valid, padding, 0, padded)
        positions = positions_of(prompt_mask)
        starts = range(0, width, chunk or max(1, PREFILL_TOKENS // batch))
        for start, stop in pairwise(starts):
            part, where = prompt_ids[:, start:stop], positions[:, start:stop]
            self.full.hidden(store, part, where, Span(start, stop), self._mask(state, start, stop))
        start = starts[-1]
        part, where = prompt_ids[:, start:], positions[:, start:]
        logits = self.full.read(store, part, where, Span(start, width), self._mask(state, start, width))
        state.length = width
        return logits[:, -1].to(device), state

    @torch.no_grad()
    def decode_one(self, state: DecodeState, tokens: Tensor) -> Tensor:
        """The student reads one token per row [B], in place on the state; logits [B, V] of the next."""
        self._need(state, 1)
        stop = state.length + 1
        if self.decoder == "eager":
            mask = self._mask(state, state.length, stop)
            positions = state.columns(1) - state.padding[:, None]
            logits = self.student.read(state.store, tokens[:, None], positions, Span(state.length, stop), mask)
        else:
            logits = self.student.step(state.store, state.valid, state.padding, tokens[:, None], state.columns(1), stop)
        state.length = stop
        return logits[:, -1]

    @torch.no_grad()
    def decode_given(self, state: DecodeState, tokens: Tensor) -> Tensor:
        """The student reads N given tokens per row [B, N] at once, in place on the state; hidden states [B, N, width].

        Teacher forcing: equal to N times `decode_one`. Rows may be padded on the right; what follows padding is void.
        """
        self._need(state, tokens.shape[1])
        stop = state.length + tokens.shape[1]
        positions = state.columns(tokens.shape[1]) - state.padding[:, None]
        place, mask = Span(state.length, stop), self._mask(state, state.length, stop)
        state.length = stop
        return self.student.hidden(state.store, tokens, positions, place, mask)

    @torch.no_grad()
    def full_reads(self, state: DecodeState, tokens: Tensor, start: int) -> Tensor:
        """The full model reads tokens [B, N] at columns from `start` on, over whatever the student wrote there; logits
        [B, V] of the token after them."""
        stop = start + tokens.shape[1]
        positions = torch.arange(start, stop, device=self.device) - state.padding[:, None]
        logits = self.full.read(state.store, tokens, positions, Span(start, stop), self._mask(state, start, stop))
        state.length = stop
        return logits[:, -1].to(self.device)

    def decode_head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the decoding model's hidden states [..., width]."""
        return self.student.model.get_output_embeddings()(hidden)

    def as_dynamic(self, state: DecodeState, columns: int) -> DynamicCache:
        """The first columns as a cache of `transformers`: a view, or a copy where the store will be used again."""
        store = state.store
        if store is self._kept_store:
            store = KVStore([keys.clone() for keys in store.keys], [values.clone() for values in store.values])
        return store.as_dynamic(self.decode_model.config, columns)

    def _store(self, batch: int, columns: int) -> KVStore:
        """An empty store. A CUDA graph reads and writes fixed addresses: there the last store is used again if it fits,
        and what a generation returns of it is a copy (`overfill.decode_loop`)."""
        model = self.decode_model
        if self.decoder == "eager" or self.device.type != "cuda":
            return KVStore.allocate(model.config, batch, columns, model.dtype, self.device)
        columns = -(-columns // GPU_BLOCK) * GPU_BLOCK
        kept = self._kept_store
        if kept is None or (len(kept.keys[0]), kept.columns) != (batch, columns):
            kept = self._kept_store = KVStore.allocate(model.config, batch, columns, model.dtype, self.device)
        return kept

    def _reader(self, model: PreTrainedModel, readers: dict[int, Reader]) -> Reader:
        if id(model) not in readers:
            readers[id(model)] = Reader(model, self.decoder if model.device == self.device else "eager")
        return readers[id(model)]  # which keeps the model, and so its id

    def _mask(self, state: DecodeState, start: int, stop: int) -> Mask:
        """The mask of a pass over columns start to stop; None where causality is all that it would say."""
        window = window_of(self.decode_model.config)
        plain = not state.padded and (start == 0 or stop - start == 1) and (window is None or stop <= window)
        if plain:
            return None
        span = torch.arange(start, stop, device=state.valid.device).expand(len(state.valid), stop - start)
        return column_masks(self.decode_model.config, state.valid[:, :stop], span)

    def _need(self, state: DecodeState, tokens: int) -> None:
        if tokens > state.room:
            raise ValueError(f"the state has room for {state.room} tokens, not for {tokens}: prefill with more `room`")
