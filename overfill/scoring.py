"""Log-probabilities of given responses, token by token, as the system that generates them would assign them.

For OverFill the first token is scored by the full model and the others by the student on the full model's cache; for a
model alone (`Engine(model, model)`) all by that model. The sum over a response is what the decode loop would have seen.
Logits exist for one piece of the tokens at a time.

Letters: B batch, R response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from overfill.batch import PromptResponseBatch
from overfill.dial import Refresh
from overfill.engine import DecodeState, Engine
from overfill.refresh import Refresher


@dataclass(frozen=True)
class ResponseScores:
    """Scores of a batch of responses."""

    logprobs: Tensor
    """fp32 [B, R]: natural log-probability of each response token given all before it; 0 at padding."""
    greedy: Tensor
    """int64 [B, R]: the token that the system finds most probable there; void at padding."""
    mask: Tensor
    """bool [B, R]: the batch's response mask."""

    @property
    def nll(self) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood summed over the batch's tokens, and their number."""
        return -self.logprobs.sum(), self.mask.sum()

    @property
    def row_logprobs(self) -> Tensor:
        """fp32 [B]: log-probability of each response."""
        return self.logprobs.sum(1)


@torch.no_grad()
def score_responses(
    engine: Engine, batch: PromptResponseBatch, tokens_per_chunk: int = 1024, refresh: Refresh | None = None
) -> ResponseScores:
    """Score the responses of a batch under teacher forcing.

    Args:
        tokens_per_chunk: logits are computed for this many tokens at a time; bounds memory, never changes the result.
        refresh: as when generating; gated by entropy, tokens are read one at a time.
    """
    batch = batch.to(engine.device)
    targets, mask = batch.response_ids, batch.response_mask
    first, state = engine.prefill(batch.prompt_ids, batch.prompt_mask, batch.response_width)
    logprobs = torch.zeros(targets.shape, device=targets.device)
    greedy = torch.zeros_like(targets)
    logprobs[:, 0], greedy[:, 0] = _score(first, targets[:, 0])
    for start, hidden, head in _pieces(engine, state, batch, refresh):
        later = mask[:, start : start + hidden.shape[1]].nonzero(as_tuple=True)
        for rows, columns in zip(*(part.split(tokens_per_chunk) for part in later), strict=True):
            to = (rows, columns + start)
            logprobs[to], greedy[to] = _score(head(hidden[rows, columns]), targets[to])
    return ResponseScores(logprobs.where(mask, 0.0), greedy, mask)


def _pieces(
    engine: Engine, state: DecodeState, batch: PromptResponseBatch, refresh: Refresh | None
) -> Iterator[tuple[int, Tensor, Callable[[Tensor], Tensor]]]:
    """What predicts response tokens from column `start` on: (start, states [B, N, width], states -> logits)."""
    read = batch.response_ids[:, :-1]
    if refresh is None:
        yield 1, engine.decode_given(state, read), engine.decode_head
        return
    refresher = Refresher(engine, refresh, state)
    if refresh.every is None:
        for column in range(read.shape[1]):
            logits = refresher.next_logits(state, batch.read_ids, batch.response_mask[:, column + 1])
            yield column + 1, logits[:, None], _unchanged
        return
    for start in range(0, read.shape[1], refresh.every):
        student = read[:, start : start + refresh.every - 1]
        if student.shape[1]:
            yield start + 1, engine.decode_given(state, student), engine.decode_head
        stop = start + refresh.every
        if stop <= read.shape[1]:
            logits = engine.full_reads(state, read[:, start:stop], batch.prompt_width + start)
            yield stop, logits[:, None], _unchanged


def _unchanged(logits: Tensor) -> Tensor:
    return logits


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the most probable token, [N, V] and [N] -> [N] and [N]."""
    logprobs = logits.float().log_softmax(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), logits.argmax(-1)
