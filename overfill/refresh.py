"""KV refresh: the full model re-reads what the student wrote, and its keys and values replace the student's.

Between never asking the full model again and asking it for every token lies this dial. A refresh reads all tokens
since the last one in parallel, the newest included, so it costs about one decode step of the full model, and the token
after it is the full model's choice, as the first token is.

- `64`: every 64 tokens. The student never reads the token that a refresh reads.
- `"entropy>2.0"`: when the student's distribution of the next token has more than 2 nats of entropy, row by row; the
  full model then chooses this token instead.

Letters: B batch, N tokens, V vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from overfill.attention import column_masks
from overfill.engine import DecodeState, Engine
from overfill.errors import UserError
from overfill.shared_cache import Scatter


@dataclass(frozen=True)
class Refresh:
    """When to refresh; exactly one of the two is set."""

    every: int | None = None
    """Tokens between refreshes, at least 1."""
    entropy: float | None = None
    """Nats."""

    @classmethod
    def parse(cls, value: int | str | None) -> Refresh | None:
        """`64`, `"64"`, `"entropy>2.0"`; None, `"none"` for no refresh.

        Raises:
            UserError: anything else.
        """
        text = str(value).strip().lower()
        if text == "none":
            return None
        gate = re.fullmatch(r"entropy\s*>\s*(\d+(?:\.\d*)?|\.\d+)", text)
        if gate:
            return cls(entropy=float(gate.group(1)))
        if isinstance(value, bool) or not re.fullmatch(r"[1-9]\d*", text):
            raise UserError(f"refresh: {value!r} is not a number of tokens (64), entropy>NATS (entropy>2.0) or none")
        return cls(every=int(text))


class Refresher:
    """Decodes one generation with refreshes."""

    def __init__(self, engine: Engine, refresh: Refresh, state: DecodeState) -> None:
        self.engine = engine
        self.refresh = refresh
        self.fresh = torch.full_like(state.padding, state.length)
        """int64 [B]: columns before this one hold the full model's states."""
        self.count = 0
        """Rows refreshed so far."""

    def next_logits(self, state: DecodeState, ids: Tensor, unfinished: Tensor) -> Tensor:
        """Read the token at column `state.length` of `ids` [B, >= length + 1]; logits [B, V] of the next.

        Rows that are finished are never the reason for a refresh."""
        column = state.length
        if self.refresh.every is not None:
            start = int(self.fresh[0])
            if column + 1 - start < self.refresh.every:
                return self.engine.decode_one(state, ids[:, column])
            self.fresh.fill_(column + 1)
            self.count += int(unfinished.sum())
            return self.engine.full_reads(state, ids[:, start : column + 1], start)
        logits = self.engine.decode_one(state, ids[:, column])
        unsure = (entropy(logits) > self.refresh.entropy) & unfinished
        if not bool(unsure.any()):
            return logits
        return torch.where(unsure[:, None], self._reread(state, ids, unsure), logits)

    def _reread(self, state: DecodeState, ids: Tensor, rows: Tensor) -> Tensor:
        """The full model reads what is not fresh in `rows` (bool [B]); logits [B, V], void in other rows.

        Rows wait for different numbers of tokens: they are aligned at the newest, and what is not theirs to read again
        is written to the column that nobody attends to."""
        self.count += int(rows.sum())
        first = int(self.fresh[rows].min())
        columns = torch.arange(first, state.length, device=ids.device).expand(len(ids), -1)
        stale = rows[:, None] & (columns >= self.fresh[:, None])
        columns = torch.where(stale, columns, state.store.columns - 1)
        self.fresh = torch.where(rows, state.length, self.fresh)
        full = self.engine.full
        logits = full.read(
            state.store,
            ids[:, first : state.length],
            columns - state.padding[:, None],
            Scatter(columns),
            column_masks(full.model.config, state.valid, columns),
        )
        return logits[:, -1].to(self.engine.device)


def entropy(logits: Tensor) -> Tensor:
    """Entropy [B] in nats of the distributions with logits [B, V]."""
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)
