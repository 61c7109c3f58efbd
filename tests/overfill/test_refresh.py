"""KV refresh: the dial between the student alone and the full model for every token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import EOS, KINDS, PAD, full_model, student_model
from torch import Tensor
from transformers import PreTrainedModel

from overfill.batch import PromptResponseBatch
from overfill.dial import Refresh, dial
from overfill.engine import Engine
from overfill.errors import UserError
from overfill.generation import generate
from overfill.refresh import entropy
from overfill.scoring import score_responses

PROMPTS = torch.tensor([[3, 14, 5, 9, 26, 8], [0, 0, 9, 8, 7, 13], [0, 0, 0, 0, 0, 4]])
MASK = PROMPTS != PAD
FULL, STUDENT = full_model("qwen2-some-layers-slide"), student_model("qwen2-some-layers-slide")
ENGINE = Engine(FULL, STUDENT)
TOKENS = st.lists(st.integers(3, 40), min_size=1, max_size=7)


def by_hand(full: PreTrainedModel, student: PreTrainedModel, prompt: list[int], count: int, every: int) -> list[int]:
    """Greedy text where at each refresh the full model reads everything from the start anew."""
    text, caches = list(prompt), None
    with torch.no_grad():
        for step in range(count):
            if step % every == 0:
                output = full(torch.tensor([text]), use_cache=True)
            else:
                output = student(torch.tensor([text[-1:]]), past_key_values=caches, use_cache=True)
            caches = output.past_key_values
            text.append(int(output.logits[0, -1].argmax()))
    return text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 3])
def test_every_n_tokens_the_cache_is_the_full_models(kind: str, every: int) -> None:
    full, student = full_model(kind), student_model(kind)
    prompt = [3, 14, 5, 9, 26, 8]
    found = generate(Engine(full, student), torch.tensor([prompt]), max_new_tokens=16, eos_token_id=None, refresh=every)
    assert found[0].tolist() == by_hand(full, student, prompt, 16, every)


@pytest.mark.parametrize("refresh", [1, "entropy>0"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_refresh_at_every_token_is_the_full_model(kind: str, refresh: int | str) -> None:
    full = full_model(kind)
    options = {"attention_mask": MASK, "max_new_tokens": 12, "eos_token_id": None, "return_dict_in_generate": True}
    output = generate(Engine(full, student_model(kind)), PROMPTS, refresh=refresh, **options)
    assert torch.equal(output.sequences, generate(Engine(full, full), PROMPTS, **options).sequences)
    assert output.refreshes == 11 * len(PROMPTS)  # all but the first token, which is the full model's anyway


def test_a_gate_that_never_opens_changes_nothing() -> None:
    options = {"attention_mask": MASK, "max_new_tokens": 9, "return_dict_in_generate": True}
    gated = generate(ENGINE, PROMPTS, refresh="entropy>100", **options)
    assert torch.equal(gated.sequences, generate(ENGINE, PROMPTS, **options).sequences)
    assert gated.refreshes == 0


@settings(deadline=None, max_examples=25)
@given(
    rows=st.lists(TOKENS, min_size=1, max_size=4),
    refresh=st.sampled_from([2, 3, "entropy>1.6", "entropy>2.2", "entropy>2.8"]),
    eos=st.sets(st.integers(3, 40), max_size=6),
)
def test_each_row_is_refreshed_as_it_would_be_alone(rows: list[list[int]], refresh: int | str, eos: set[int]) -> None:
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    options = {"max_new_tokens": 8, "eos_token_id": sorted(eos) or None, "pad_token_id": PAD, "refresh": refresh}
    together = generate(ENGINE, ids, attention_mask=ids != PAD, return_dict_in_generate=True, **options)
    refreshes = 0
    for row, found in zip(rows, together.sequences[:, width:].tolist(), strict=True):
        only = torch.tensor([row])
        alone = generate(ENGINE, only, attention_mask=torch.ones_like(only), return_dict_in_generate=True, **options)
        expected = alone.sequences[0, len(row) :].tolist()
        refreshes += alone.refreshes or 0
        assert found == expected + [PAD] * (len(found) - len(expected))
    assert together.refreshes == refreshes


@pytest.mark.parametrize("refresh", [1, 2, 3, 50, "entropy>2.2", "entropy>0"])
def test_scores_are_the_log_probabilities_that_the_loop_sees(refresh: int | str) -> None:
    options = {"attention_mask": MASK, "max_new_tokens": 9, "return_dict_in_generate": True, "output_logits": True}
    output = generate(ENGINE, PROMPTS, refresh=refresh, **options)
    answers = output.sequences[:, PROMPTS.shape[1] :]
    rows = [(prompt[prompt != PAD].tolist(), _real(answer)) for prompt, answer in zip(PROMPTS, answers, strict=True)]
    scores = score_responses(ENGINE, PromptResponseBatch.collate(rows, PAD), refresh=Refresh.parse(refresh))
    for index, (_, response) in enumerate(rows):
        seen = [output.logits[step][index].log_softmax(-1)[token] for step, token in enumerate(response)]
        torch.testing.assert_close(scores.logprobs[index, : len(response)], torch.stack(seen), atol=1e-4, rtol=1e-4)
        assert scores.greedy[index, : len(response)].tolist() == response


def _real(answer: Tensor) -> list[int]:
    tokens = answer.tolist()
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


def test_entropy_is_in_nats() -> None:
    assert float(entropy(torch.zeros(1, 8))) == pytest.approx(torch.log(torch.tensor(8.0)).item())
    assert float(entropy(torch.tensor([[0.0, -1e9]]))) == 0.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (64, Refresh(every=64)),
        ("8", Refresh(every=8)),
        ("entropy>2", Refresh(entropy=2.0)),
        (" Entropy > .5 ", Refresh(entropy=0.5)),
        ("none", None),
        (None, None),
    ],
)
def test_what_a_refresh_may_be(value: int | str | None, expected: Refresh | None) -> None:
    assert Refresh.parse(value) == expected


@pytest.mark.parametrize("value", [0, -1, "entropy>", "entropy<2", "2.5", True, "exact", ""])
def test_what_it_may_not_be(value: int | str) -> None:
    with pytest.raises(UserError, match="entropy>NATS"):
        Refresh.parse(value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("exact", "exact"),
        ("NONE", "none"),
        (None, "none"),
        ("64", 64),
        ("entropy > 2.50", "entropy>2.5"),
        ("entropy>0.00001", "entropy>0.00001"),
        ("entropy>1000000", "entropy>1000000"),
        ("Exact", "exact"),
    ],
)
def test_a_setting_has_one_spelling(value: int | str | None, expected: int | str) -> None:
    assert dial(value) == expected
    assert dial(dial(value)) == expected
