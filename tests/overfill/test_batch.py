"""Layout of a batch: where padding lies, which positions tokens have, what is refused."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from overfill.batch import DUMMY_ROW, PromptResponseBatch

PROMPT = st.lists(st.integers(1, 9), min_size=1, max_size=6)
RESPONSE = st.lists(st.integers(1, 9), max_size=6)


def test_prompts_are_padded_left_and_responses_right() -> None:
    batch = PromptResponseBatch.collate([([5, 6, 7], [8]), ([4], [9, 3, 2])], pad_id=0)
    assert batch.prompt_ids.tolist() == [[5, 6, 7], [0, 0, 4]]
    assert batch.prompt_mask.tolist() == [[True] * 3, [False, False, True]]
    assert batch.response_ids.tolist() == [[8, 0, 0], [9, 3, 2]]
    assert batch.response_mask.tolist() == [[True, False, False], [True] * 3]
    assert batch.prompt_positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.response_positions.tolist() == [[3, 4, 5], [1, 2, 3]]


@settings(deadline=None)
@given(st.lists(st.tuples(PROMPT, RESPONSE), min_size=1, max_size=5), st.integers(0, 3))
def test_real_tokens_of_a_row_are_its_tokens_at_positions_from_zero(
    rows: list[tuple[list[int], list[int]]], pad_id: int
) -> None:
    batch = PromptResponseBatch.collate(rows, pad_id)
    for index, (prompt, response) in enumerate(rows):
        mask = batch.read_mask[index]
        read = [*prompt, *response][: len(prompt) + min(len(response), batch.response_width - 1)]
        assert batch.read_ids[index][mask].tolist() == read
        assert batch.read_positions[index][mask].tolist() == list(range(len(read)))
        assert batch.response_ids[index][batch.response_mask[index]].tolist() == response
    assert batch.prompt_lengths.tolist() == [len(prompt) for prompt, _ in rows]
    assert batch.response_lengths.tolist() == [len(response) for _, response in rows]


def test_integer_arrays_make_the_same_batch_as_lists() -> None:
    rows = [([3, 4], [5, 6]), ([7], [8])]
    arrays = [(np.array(p, dtype=np.int32), np.array(r, dtype=np.int32)) for p, r in rows]
    from_lists, from_arrays = (PromptResponseBatch.collate(some, 0) for some in (rows, arrays))
    assert all(torch.equal(getattr(from_lists, f.name), getattr(from_arrays, f.name)) for f in fields(from_lists))


def test_a_dummy_row_has_a_prompt_token_and_no_response() -> None:
    batch = PromptResponseBatch.collate([DUMMY_ROW], pad_id=0)
    assert batch.prompt_lengths.tolist() == [1]
    assert batch.response_lengths.tolist() == [0]


def test_moving_a_batch_moves_all_of_it() -> None:
    moved = PromptResponseBatch.collate([([1], [2])], 0).to("meta")
    assert {getattr(moved, field.name).device.type for field in fields(moved)} == {"meta"}


def test_rows_that_nothing_can_be_predicted_from_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has no prompt token"):
        PromptResponseBatch.collate([([1], [2]), ([], [3])], 0)
    with pytest.raises(ValueError, match="at least one row"):
        PromptResponseBatch.collate([], 0)


def test_tensors_that_do_not_fit_are_refused() -> None:
    ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="prompt_mask"):
        PromptResponseBatch(ids, mask.long(), ids, mask)
    with pytest.raises(ValueError, match="response_mask"):
        PromptResponseBatch(ids, mask, ids, mask[:, :2])
    with pytest.raises(ValueError, match="2 prompts and 1 responses"):
        PromptResponseBatch(ids, mask, ids[:1], mask[:1])
    with pytest.raises(ValueError, match="two response columns"):
        PromptResponseBatch(ids, mask, ids[:, :1], mask[:, :1])
