"""The two-stage model: equal to its parts, and loaded from a student folder."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from pairs import KINDS, SIZES, build, continued_logits, full_model, narrower, row_logits, student_model
from transformers import LlamaConfig, PreTrainedModel

from overfill.batch import PromptResponseBatch
from overfill.checkpoint import FullModel, Manifest, save_student, weights_digest
from overfill.config import PruneConfig
from overfill.errors import UserError
from overfill.shapes import ModelShape, resolve_widths
from overfill.two_stage import TwoStageForCausalLM

ROWS = [([5, 9, 7, 4, 11, 6], [8, 12, 3, 14, 6, 9]), ([6, 5], [21, 7]), ([13, 2, 30], [9])]


@pytest.mark.parametrize("kind", KINDS)
def test_an_unpruned_student_gives_the_full_models_logits(kind: str) -> None:
    full = full_model(kind)
    logits = TwoStageForCausalLM(full, copy.deepcopy(full))(PromptResponseBatch.collate(ROWS, 0))
    for index, (prompt, response) in enumerate(ROWS):
        expected = row_logits(full, prompt, response)
        torch.testing.assert_close(logits[index, : len(response)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_is_the_full_models_and_the_others_the_students(kind: str) -> None:
    full, student = full_model(kind), student_model(kind)
    logits = TwoStageForCausalLM(full, student)(PromptResponseBatch.collate(ROWS, 0))
    for index, (prompt, response) in enumerate(ROWS):
        torch.testing.assert_close(logits[index, 0], row_logits(full, prompt, response)[0], atol=1e-5, rtol=1e-5)
        expected = continued_logits(full, student, prompt, response)
        torch.testing.assert_close(logits[index, 1 : len(response)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_single_steps_equal_one_teacher_forced_forward(kind: str) -> None:
    model, batch = TwoStageForCausalLM(full_model(kind), student_model(kind)), PromptResponseBatch.collate(ROWS, 0)
    logits, state = model.prefill(batch.prompt_ids, batch.prompt_mask, batch.response_width)
    steps = [logits]
    for column in range(batch.response_width - 1):
        steps.append(model.decode_one(state, batch.response_ids[:, column]))
    expected = model(batch)
    for index, (_, response) in enumerate(ROWS):
        found = torch.stack(steps, dim=1)[index, : len(response)]
        torch.testing.assert_close(found, expected[index, : len(response)], atol=1e-5, rtol=1e-5)


def test_prefill_computes_logits_of_one_position_only() -> None:
    full, seen = full_model("llama"), []
    full.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    model = TwoStageForCausalLM(full, student_model("llama"))
    model.prefill(torch.tensor([[4, 5, 6, 7]]), torch.ones(1, 4, dtype=torch.bool), room=1)
    assert seen == [(1, 1, SIZES["vocab_size"])]


def test_models_of_another_geometry_are_refused() -> None:
    other = build(LlamaConfig(**{**SIZES, "num_key_value_heads": 4}), seed=0)
    with pytest.raises(UserError, match="num_key_value_heads is 4"):
        TwoStageForCausalLM(full_model("llama"), other)


def saved_student(folder: Path, full: PreTrainedModel) -> tuple[Path, PreTrainedModel]:
    """A full model and a student of a random start in folders below `folder`."""
    full.save_pretrained(folder / "full")
    shape = ModelShape.from_config(full.config.to_dict())
    widths = resolve_widths(shape, PruneConfig(hidden=0.5, intermediate=0.5))
    config = narrower(full.config)
    config.hidden_size, config.intermediate_size = widths.hidden, widths.intermediate
    student = build(config, seed=3)
    origin = FullModel(id=str(folder / "full"), digest=weights_digest(folder / "full"))
    save_student(student, folder / "student", Manifest.of(origin, full.config.model_type, widths, None))
    return folder / "student", student


def test_a_student_folder_finds_its_full_model_by_the_manifest(tmp_path: Path) -> None:
    full = full_model("llama")
    folder, student = saved_student(tmp_path, full)
    batch = PromptResponseBatch.collate(ROWS, 0)
    expected = TwoStageForCausalLM(full, student)(batch)
    torch.testing.assert_close(TwoStageForCausalLM.from_pretrained(folder)(batch), expected)
    torch.testing.assert_close(TwoStageForCausalLM.from_pretrained(folder, full=full)(batch), expected)
    moved = (tmp_path / "full").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no such folder"):
        TwoStageForCausalLM.from_pretrained(folder)
    loaded = TwoStageForCausalLM.from_pretrained(folder, full=moved, dtype=torch.bfloat16)
    assert {loaded.full.dtype, loaded.student.dtype} == {torch.bfloat16}


def test_another_full_model_than_the_manifests_is_refused(tmp_path: Path) -> None:
    folder, _ = saved_student(tmp_path, full_model("llama"))
    build(full_model("llama").config, seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="cut from"):
        TwoStageForCausalLM.from_pretrained(folder, full=tmp_path / "other")
