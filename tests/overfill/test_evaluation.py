"""Exact match, likelihood and agreement of a system on held-out samples."""

from __future__ import annotations

import pytest
import torch
from pairs import EOS, PAD, full_model, row_logits, student_model

from overfill.engine import Engine
from overfill.evaluation import Sample, answer_of, is_correct, judge


class Letters:
    """A tokenizer of one character per token id, as far as judging needs one."""

    pad_token_id, eos_token_id = PAD, EOS

    def batch_decode(self, rows, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        ids = [[int(token) for token in row] for row in rows]
        return ["".join(chr(96 + token) for token in row if token not in (PAD, 1, EOS)) for row in ids]


def greedy_alone(engine: Engine, prompt: list[int], most: int) -> list[int]:
    """The answer of one unpadded prompt, token by token through the engine's steps."""
    ids = torch.tensor([prompt])
    logits, state = engine.prefill(ids, torch.ones_like(ids, dtype=torch.bool), room=16)
    answer = []
    for _ in range(most):
        answer.append(int(logits.argmax(-1)))
        if answer[-1] == EOS:
            break
        logits = engine.decode_one(state, torch.tensor([answer[-1]]))
    return answer


@pytest.fixture(scope="module")
def two_stage() -> Engine:
    return Engine(full_model("llama"), student_model("llama"))


PROMPTS = [[5, 9, 7, 4, 11, 6], [6, 5], [13, 21, 30], [8, 8, 8, 8, 9, 20, 31, 17]]


def test_a_system_is_right_exactly_where_its_own_answer_is_the_reference(two_stage):
    answers = [greedy_alone(two_stage, prompt, 6) for prompt in PROMPTS]
    texts = Letters().batch_decode(answers, skip_special_tokens=True)
    references = [texts[0], texts[1] + "x", texts[2], "never"]
    samples = [Sample(p, [*a, EOS], r) for p, a, r in zip(PROMPTS, answers, references, strict=True)]
    full = Engine(two_stage.prefill_model, two_stage.prefill_model)
    for batch in (1, 3, 4):
        judged = judge(two_stage, full, Letters(), samples, max_new_tokens=6, batch=batch)
        assert [one.correct for one in judged] == [True, False, True, False]
        assert [one.prediction for one in judged] == texts


def test_likelihood_and_agreement_of_a_model_alone_are_those_of_a_plain_forward():
    full, student = full_model("qwen3"), student_model("qwen3")
    responses = [[8, 12, 3, EOS], [21, 7], [9, EOS], [4, 4, 4]]
    samples = [Sample(p, r, "") for p, r in zip(PROMPTS, responses, strict=True)]
    judged = judge(Engine(student, student), Engine(full, full), Letters(), samples, max_new_tokens=2, batch=4)
    for prompt, response, one in zip(PROMPTS, responses, judged, strict=True):
        mine, theirs = row_logits(student, prompt, response), row_logits(full, prompt, response)
        nll = -mine.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()
        assert one.response_nll == pytest.approx(float(nll), abs=1e-4)
        assert one.response_tokens == len(response)
        assert one.agreeing_tokens == int((mine.argmax(-1) == theirs.argmax(-1)).sum())


def test_the_full_model_agrees_with_itself_everywhere():
    full = full_model("llama")
    engine = Engine(full, full)
    judged = judge(engine, engine, Letters(), [Sample(p, [7, 9, 9], "") for p in PROMPTS], max_new_tokens=1, batch=2)
    assert all(one.agreeing_tokens == one.response_tokens == 3 for one in judged)


@pytest.mark.parametrize(
    ("prediction", "reference", "pattern", "right"),
    [
        (" abc\n", "abc", None, True),
        ("abd", "abc", None, False),
        ("so 3\n#### 1,234", "#### 1234", r"#### (-?[\d,]+)", True),
        ("#### 5\nno, #### 6", "#### 6", r"#### (-?[\d,]+)", True),
        ("six", "#### 6", r"#### (-?[\d,]+)", False),
        ("six", "seven", r"#### (-?[\d,]+)", False),
    ],
)
def test_what_counts_as_the_same_answer(prediction, reference, pattern, right):
    assert is_correct(prediction, reference, pattern) is right


def test_an_answer_is_the_last_match():
    assert answer_of("#### 1 then #### 2,000 ", r"#### ([\d,]+)") == "2000"
