"""Scores of given responses: what the decode loop sees, summed and padded correctly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import EOS, KINDS, continued_logits, full_model, row_logits, student_model

from overfill.batch import DUMMY_ROW, PromptResponseBatch
from overfill.engine import Engine
from overfill.generation import generate
from overfill.scoring import score_responses

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
