"""Exact mode: what is written is the full model's, whatever the student drafts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import EOS, KINDS, PAD, full_model, student_model
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

from overfill.engine import Engine
from overfill.errors import UserError
from overfill.generation import generate
from overfill.speculative import Acceptance, accept_greedy, accept_sampled

PROMPTS = torch.tensor([[3, 14, 5, 9, 26, 8], [0, 0, 9, 8, 7, 13], [0, 0, 0, 0, 0, 4]])
MASK = PROMPTS != PAD
FULL = full_model("mistral-slides")
ENGINE = Engine(FULL, student_model("mistral-slides"))
TOKENS = st.lists(st.integers(3, 40), min_size=1, max_size=7)


def close_student(kind: str, seed: int = 3) -> Any:
    """The full model with noise: some of what it drafts is accepted, some not."""
    student, generator = copy.deepcopy(full_model(kind)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return student


@pytest.mark.parametrize(
    ("kind", "draft_tokens"),
    [*((kind, count) for kind in KINDS for count in (3, None)), ("llama", 1), ("mistral-slides", 16)],
)
def test_greedy_text_is_the_full_models_token_for_token(kind: str, draft_tokens: int | None) -> None:
    full = full_model(kind)
    options = {"attention_mask": MASK, "max_new_tokens": 14}
    expected = full.generate(PROMPTS, **options)
    for student in (student_model(kind), close_student(kind)):
        found = generate(Engine(full, student), PROMPTS, exact=True, draft_tokens=draft_tokens, **options)
        assert torch.equal(found, expected)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(TOKENS, min_size=1, max_size=4),
    eos=st.sets(st.integers(3, 40), max_size=8),
    draft_tokens=st.integers(1, 6),
    count=st.integers(1, 12),
)
def test_any_batch_is_written_as_the_full_model_writes_each_row(
    rows: list[list[int]], eos: set[int], draft_tokens: int, count: int
) -> None:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    options = {"max_new_tokens": count, "eos_token_id": sorted(eos) or None, "pad_token_id": PAD}
    found = generate(ENGINE, ids, attention_mask=ids != PAD, exact=True, draft_tokens=draft_tokens, **options)
    expected = generate(Engine(FULL, FULL), ids, attention_mask=ids != PAD, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 2.5},
        {"min_new_tokens": 5, "eos_token_id": list(range(2, 30))},
        {"no_repeat_ngram_size": 2},
        {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1]) % 30 + 3, 7 + row]},
        {"max_length": 13},
    ],
)
def test_processors_see_each_rows_own_prefix(options: dict[str, Any]) -> None:
    engine = Engine(FULL, close_student("mistral-slides"))
    options = {"max_new_tokens": 11, "attention_mask": MASK, **options}
    if "max_length" in options:
        options.pop("max_new_tokens")
    expected = generate(Engine(FULL, FULL), PROMPTS, **options)
    assert torch.equal(generate(engine, PROMPTS, exact=True, draft_tokens=3, **options), expected)


def test_kept_logits_and_scores_are_the_full_models() -> None:
    options = {
        "attention_mask": MASK,
        "max_new_tokens": 8,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
        "repetition_penalty": 1.5,
    }
    expected = generate(Engine(FULL, FULL), PROMPTS, **options)
    found = generate(Engine(FULL, close_student("mistral-slides")), PROMPTS, exact=True, draft_tokens=3, **options)
    for name in ("logits", "scores"):
        assert len(found[name]) == len(expected[name])
        for step, (one, other) in enumerate(zip(found[name], expected[name], strict=True)):
            alive = ~(expected.sequences[:, PROMPTS.shape[1] : PROMPTS.shape[1] + step] == EOS).any(1)
            torch.testing.assert_close(one[alive], other[alive], atol=1e-4, rtol=1e-4)


def test_a_student_that_is_the_full_model_is_always_accepted_and_another_is_not() -> None:
    options = {"max_new_tokens": 12, "eos_token_id": None, "exact": True, "return_dict_in_generate": True}
    same = generate(Engine(FULL, copy.deepcopy(FULL)), PROMPTS, attention_mask=MASK, **options)
    assert same.acceptance_rate == 1.0
    other = generate(ENGINE, PROMPTS, attention_mask=MASK, **options)
    assert other.acceptance_rate < 0.7


@pytest.mark.parametrize("draft_tokens", [1, 2])
def test_samples_are_distributed_as_the_full_models(draft_tokens: int) -> None:
    """Third token of 6,000 samples against its exact distribution, by a chi-square statistic with a wide margin."""
    draws, prompt = 6000, torch.tensor([[3, 14, 5, 9]])
    warp = {"do_sample": True, "temperature": 0.8, "top_k": 6, "eos_token_id": None}
    torch.manual_seed(0)
    found = generate(
        ENGINE, prompt, max_new_tokens=3, exact=True, draft_tokens=draft_tokens, num_return_sequences=draws, **warp
    )
    observed = torch.bincount(found[:, -1], minlength=41).double()
    expected = draws * _third_token(prompt, warp).double()
    assert observed[expected == 0].sum() == 0
    rare = expected < 5
    pairs = [(observed[rare].sum(), expected[rare].sum()), *zip(observed[~rare], expected[~rare], strict=True)]
    statistic = sum(float((o - e) ** 2 / e) for o, e in pairs if e > 0)
    freedom = len([e for _, e in pairs if e > 0]) - 1
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    drafts_alone = generate(
        Engine(FULL, ENGINE.decode_model), prompt, max_new_tokens=3, num_return_sequences=draws, **warp
    )
    theirs = torch.bincount(drafts_alone[:, -1], minlength=41).double()
    assert float(((theirs - expected) ** 2 / expected.clamp_min(1)).sum()) > 10 * statistic  # the test can tell


def _third_token(prompt: torch.Tensor, warp: dict[str, Any]) -> torch.Tensor:
    """Exact probabilities [V] of the third new token under the full model."""

    def step(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = FULL(ids).logits[:, -1] / warp["temperature"]
        least = logits.topk(warp["top_k"]).values[:, -1:]
        return logits.masked_fill(logits < least, -torch.inf).softmax(-1)

    total = torch.zeros(41)
    for first, p in enumerate(step(prompt)[0]):
        if p == 0:
            continue
        for second, q in enumerate(step(torch.cat([prompt, torch.tensor([[first]])], 1))[0]):
            if q > 0:
                total += p * q * step(torch.cat([prompt, torch.tensor([[first, second]])], 1))[0]
    return total


def test_an_accepted_or_resampled_token_is_a_draw_from_the_targets() -> None:
    torch.manual_seed(1)
    p, q = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.7, 0.1, 0.1, 0.1])
    draws = 40_000
    drafts = torch.multinomial(q.expand(draws, 4), 1)
    accepted, after = accept_sampled(drafts, q.expand(draws, 1, 4), p.expand(draws, 2, 4))
    first = torch.where(accepted == 1, drafts[:, 0], after)
    torch.testing.assert_close(torch.bincount(first) / draws, p, atol=0.01, rtol=0)
    assert float((accepted == 1).float().mean()) == pytest.approx(float(torch.minimum(p, q).sum()), abs=0.01)
    second = after[accepted == 1]
    torch.testing.assert_close(torch.bincount(second) / len(second), p, atol=0.015, rtol=0)


def test_greedy_acceptance_ends_at_the_first_difference() -> None:
    targets = torch.nn.functional.one_hot(torch.tensor([[3, 4, 5], [3, 4, 5], [3, 4, 5]]), 9).float()
    accepted, after = accept_greedy(torch.tensor([[3, 4], [3, 9 - 1], [1, 4]]), targets)
    assert accepted.tolist() == [2, 1, 0]
    assert after.tolist() == [5, 4, 3]


def test_longer_drafts_pay_when_more_is_accepted_and_drafting_is_cheap() -> None:
    def best(accepted: int, rejected: int, cost: float) -> int:
        return Acceptance(cost, None, 16, accepted=accepted, rejected=rejected).next_draft()

    assert best(0, 1000, 0.4) == 1
    assert best(900, 100, 0.4) < best(990, 10, 0.4)
    assert best(900, 100, 0.4) < best(900, 100, 0.05)
    assert best(100_000, 0, 0.1) == 16
    assert Acceptance(0.4, 5, 16, accepted=0, rejected=1000).next_draft() == 5


def test_no_processor_sees_text_that_goes_on_after_its_end() -> None:
    """A grammar has nothing to say after the end, and transformers raises when a function allows no token at all."""
    ends = list(range(2, 20))

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        written = ids[PROMPTS.shape[1] :].tolist()
        return [] if set(written) & set(ends) else list(range(2, 41))

    options = {"eos_token_id": ends, "pad_token_id": PAD, "max_new_tokens": 12, "prefix_allowed_tokens_fn": allowed}
    for student in (ENGINE.decode_model, close_student("mistral-slides")):
        engine = Engine(FULL, student)
        for row in range(3):
            ids, mask = PROMPTS[row : row + 1], MASK[row : row + 1]
            short = ids[:, int((~mask).sum()) :]
            pad = torch.full((1, PROMPTS.shape[1] - short.shape[1]), 1)
            full_width = torch.cat([pad, short], dim=1)
            found = generate(engine, full_width, exact=True, draft_tokens=6, **options)
            assert torch.equal(found, generate(Engine(FULL, FULL), full_width, **options))


class Silent(StoppingCriteria):
    """Ends nothing, and counts how often it is asked; `overfill` cannot know that."""

    asked = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        self.asked += 1
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("eos", [None, 7, list(range(3, 12)), list(range(3, 41))])
@pytest.mark.parametrize("draft_tokens", [1, 4, None])
def test_rows_that_end_all_at_once_end_where_they_would_one_by_one(eos: Any, draft_tokens: int | None) -> None:
    engine = Engine(full_model("llama"), close_student("llama"))
    options = {"attention_mask": MASK, "max_new_tokens": 11, "eos_token_id": eos, "pad_token_id": PAD}
    options |= {"exact": True, "draft_tokens": draft_tokens, "return_dict_in_generate": True, "output_scores": True}
    silent = Silent()
    at_once = generate(engine, PROMPTS, **options)
    one_by_one = generate(engine, PROMPTS, **options, stopping_criteria=StoppingCriteriaList([silent]))
    assert silent.asked > 0
    assert torch.equal(at_once.sequences, one_by_one.sequences)
    assert (at_once.drafted, at_once.accepted) == (one_by_one.drafted, one_by_one.accepted)
    assert len(at_once.scores) == len(one_by_one.scores)
    assert all(map(torch.equal, at_once.scores, one_by_one.scores))


def test_end_tokens_and_lengths_are_not_asked_about_prefix_by_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EosTokenCriteria, "__call__", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr(MaxLengthCriteria, "__call__", lambda *_, **__: pytest.fail("asked"))
    found = generate(ENGINE, PROMPTS, exact=True, attention_mask=MASK, max_new_tokens=9, eos_token_id=EOS)
    assert found.shape[1] <= PROMPTS.shape[1] + 9


def test_models_of_two_dtypes_are_refused() -> None:
    mixed = Engine(full_model("llama"), student_model("llama").bfloat16())
    with pytest.raises(UserError, match="one dtype"):
        generate(mixed, PROMPTS, attention_mask=MASK, max_new_tokens=4, exact=True)


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_one_row_streams_every_token_once() -> None:
    streamer = Kept()
    found = generate(ENGINE, PROMPTS[:1], attention_mask=MASK[:1], max_new_tokens=9, exact=True, streamer=streamer)
    assert streamer.tokens == found[0].tolist()
    assert streamer.ended


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exact": True, "refresh": 4}, "leave refresh out"),
        ({"draft_tokens": 4}, "exact=True"),
        ({"exact": True, "draft_tokens": 17}, "1 to 16"),
        ({"exact": True, "draft_tokens": 0}, "1 to 16"),
        ({"exact": True, "streamer": Kept()}, "one row"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        generate(ENGINE, PROMPTS, attention_mask=MASK, max_new_tokens=4, **options)
