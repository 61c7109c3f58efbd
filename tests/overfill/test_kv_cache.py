"""The hand-over contract, and the constant prefix of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairs import KINDS, config_of, full_model, narrower, row_logits
from transformers import DynamicCache, LlamaConfig

from overfill.batch import PromptResponseBatch
from overfill.errors import UserError
from overfill.kv_cache import PrefixCache, check_hand_over, kv_geometry

ROWS = [([5, 9, 7, 4, 11, 6], [8, 12, 3, 14, 6, 2]), ([6, 5], [21, 7]), ([13, 2, 30], [9, 9, 9, 2])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrower_model_of_the_same_geometry_is_accepted(kind: str) -> None:
    check_hand_over(config_of(kind), narrower(config_of(kind)))


def test_a_head_dim_that_is_implied_equals_the_same_one_spelt_out() -> None:
    implied = LlamaConfig(hidden_size=32, num_attention_heads=4)
    assert kv_geometry(implied)["head_dim"] == 8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 2),
        ("num_key_value_heads", 4),
        ("head_dim", 4),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
        ("sliding_window", 7),
        ("vocab_size", 40),
    ],
)
def test_a_different_geometry_is_refused_by_the_name_of_the_field(field: str, value: Any) -> None:
    full = config_of("mistral-slides")
    student = narrower(full)
    setattr(student, field, value)
    with pytest.raises(UserError) as error:
        check_hand_over(full, student)
    assert f"{field} is {value}" in str(error.value)
    assert str(getattr(full, field)) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_window_on_one_side_only_is_refused() -> None:
    with pytest.raises(UserError, match="layer_types"):
        check_hand_over(config_of("mistral"), narrower(config_of("mistral-slides")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_on_a_prefix_reads_as_in_one_forward(kind: str) -> None:
    model, batch = full_model(kind), PromptResponseBatch.collate(ROWS, 0)
    with torch.no_grad():
        cache = DynamicCache()
        model(
            batch.prompt_ids,
            attention_mask=batch.prompt_mask,
            position_ids=batch.prompt_positions,
            past_key_values=cache,
            use_cache=True,
        )
        prefix = PrefixCache([la.keys for la in cache.layers], [la.values for la in cache.layers], keep_new=False)
        logits = model(
            batch.response_ids[:, :-1],
            attention_mask=batch.read_mask,
            position_ids=batch.response_positions[:, :-1],
            past_key_values=prefix,
            use_cache=False,
        ).logits
    for index, (prompt, response) in enumerate(ROWS):
        expected = row_logits(model, prompt, response)[1:]
        torch.testing.assert_close(logits[index, : len(response) - 1], expected, atol=1e-5, rtol=1e-5)


def test_updating_twice_returns_the_same_and_keeps_the_first_states() -> None:
    prefix, new = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 2, 4)
    cache = PrefixCache([prefix], [prefix + 1], keep_new=True)
    first, again = cache.update(new, new * 2, 0), cache.update(new.clone(), new * 2, 0)
    for once, twice in zip(first, again, strict=True):
        assert torch.equal(once, twice)
    assert torch.equal(first[0], torch.cat([prefix, new], dim=2))
    assert torch.equal(first[1], torch.cat([prefix + 1, new * 2], dim=2))
    assert cache.get_seq_length() == 3
    assert cache.new_states()[0][0] is new


def test_states_that_were_not_kept_cannot_be_had() -> None:
    prefix = torch.randn(1, 2, 3, 4)
    cache = PrefixCache([prefix], [prefix], keep_new=False)
    cache.update(prefix, prefix, 0)
    with pytest.raises(RuntimeError, match="keep_new"):
        cache.new_states()
