"""Log-probabilities of given responses, token by token, as the system that generates them would assign them.

For OverFill the first token is scored by the full model and the others by the student on the full model's cache; for a
model alone (`Engine(model, model)`) all by that model. The sum over a response is what the decode loop would have seen.
Logits exist for one piece of the tokens at a time. Continuations of one context share its reading: the full model reads
it once, and every continuation gets a copy of its keys and values.

Letters: B batch, R response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    first, state = engine.prefill(batch.prompt_ids, batch.prompt_mask, batch.response_width)
    return _score_read(engine, first, state, batch, tokens_per_chunk, refresh)


@dataclass(frozen=True)
class ScoredContext:
    """A context and what may follow it, as token ids."""

    context: Sequence[int]
    """At least one token."""
    given: Sequence[int]
    """Tokens after the context that are scored and yet part of the prompt: the full model reads them too. A chat
    template's white space after the assistant's header is such, where a scorer counts it to the answer."""
    continuations: Sequence[Sequence[int]]
    """At least one, each with at least one token: what is scored behind context and given tokens."""


@torch.no_grad()
def score_continuations(
    engine: Engine,
    contexts: Sequence[ScoredContext],
    pad_id: int,
    tokens_per_chunk: int = 1024,
    refresh: Refresh | None = None,
) -> list[list[tuple[float, bool]]]:
    """Score continuations, each context read once.

    Args:
        contexts: all with the same number of given tokens.
        tokens_per_chunk, refresh: as for `score_responses`.

    Returns:
        For each context and continuation the log-probability of given tokens and continuation together, in nats, and
        whether the system would write exactly them when it decodes greedily.

    Raises:
        ValueError: numbers of given tokens differ, or a context or continuation has no token.
    """
    counts = torch.tensor([len(context.continuations) for context in contexts], device=engine.device)
    empty = any(not part for c in contexts for part in (c.context, c.continuations, *c.continuations))
    if empty or len({len(context.given) for context in contexts}) != 1:
        raise ValueError("contexts and continuations have at least one token, and all contexts equally many given ones")
    rows = [((*c.context, *c.given), continuation) for c in contexts for continuation in c.continuations]
    batch = PromptResponseBatch.collate(rows, pad_id).to(engine.device)
    firsts = counts.cumsum(0) - counts
    prompts, given = batch.prompt_ids[firsts], len(contexts[0].given)
    width = batch.prompt_width - given
    first, state = engine.prefill(prompts[:, :width], batch.prompt_mask[firsts, :width], given + batch.response_width)
    before, certain = torch.zeros(len(contexts), device=engine.device), torch.ones_like(firsts, dtype=torch.bool)
    for column in range(width, batch.prompt_width):
        logprobs, greedy = _score(first, prompts[:, column])
        before, certain = before + logprobs, certain & (greedy == prompts[:, column])
        first = engine.full_reads(state, prompts[:, column : column + 1], column)
    state.repeat(counts)
    scores = _score_read(engine, first.repeat_interleave(counts, 0), state, batch, tokens_per_chunk, refresh)
    sums = scores.row_logprobs + before.repeat_interleave(counts)
    written = certain.repeat_interleave(counts) & ((scores.greedy == batch.response_ids) | ~scores.mask).all(1)
    flat = iter(zip(sums.tolist(), written.tolist(), strict=True))
    return [[next(flat) for _ in context.continuations] for context in contexts]


def _score_read(
    engine: Engine,
    first: Tensor,
    state: DecodeState,
    batch: PromptResponseBatch,
    tokens_per_chunk: int,
    refresh: Refresh | None,
) -> ResponseScores:
    """Scores of responses whose prompts have been read: logits [B, V] of their first tokens, and the state after it."""
    targets, mask = batch.response_ids, batch.response_mask
    logprobs = torch.zeros(targets.shape, device=targets.device)
    greedy = torch.zeros_like(targets)
    logprobs[:, 0], greedy[:, 0] = _score(first, targets[:, 0])
    pieces = _pieces(engine, state, batch, refresh) if bool(mask[:, 1:].any()) else ()  # one token: nothing to read
    for start, hidden, head in pieces:
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
