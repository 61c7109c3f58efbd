"""Scores of given responses: what the decode loop sees, summed and padded correctly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import EOS, KINDS, continued_logits, full_model, row_logits, student_model

from overfill.batch import DUMMY_ROW, PromptResponseBatch
from overfill.dial import Refresh
from overfill.engine import Engine
from overfill.generation import generate
from overfill.scoring import ScoredContext, score_continuations, score_responses

ROWS = [([5, 9, 7, 4, 11, 6], [8, 12, 3, 14, 6, 9]), ([6, 5], [21, 7]), ([13, 2, 30], [9])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_alone_scores_as_one_plain_forward(kind: str) -> None:
    student = student_model(kind)
    scores = score_responses(Engine(student, student), PromptResponseBatch.collate(ROWS, 0))
    for index, (prompt, response) in enumerate(ROWS):
        logprobs = row_logits(student, prompt, response).log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(response)[:, None]).squeeze(1)
        torch.testing.assert_close(scores.logprobs[index, : len(response)], expected, atol=1e-5, rtol=1e-5)
        assert scores.greedy[index, : len(response)].tolist() == logprobs.argmax(-1).tolist()
        assert scores.logprobs[index, len(response) :].abs().sum() == 0


def test_two_stages_score_the_first_token_by_the_full_model_and_the_rest_by_the_student() -> None:
    full, student = full_model("qwen3"), student_model("qwen3")
    scores = score_responses(Engine(full, student), PromptResponseBatch.collate(ROWS, 0))
    for index, (prompt, response) in enumerate(ROWS):
        logits = torch.cat([row_logits(full, prompt, response)[:1], continued_logits(full, student, prompt, response)])
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
        torch.testing.assert_close(scores.row_logprobs[index], expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nll_is_that_of_the_tokens_as_the_decode_loop_drew_them(kind: str) -> None:
    engine = Engine(full_model(kind), student_model(kind))
    prompts = torch.tensor([[0, 0, 7, 9, 5], [4, 8, 3, 6, 12]])
    torch.manual_seed(3)
    output = generate(
        engine,
        prompts,
        attention_mask=prompts != 0,
        do_sample=True,
        top_k=0,
        max_new_tokens=9,
        return_dict_in_generate=True,
        output_logits=True,
    )
    rows, seen = [], 0.0
    for index, prompt in enumerate(prompts.tolist()):
        response = output.sequences[index, 5:].tolist()
        response = response[: response.index(EOS) + 1] if EOS in response else response
        rows.append(([token for token in prompt if token], response))
        for step, token in enumerate(response):
            seen -= output.logits[step][index].log_softmax(-1)[token].item()
    nll, count = score_responses(engine, PromptResponseBatch.collate(rows, 0)).nll
    assert nll.item() == pytest.approx(seen, rel=1e-5)
    assert int(count) == sum(len(response) for _, response in rows)


ENGINE = Engine(full_model("mistral-slides"), student_model("mistral-slides"))
ROW = st.tuples(
    st.lists(st.integers(3, 40), min_size=1, max_size=7), st.lists(st.integers(2, 40), min_size=1, max_size=7)
)


@settings(deadline=None, max_examples=20)
@given(st.lists(ROW, min_size=1, max_size=4), st.integers(1, 9))
def test_a_padded_batch_in_any_chunks_scores_as_its_rows_alone(rows: list[Any], tokens_per_chunk: int) -> None:
    together = score_responses(ENGINE, PromptResponseBatch.collate([*rows, DUMMY_ROW], 0), tokens_per_chunk)
    for index, row in enumerate(rows):
        alone = score_responses(ENGINE, PromptResponseBatch.collate([row], 0)).logprobs[0, : len(row[1])]
        torch.testing.assert_close(together.logprobs[index, : len(row[1])], alone, atol=1e-4, rtol=1e-4)
    assert together.row_logprobs[-1] == 0
    assert int(together.nll[1]) == sum(len(response) for _, response in rows)


CONTEXTS = [
    ScoredContext([5, 9, 7, 4], [3], [[8, 12, 3], [8], [21, 7, 6, 9, 30]]),
    ScoredContext([6], [11], [[13, 2]]),
    ScoredContext([2, 30, 4, 17, 6, 8], [4], [[9], [10]]),
]


@pytest.mark.parametrize("kind", KINDS)
def test_continuations_of_one_context_score_as_responses_of_their_own(kind: str) -> None:
    engine = Engine(full_model(kind), student_model(kind))
    contexts = [ScoredContext([*c.context, *c.given], [], c.continuations) for c in CONTEXTS]
    together = score_continuations(engine, contexts, 0)
    for context, scores in zip(contexts, together, strict=True):
        for continuation, (logprob, greedy) in zip(context.continuations, scores, strict=True):
            alone = score_responses(engine, PromptResponseBatch.collate([(context.context, continuation)], 0))
            assert logprob == pytest.approx(alone.row_logprobs.item(), abs=1e-4)
            assert greedy == (alone.greedy[0, : len(continuation)].tolist() == list(continuation))


def test_given_tokens_are_read_and_scored_by_the_full_model() -> None:
    full, student = full_model("qwen3"), student_model("qwen3")
    found = score_continuations(Engine(full, student), CONTEXTS, 0)
    for context, scores in zip(CONTEXTS, found, strict=True):
        prompt = [*context.context, *context.given]
        given = row_logits(full, list(context.context), list(context.given)).log_softmax(-1)[0, context.given[0]]
        for continuation, (logprob, _) in zip(context.continuations, scores, strict=True):
            response = list(continuation)
            own = torch.cat([row_logits(full, prompt, response)[:1], continued_logits(full, student, prompt, response)])
            expected = own.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum() + given
            assert logprob == pytest.approx(expected.item(), abs=1e-4)


def test_what_the_system_would_write_is_greedy_and_nothing_else_is() -> None:
    engine = Engine(full_model("llama"), student_model("llama"))
    prompt = torch.tensor([[5, 9, 7, 4]])
    written = generate(engine, prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)[0, 4:].tolist()
    other = [*written[:-1], (written[-1] + 1) % 41]
    ((first, second),) = score_continuations(engine, [ScoredContext([5, 9, 7, 4], [], [written, other])], 0)
    assert (first[1], second[1]) == (True, False)
    assert first[0] > second[0]


@pytest.mark.parametrize("refresh", [Refresh(every=2), Refresh(entropy=2.0)])
def test_a_refresh_scores_continuations_as_responses(refresh: Refresh) -> None:
    engine = Engine(full_model("llama"), student_model("llama"))
    contexts = [ScoredContext(c.context, [], c.continuations) for c in CONTEXTS]
    together = score_continuations(engine, contexts, 0, refresh=refresh)
    for context, scores in zip(contexts, together, strict=True):
        for continuation, (logprob, _) in zip(context.continuations, scores, strict=True):
            batch = PromptResponseBatch.collate([(context.context, continuation)], 0)
            alone = score_responses(engine, batch, refresh=refresh)
            assert logprob == pytest.approx(alone.row_logprobs.item(), abs=1e-4)


def test_contexts_that_do_not_fit_together_are_refused() -> None:
    engine = Engine(full_model("llama"), student_model("llama"))
    unequal = [ScoredContext([5], [], [[4]]), ScoredContext([5], [3], [[4]])]
    for contexts in (unequal, [ScoredContext([5], [], [[]])], [ScoredContext([], [3], [[4]])], []):
        with pytest.raises(ValueError, match="at least one token"):
            score_continuations(engine, contexts, 0)
