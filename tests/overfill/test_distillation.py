"""Distillation losses against direct computations on unpadded rows with all logits at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import KINDS, continued_logits, full_model, row_logits, student_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from overfill.batch import DUMMY_ROW, PromptResponseBatch
from overfill.config import LossConfig
from overfill.distillation import DistillationModel, LossTerms, TeacherModel, TrainingMethod, teacher_pass
from overfill.losses import forward_kl

ROWS = [([5, 9, 7, 4, 11, 6], [8, 12, 3, 14, 6, 2]), ([6, 5], [21, 2]), ([13, 2, 30], [7]), DUMMY_ROW]
ALL = LossConfig(kl=1.0, kv=3.0, ce=0.5)
MOMENTS = torch.tensor([[2.0, 3.0], [4.0, 1.0], [2.5, 1.5]])


def losses(
    student: PreTrainedModel,
    full: PreTrainedModel,
    rows: list[tuple[Any, Any]],
    method: TrainingMethod = "overfill",
    loss: LossConfig = ALL,
    **options: Any,
) -> LossTerms:
    batch = PromptResponseBatch.collate(rows, 0)
    teacher = teacher_pass(full, batch)
    model = options.pop("model", None) or DistillationModel(student)
    return model(batch, teacher, full.get_output_embeddings(), method, loss, MOMENTS, **options)


def sums(terms: LossTerms) -> dict[str, float]:
    return {name: value.item() for name, (value, _) in terms.items()}


def counts(terms: LossTerms) -> dict[str, int]:
    return {name: int(count) for name, (_, count) in terms.items()}


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_model_reads_padded_rows_as_it_reads_them_alone(kind: str) -> None:
    full, batch = full_model(kind), PromptResponseBatch.collate(ROWS, 0)
    found = teacher_pass(full, batch)
    for index, (prompt, response) in enumerate(ROWS[:3]):
        with torch.no_grad():
            logits = full.get_output_embeddings()(found.hidden[index, : len(response)])
            alone = full(torch.tensor([[*prompt, *response]]), use_cache=True, past_key_values=None)
        torch.testing.assert_close(logits, row_logits(full, prompt, response), atol=1e-5, rtol=1e-5)
        if "slide" not in kind:  # a cache that slides forgets what the pass keeps
            first = batch.prompt_width - len(prompt)
            keys = found.states[2][0][index, :, first:][:, : len(prompt) + min(len(response), 5)]
            expected = alone.past_key_values.layers[2].keys[0, :, : keys.shape[1]]
            torch.testing.assert_close(keys, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_overfill_losses_equal_the_student_decoding_each_row_on_the_full_cache(kind: str) -> None:
    full, student = full_model(kind), student_model(kind)
    kl = ce = 0.0
    for prompt, response in ROWS[:3]:
        found = continued_logits(full, student, list(prompt), list(response))
        wanted = row_logits(full, list(prompt), list(response))[1:]
        kl += forward_kl(wanted, found).sum().item()
        ce += cross_entropy(found, torch.tensor(response[1:], dtype=torch.int64), reduction="sum").item()
    terms = losses(student, full, ROWS)
    assert sums(terms)["kl"] == pytest.approx(kl, rel=1e-4)
    assert sums(terms)["ce"] == pytest.approx(ce, rel=1e-4)
    assert counts(terms) == {"kl": 6, "ce": 6, "kv": 6, "loss": 6}
    assert sums(terms)["loss"] == pytest.approx(kl + 3 * sums(terms)["kv"] + 0.5 * ce, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["pruned", "scratch"])
def test_losses_of_a_student_alone_equal_plain_forwards(kind: str, method: TrainingMethod) -> None:
    full, student = full_model(kind), student_model(kind)
    kl = ce = 0.0
    for prompt, response in ROWS[:3]:
        found = row_logits(student, list(prompt), list(response))
        kl += forward_kl(row_logits(full, list(prompt), list(response)), found).sum().item()
        ce += cross_entropy(found, torch.tensor(response), reduction="sum").item()
    terms = losses(student, full, ROWS, method)
    assert sums(terms)["kl"] == pytest.approx(kl, rel=1e-4)
    assert sums(terms)["ce"] == pytest.approx(ce, rel=1e-4)
    assert counts(terms) == {"kl": 9, "ce": 9, "kv": 6, "loss": 9}


@pytest.mark.parametrize("prompt_targets", [False, True])
def test_pretraining_is_the_cross_entropy_of_a_plain_forward(prompt_targets: bool) -> None:
    dummy = ([5, 6, 7], [])  # a filled slot counts for nothing, its prompt included
    model, batch = student_model("llama"), PromptResponseBatch.collate([*ROWS, dummy], 0)
    expected = 0.0
    for prompt, response in ROWS[:3]:
        tokens = torch.tensor([*prompt, *response])
        first = 1 if prompt_targets else len(prompt)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0, first - 1 : -1]
        expected += cross_entropy(logits, tokens[first:], reduction="sum").item()
    terms = DistillationModel(model)(
        batch, None, None, "pretrain", LossConfig(kl=0, ce=1), prompt_targets=prompt_targets
    )
    assert sums(terms)["loss"] == pytest.approx(expected, rel=1e-4)
    assert counts(terms)["loss"] == (9 + 8 if prompt_targets else 9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["overfill", "pruned"])
def test_an_unpruned_student_has_no_kl_and_no_kv_loss(kind: str, method: TrainingMethod) -> None:
    full = full_model(kind)
    terms = sums(losses(copy.deepcopy(full), full, ROWS, method))
    assert abs(terms["kl"]) < 1e-5
    assert terms["kv"] < 1e-8


def test_kv_loss_compares_the_states_of_the_same_tokens() -> None:
    full, student = full_model("qwen3"), student_model("qwen3")
    expected = 0.0
    for prompt, response in ROWS[:3]:
        with torch.no_grad():
            wanted = full(torch.tensor([[*prompt, *response]]), use_cache=True).past_key_values
            found = full(torch.tensor([prompt]), use_cache=True).past_key_values
            student(torch.tensor([response]), past_key_values=found, use_cache=True)
        read = slice(len(prompt), len(prompt) + len(response) - 1)
        for layer in range(3):
            for kind, name in enumerate(("keys", "values")):
                one, other = (getattr(cache.layers[layer], name)[:, :, read] for cache in (found, wanted))
                expected += ((one - other).square().sum() / MOMENTS[layer, kind] / 6).item()
    assert sums(losses(student, full, ROWS))["kv"] == pytest.approx(expected, rel=1e-4)


ROW = st.tuples(
    st.lists(st.integers(3, 40), min_size=1, max_size=6), st.lists(st.integers(2, 40), min_size=1, max_size=6)
)
FULL, STUDENT = full_model("mistral-slides"), student_model("mistral-slides")


@settings(deadline=None, max_examples=15)
@given(st.lists(ROW, min_size=2, max_size=4), st.sampled_from(["overfill", "pruned"]))
def test_losses_of_a_batch_are_the_sums_of_its_rows_alone(rows: list[Any], method: TrainingMethod) -> None:
    together = losses(STUDENT, FULL, rows, method)
    alone = [losses(STUDENT, FULL, [row], method) for row in rows]
    for name, value in sums(together).items():
        assert value == pytest.approx(sum(sums(terms)[name] for terms in alone), rel=1e-4, abs=1e-4)
        assert counts(together)[name] == sum(counts(terms)[name] for terms in alone)


@pytest.mark.parametrize("method", ["overfill", "pruned"])
def test_dummy_rows_add_nothing_and_still_reach_every_parameter(method: TrainingMethod) -> None:
    full, student = full_model("llama"), student_model("llama")
    terms = losses(student, full, [DUMMY_ROW, DUMMY_ROW], method)
    terms["loss"][0].backward()
    assert set(sums(terms).values()) == {0.0}
    assert set(counts(terms).values()) == {0}
    assert all(gradient.abs().max() == 0 for gradient in gradients(student).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["overfill", "pruned"])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(kind: str, method: TrainingMethod) -> None:
    full, student = full_model(kind), student_model(kind)
    runs = []
    for checkpointing in (False, True):
        model = DistillationModel(student).train()
        if checkpointing:
            model.enable_activation_checkpointing()
        student.zero_grad()
        terms = losses(student, full, ROWS, method, model=model, chunks=1 + 2 * checkpointing)
        terms["loss"][0].backward()
        runs.append((sums(terms), gradients(student)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    largest = max(gradient.abs().max().item() for gradient in runs[0][1].values())
    for name, gradient in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], gradient, atol=1e-6 * largest, rtol=1e-4)


def test_activation_checkpointing_runs_each_layer_twice() -> None:
    full, student = full_model("llama"), student_model("llama")
    model, calls = DistillationModel(student).train(), []
    student.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.enable_activation_checkpointing()
    terms = losses(student, full, ROWS, model=model)
    assert len(calls) == 1
    terms["loss"][0].backward()
    assert len(calls) == 2


def test_gradients_reach_every_student_parameter_and_none_of_the_full_model() -> None:
    full, student = full_model("qwen2"), student_model("qwen2")
    losses(student, full, ROWS)["loss"][0].backward()
    assert all(gradient.abs().max() > 0 for gradient in gradients(student).values())
    assert all(parameter.grad is None for parameter in full.parameters())


def test_a_weight_of_zero_leaves_its_term_out() -> None:
    full, student = full_model("llama"), student_model("llama")
    terms = losses(student, full, ROWS, loss=LossConfig(kl=0.0, kv=0.0, ce=2.0))
    assert set(terms) == {"ce", "loss"}
    assert sums(terms)["loss"] == pytest.approx(2 * sums(terms)["ce"])


def test_bf16_models_train_with_losses_close_to_fp32() -> None:
    full, student = full_model("llama"), student_model("llama")
    exact = sums(losses(student, full, ROWS))
    terms = losses(student.bfloat16(), full.bfloat16(), ROWS)
    terms["loss"][0].backward()
    assert terms["loss"][0].dtype == torch.float32
    assert sums(terms) == pytest.approx(exact, rel=0.1)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(student).values())


def test_the_full_model_as_a_module_gives_the_same_pass() -> None:
    full, batch = full_model("llama"), PromptResponseBatch.collate(ROWS, 0)
    module, found = TeacherModel(full), teacher_pass(full, batch)
    assert torch.equal(module(batch).hidden, found.hidden)
    assert torch.equal(module.head(found.hidden), full.lm_head(found.hidden))


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("overfill", {"teacher": None}, "overfill continues"),
        ("pruned", {"teacher": None}, "KL term needs"),
        ("pruned", {"full_head": None}, "KL term needs"),
        ("overfill", {"kv_second_moment": None}, "KV match needs"),
        ("pruned", {"prompt_targets": True}, "prompt_targets is for pretrain"),
        ("pretrain", {}, "pretrain has no full model"),
    ],
)
def test_a_term_without_what_it_needs_is_refused(method: TrainingMethod, given: dict[str, Any], message: str) -> None:
    full, batch = full_model("llama"), PromptResponseBatch.collate(ROWS, 0)
    arguments = {"teacher": teacher_pass(full, batch), "full_head": full.lm_head, "kv_second_moment": MOMENTS} | given
    with pytest.raises(ValueError, match=message):
        DistillationModel(student_model("llama"))(batch, method=method, loss=ALL, **arguments)
