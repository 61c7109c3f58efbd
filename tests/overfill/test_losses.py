"""Losses against direct computations with all logits at once."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from overfill.config import LossConfig
from overfill.losses import cross_entropy, forward_kl, kv_match, vocabulary_losses

VOCABULARY = 11
BOTH = LossConfig(kl=1.0, ce=1.0)


class CountingHead(nn.Linear):
    """A head that records how many tokens each call was given."""

    def __init__(self, width: int) -> None:
        super().__init__(width, VOCABULARY)
        self.calls: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls.append(len(hidden))
        return super().forward(hidden)


def tokens(count: int, seed: int = 0) -> tuple[CountingHead, Tensor, CountingHead, Tensor, Tensor]:
    torch.manual_seed(seed)
    student_hidden = torch.randn(count, 4, requires_grad=True)
    return CountingHead(4), student_hidden, CountingHead(6), torch.randn(count, 6), torch.randint(VOCABULARY, (count,))


@settings(deadline=None)
@given(st.floats(0.3, 4.0), st.integers(0, 100))
def test_kl_is_the_sum_of_p_log_p_over_q_times_the_squared_temperature(temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    full, student = (3 * torch.randn(2, 5, VOCABULARY, generator=generator, dtype=torch.float64)).unbind(0)
    p, q = (full / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    found = forward_kl(full, student, temperature)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    assert bool((found >= -1e-6).all())


def test_kl_of_equal_logits_is_zero_and_is_not_symmetric() -> None:
    torch.manual_seed(0)
    one, other = 3 * torch.randn(4, VOCABULARY), 3 * torch.randn(4, VOCABULARY)
    assert forward_kl(one, one).abs().max() < 1e-6
    assert (forward_kl(one, other) - forward_kl(other, one)).abs().max() > 0.1


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9), st.integers(1, 12), st.sampled_from([1.0, 2.0]))
def test_chunks_change_neither_losses_nor_gradients(count: int, chunks: int, temperature: float) -> None:
    student_head, student_hidden, full_head, full_hidden, targets = tokens(count)
    logits, full_logits = student_head(student_hidden), full_head(full_hidden).detach()
    kl, ce = forward_kl(full_logits, logits, temperature).sum(), cross_entropy(logits, targets).sum()
    (kl + 0.5 * ce).backward()
    expected = [student_hidden.grad.clone(), student_head.weight.grad.clone(), student_head.bias.grad.clone()]
    student_hidden.grad = None
    student_head.zero_grad()

    sums = vocabulary_losses(
        student_head,
        student_hidden,
        targets,
        LossConfig(kl=1.0, ce=0.5, temperature=temperature),
        full_head=full_head,
        full_hidden=full_hidden,
        chunks=chunks,
    )
    sums.total.backward()
    torch.testing.assert_close(sums.total, kl + 0.5 * ce, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums.kl, kl, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums.ce, ce, atol=1e-5, rtol=1e-5)
    found = [student_hidden.grad, student_head.weight.grad, student_head.bias.grad]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_the_number_of_head_calls_depends_on_chunks_alone_and_no_call_gets_all_tokens(count: int) -> None:
    student_head, student_hidden, full_head, full_hidden, targets = tokens(count)
    sums = vocabulary_losses(
        student_head, student_hidden, targets, BOTH, full_head=full_head, full_hidden=full_hidden, chunks=4
    )
    assert len(student_head.calls) == len(full_head.calls) == 4
    assert max(student_head.calls) == -(-count // 4)
    assert sum(student_head.calls) == count
    sums.total.backward()
    assert len(student_head.calls) == len(full_head.calls) == 8  # each chunk once more, in the backward pass


class LiveChunks(TorchDispatchMode):
    """Counts the tensors [rows, V] that are alive, after every operation."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.alive: set[int] = set()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.shape == (self.rows, VOCABULARY):
            place = output.untyped_storage().data_ptr()
            if place not in self.alive:
                self.alive.add(place)
                weakref.finalize(output.untyped_storage(), self.alive.discard, place)
        self.most = max(self.most, len(self.alive))
        return output


