"""KV refresh: the full model re-reads what the student wrote, and its keys and values replace the student's.

A refresh reads all tokens since the last one in parallel, the newest included, so it costs about one decode step of
the full model, and the token after it is the full model's choice, as the first token is. When is `overfill.dial`'s to
say: every so many tokens (the student then never reads the token that a refresh reads), or when the student is unsure
of the next token, row by row, and the full model then chooses this token instead.

Letters: B batch, N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from overfill.attention import column_masks
from overfill.dial import Refresh
from overfill.engine import DecodeState, Engine
from overfill.shared_cache import Scatter


class Refresher:
    """Decodes one generation with refreshes."""

    def __init__(self, engine: Engine, refresh: Refresh, state: DecodeState) -> None:
        self.engine = engine
        self.refresh = refresh
        self.fresh = torch.full_like(state.padding, state.length)
        """int64 [B], when gated by entropy: columns before this one hold the full model's states."""
        self._start = state.length  # the same for all rows, when every so many tokens
        self.count = 0
        """Rows refreshed so far."""

    def next_logits(self, state: DecodeState, ids: Tensor, unfinished: Tensor) -> Tensor:
        """Read the token at column `state.length` of `ids` [B, >= length + 1]; logits [B, V] of the next.

        Rows that are finished are never the reason for a refresh."""
        column = state.length
        if self.refresh.every is not None:
            start = self._start
            if column + 1 - start < self.refresh.every:
                return self.engine.decode_one(state, ids[:, column])
            self._start = column + 1
            self.count += int(unfinished.sum())
            return self.engine.full_reads(state, ids[:, start : column + 1], start)
        logits = self.engine.decode_one(state, ids[:, column])
        assert self.refresh.entropy is not None  # one of the two is set
        unsure = (entropy(logits) > self.refresh.entropy) & unfinished
        if not bool(unsure.any()):
            return logits
        return torch.where(unsure[:, None], self._reread(state, ids, unsure), logits)

    def _reread(self, state: DecodeState, ids: Tensor, rows: Tensor) -> Tensor:
        """The full model reads what is not fresh in `rows` (bool [B]); logits [B, V], void in other rows.

        Rows wait for different numbers of tokens: they are aligned at the newest, and what is not theirs to read again
        is written to the next column, which nobody attends to before it is written anew."""
        self.count += int(rows.sum())
        first = int(self.fresh[rows].min())
        columns = torch.arange(first, state.length, device=ids.device).expand(len(ids), -1)
        stale = rows[:, None] & (columns >= self.fresh[:, None])
        end = state.length + 1
        positions = torch.where(stale, columns - state.padding[:, None], 0)
        columns = torch.where(stale, columns, state.length)
        self.fresh = torch.where(rows, state.length, self.fresh)
        full = self.engine.full
        logits = full.read(
            state.store.first(end),
            ids[:, first : state.length],
            positions,
            Scatter(columns),
            column_masks(full.model.config, state.valid[:, :end], columns),
        )
        return logits[:, -1].to(self.engine.device)


def entropy(logits: Tensor) -> Tensor:
    """Entropy [B] in nats of the distributions with logits [B, V]."""
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
