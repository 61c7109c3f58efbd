"""Accuracy on held-out samples: greedy exact match, response perplexity, agreement with the full model.

One path for every system: an `Engine` of two models, so that what differs between `full`, `overfill` and `pruned` is the
models alone. Perplexity and agreement are taken under teacher forcing. Samples are grouped by length into batches and
returned in their own order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from overfill.batch import PromptResponseBatch
from overfill.decode_loop import TwoStageOutput, run_loop
from overfill.dial import Refresh
from overfill.engine import Engine
from overfill.generation import prepare_request
from overfill.scoring import score_responses
from overfill.speculative import run_exact


@dataclass(frozen=True)
class Sample:
    """A held-out sample."""

    prompt: Sequence[int]
    """Token ids up to and including the generation prompt."""
    response: Sequence[int]
    """Token ids of the answer, end of turn included."""
    reference: str
    """The answer's text."""


@dataclass(frozen=True)
class Judged:
    """What a system did with a sample."""

    prediction: str
    """Its answer, greedy."""
    correct: bool
    """Whether the answer matches the reference."""
    response_nll: float
    """Negative log-likelihood of the reference's tokens, summed, in nats."""
    response_tokens: int
    """Number of those tokens."""
    agreeing_tokens: int
    """At how many of them system and full model find the same token most probable."""


def answer_of(text: str, pattern: str | None) -> str | None:
    """What is compared of an answer: its last match of `pattern`, first group, without commas and blanks around it;
    without a pattern the whole text, stripped. None where the pattern does not match: such an answer is wrong."""
    if pattern is None:
        return text.strip()
    found = list(re.finditer(pattern, text))
    return found[-1].group(1).replace(",", "").strip() if found else None


def is_correct(prediction: str, reference: str, pattern: str | None) -> bool:
    """Exact match of what is compared."""
    answer = answer_of(prediction, pattern)
    return answer is not None and answer == answer_of(reference, pattern)


@torch.no_grad()
def judge(
    engine: Engine,
    full: Engine,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int,
    batch: int,
    pattern: str | None = None,
    refresh: Refresh | None = None,
    exact: bool = False,
    asked: Counter[str] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Judged]:
    """Judge a system on samples.

    Args:
        full: the full model alone, with whose choices agreement is counted.
        refresh, exact: as for `overfill.generation.generate`. What an exact system would write of given text is what
            the full model would: its scores are that model's.
        asked: takes in `tokens` (generated), `refreshes`, `drafted` and `accepted`.
        progress: called with the number of samples done after each batch.
    """
    asked = Counter() if asked is None else asked
    judged: dict[int, Judged] = {}
    for indices in _batches(samples, batch):
        rows = [samples[i] for i in indices]
        predictions = _generate(engine, tokenizer, rows, max_new_tokens, refresh, exact, asked)
        padded = PromptResponseBatch.collate([(row.prompt, row.response) for row in rows], pad_id=pad_token(tokenizer))
        scores = score_responses(full if exact else engine, padded, refresh=refresh)
        theirs = scores if exact or engine is full else score_responses(full, padded)
        agreeing = ((scores.greedy == theirs.greedy.to(scores.greedy.device)) & scores.mask).sum(1)
        for place, (index, row, prediction) in enumerate(zip(indices, rows, predictions, strict=True)):
            judged[index] = Judged(
                prediction=prediction,
                correct=is_correct(prediction, row.reference, pattern),
                response_nll=-float(scores.row_logprobs[place]),
                response_tokens=int(scores.mask[place].sum()),
                agreeing_tokens=int(agreeing[place]),
            )
        progress(len(judged))
    return [judged[i] for i in range(len(samples))]


def _batches(samples: Sequence[Sample], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(samples)), key=lambda i: (len(samples[i].prompt), len(samples[i].response), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _generate(
    engine: Engine,
    tokenizer: Any,
    rows: Sequence[Sample],
    max_new_tokens: int,
    refresh: Refresh | None,
    exact: bool,
    asked: Counter[str],
) -> list[str]:
    width = max(len(row.prompt) for row in rows)
    ids = torch.full((len(rows), width), pad_token(tokenizer), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row.prompt) :] = torch.tensor([int(token) for token in row.prompt])
        mask[place, width - len(row.prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, engine.max_positions - width),
        do_sample=False,
        eos_token_id=end_tokens(engine, tokenizer),
        pad_token_id=pad_token(tokenizer),
    )
    request = prepare_request(engine, ids, mask, config, {"return_dict_in_generate": True})
    out = run_exact(engine, request) if exact else run_loop(engine, request, refresh=refresh)
    assert isinstance(out, TwoStageOutput)  # as asked for
    answers = out.sequences[:, width:]
    ended = torch.isin(answers, torch.tensor(config.eos_token_id)).cumsum(1)
    asked.update(tokens=int((ended == 0).sum() + (ended > 0).any(1).sum()), refreshes=out.refreshes or 0)
    asked.update(drafted=out.drafted or 0, accepted=out.accepted or 0)
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def pad_token(tokenizer: Any) -> int:
    """What fills rows up: the tokenizer's padding token, else its end of text."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def end_tokens(engine: Engine, tokenizer: Any) -> list[int]:
    """End-of-turn tokens: the generation config's, which for chat models is more than the tokenizer's one."""
    known = engine.prefill_model.generation_config.eos_token_id
    ids = known if isinstance(known, list) else [] if known is None else [known]
    return sorted({*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
