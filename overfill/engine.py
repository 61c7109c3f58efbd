"""Prefill and decode: the two steps of generation, each by its own model.

`Engine(full, student)` is OverFill: the full model reads the prompt in parallel and the student writes on its cache
(arXiv 2508.08446, figure 1). `Engine(model, model)` is that model alone. All systems run this same code, so that what
is measured between them is the models and not the loop around them.

A `DecodeState` is what one step leaves to the next: the cache, where each row stands, and which columns are padding.

Letters: B batch, P prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from overfill.batch import positions_of
from overfill.kv_cache import check_hand_over, hand_over


@dataclass
class DecodeState:
    """Between two decode steps. Grows in place."""

    cache: DynamicCache
    """Keys and values of all columns so far."""
    positions: Tensor
    """int64 [B, 1]: position id of the next token."""
    mask: Tensor | None
    """bool [B, columns so far]; None while no row has padding, which spares building an attention mask."""

    def advance(self, tokens: int) -> None:
        """Make room for the next `tokens` columns, all of them real."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), tokens)], dim=1)
        self.positions = self.positions + tokens

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times, next to each other."""
        self.cache.batch_repeat_interleave(times)
        self.positions = self.positions.repeat_interleave(times, dim=0)
        if self.mask is not None:
            self.mask = self.mask.repeat_interleave(times, dim=0)


class Engine:
    """Two models with the same KV geometry, or one model twice.

    Raises:
        UserError: the models cannot share a cache.
    """

    def __init__(self, prefill_model: PreTrainedModel, decode_model: PreTrainedModel) -> None:
        check_hand_over(prefill_model.config, decode_model.config)
        self.prefill_model = prefill_model
        self.decode_model = decode_model

    @property
    def device(self) -> torch.device:
        """Where prompts go in and tokens come out."""
        return self.decode_model.device

    @property
    def max_positions(self) -> int:
        """The longest sequence, prompt and response, that both models have positions for."""
        return min(model.config.max_position_embeddings for model in (self.prefill_model, self.decode_model))

    @torch.no_grad()
    def prefill(self, prompt_ids: Tensor, prompt_mask: Tensor) -> tuple[Tensor, DecodeState]:
        """Read left-padded prompts [B, P]; logits [B, V] of the first new token, and the state to decode from."""
        model = self.prefill_model
        mask = None if bool(prompt_mask.all()) else prompt_mask
        output = model(
            input_ids=prompt_ids.to(model.device),
            attention_mask=None if mask is None else mask.to(model.device),
            position_ids=positions_of(prompt_mask).to(model.device),
            past_key_values=DynamicCache(config=model.config),
            use_cache=True,
            logits_to_keep=1,
        )
        cache = hand_over(output.past_key_values, self.decode_model.dtype, self.device)
        positions = prompt_mask.sum(1, keepdim=True).to(self.device)
        state = DecodeState(cache, positions, None if mask is None else mask.to(self.device))
        return output.logits[:, -1].to(self.device), state

    @torch.no_grad()
    def decode_one(self, state: DecodeState, tokens: Tensor) -> Tensor:
        """Read one token per row [B], in place on the state; logits [B, V] of the next."""
        positions = state.positions
        state.advance(1)
        output = self.decode_model(
            input_ids=tokens[:, None],
            attention_mask=state.mask,
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    @torch.no_grad()
    def decode_given(self, state: DecodeState, tokens: Tensor) -> Tensor:
        """Read N given tokens per row [B, N] at once, in place on the state; final hidden states [B, N, width].

        Teacher forcing: equal to N times `decode_one`. Rows may be padded on the right; what follows padding is void.
        """
        positions = state.positions + torch.arange(tokens.shape[1], device=tokens.device)
        state.advance(tokens.shape[1])
        return self.decode_model.base_model(
            input_ids=tokens,
            attention_mask=state.mask,
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
        ).last_hidden_state

    def decode_head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of the decoding model's hidden states [..., width]."""
        return self.decode_model.get_output_embeddings()(hidden)