@pytest.mark.parametrize("loss", [LossConfig(kl=1.0), LossConfig(kl=0.0, ce=1.0), BOTH, LossConfig(temperature=2.0)])
def test_only_one_chunk_of_logits_is_alive_in_either_pass(loss: LossConfig) -> None:
    student_head, student_hidden, full_head, full_hidden, targets = tokens(48)
    with LiveChunks(rows=3) as chunks:
        sums = vocabulary_losses(
            student_head, student_hidden, targets, loss, full_head=full_head, full_hidden=full_hidden, chunks=16
        )
        sums.total.backward()
    # Logits, log-probabilities and their gradients, for one chunk: 6 or 7. Anything kept for all chunks makes it 16.
    assert 2 <= chunks.most <= 8


def test_gradients_do_not_reach_the_full_model() -> None:
    student_head, student_hidden, full_head, full_hidden, targets = tokens(5)
    full_hidden.requires_grad_()
    sums = vocabulary_losses(student_head, student_hidden, targets, BOTH, full_head=full_head, full_hidden=full_hidden)
    sums.total.backward()
    assert full_hidden.grad is None
    assert full_head.weight.grad is None
    assert student_hidden.grad.abs().sum() > 0


def test_losses_of_bf16_models_are_computed_in_fp32() -> None:
    student_head, student_hidden, full_head, full_hidden, targets = tokens(6)
    for head in (student_head, full_head):
        head.to(torch.bfloat16)
    student_hidden, full_hidden = student_hidden.detach().bfloat16(), full_hidden.bfloat16()
    sums = vocabulary_losses(student_head, student_hidden, targets, BOTH, full_head=full_head, full_hidden=full_hidden)
    log_q = student_head(student_hidden).double().log_softmax(-1)
    log_p = full_head(full_hidden).double().log_softmax(-1)
    assert sums.ce.dtype == sums.kl.dtype == torch.float32
    torch.testing.assert_close(sums.ce.double(), -log_q.gather(1, targets[:, None]).sum(), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(sums.kl.double(), (log_p.exp() * (log_p - log_q)).sum(), atol=1e-5, rtol=1e-5)


def test_half_a_full_model_and_no_chunks_are_refused() -> None:
    student_head, student_hidden, full_head, _, targets = tokens(2)
    with pytest.raises(ValueError, match="come together"):
        vocabulary_losses(student_head, student_hidden, targets, BOTH, full_head=full_head)
    with pytest.raises(ValueError, match="at least 1"):
        vocabulary_losses(student_head, student_hidden, targets, BOTH, chunks=0)


def states(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Three layers of keys and values: B 2, H 2, R 4, K 3."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, 2, 2, 4, 3, generator=generator).unbind(0)) for _ in range(3)]  # type: ignore[misc]


MOMENTS = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
MASK = torch.tensor([[True, True, False, False], [True, True, True, False]])


def test_kv_match_equals_its_formula_token_by_token() -> None:
    student, full = states(0), states(1)
    expected = 0.0
    for row, column in MASK.nonzero().tolist():
        for layer in range(3):
            for kind in (0, 1):
                difference = student[layer][kind][row, :, column] - full[layer][kind][row, :, column]
                expected += difference.square().sum().item() / MOMENTS[layer, kind].item() / 2 / 3
    assert kv_match(student, full, MOMENTS, MASK).item() == pytest.approx(expected, rel=1e-5)


def test_kv_match_is_zero_for_identical_states_and_blind_to_padding() -> None:
    full = states(1)
    student = [(k.clone(), v.clone()) for k, v in full]
    for keys, values in student:
        keys[:, :, 3], values[0, :, 2] = float("inf"), float("nan")
        keys.requires_grad_()
    loss = kv_match(student, full, MOMENTS, MASK)
    loss.backward()
    assert loss.item() == 0.0
    assert all(keys.grad.abs().max() == 0 for keys, _ in student)


def test_kv_match_adds_up_over_rows() -> None:
    student, full = states(0), states(1)
    rows = [
        kv_match(
            [(k[row : row + 1], v[row : row + 1]) for k, v in student],
            [(k[row : row + 1], v[row : row + 1]) for k, v in full],
            MOMENTS,
            MASK[row : row + 1],
        )
        for row in (0, 1)
    ]
    torch.testing.assert_close(rows[0] + rows[1], kv_match(student, full, MOMENTS, MASK))


def test_kv_match_refuses_moments_of_another_depth() -> None:
    with pytest.raises(ValueError, match="one row of two moments per layer"):
        kv_match(states(0), states(1), MOMENTS[:2], MASK)
