"""Log-probabilities of given responses, token by token, as the system that generates them would assign them.

For OverFill the first token is scored by the full model and the others by the student on the full model's cache; for a
model alone (`Engine(model, model)`) all by that model. The sum over a response is what the decode loop would have seen.
Logits exist for one piece of the tokens at a time.

Letters: B batch, R response.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from overfill.batch import PromptResponseBatch
from overfill.engine import Engine


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
def score_responses(engine: Engine, batch: PromptResponseBatch, tokens_per_chunk: int = 1024) -> ResponseScores:
    """Score the responses of a batch under teacher forcing.

    Args:
        tokens_per_chunk: logits are computed for this many tokens at a time; bounds memory, never changes the result.
    """
    batch = batch.to(engine.device)
    first, state = engine.prefill(batch.prompt_ids, batch.prompt_mask)
    hidden = engine.decode_given(state, batch.response_ids[:, :-1])
    targets, mask = batch.response_ids, batch.response_mask
    logprobs = torch.zeros(targets.shape, device=targets.device)
    greedy = torch.zeros_like(targets)
    logprobs[:, 0], greedy[:, 0] = _score(first, targets[:, 0])
    later = mask[:, 1:].nonzero(as_tuple=True)
    for rows, columns in zip(*(part.split(tokens_per_chunk) for part in later), strict=True):
        logits = engine.decode_head(hidden[rows, columns])
        logprobs[rows, columns + 1], greedy[rows, columns + 1] = _score(logits, targets[rows, columns + 1])
    return ResponseScores(logprobs.where(mask, 0.0), greedy, mask)


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the most probable token, [N, V] and [N] -> [N] and [N]."""
    logprobs = logits.float().log_softmax(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), logits.argmax(-1)
