"""The order of training is a pure function: every sample once per epoch, every slot once per batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.order import EMPTY_SLOT, BatchOrder, sequences_per_batch

lengths_strategy = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=60)


def make_order(pairs, size, seed=0):
    prompts, responses = np.array(pairs).T
    return BatchOrder(prompts, responses, size, seed)


@given(pairs=lengths_strategy, size=st.integers(1, 25), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=80, deadline=None)
def test_each_epoch_holds_each_sample_exactly_once(pairs, size, seed):
    order = make_order(pairs, size, seed)
    epochs = 3
    batches = -(-epochs * len(pairs) // size)
    sequence = np.concatenate([order.batch(k) for k in range(batches)])
    for e in range(epochs):
        assert sorted(sequence[e * len(pairs) : (e + 1) * len(pairs)]) == list(range(len(pairs)))


@given(pairs=lengths_strategy, size=st.integers(1, 25), accesses=st.lists(st.integers(0, 200), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_batch_does_not_depend_on_what_was_asked_before(pairs, size, accesses):
    used = make_order(pairs, size, 7)
    for k in accesses:
        np.testing.assert_array_equal(used.batch(k), make_order(pairs, size, 7).batch(k))
        assert len(used.batch(k)) == size


@given(
    pairs=lengths_strategy,
    size=st.integers(1, 40),
    workers=st.integers(1, 5),
    micro_batch=st.integers(1, 9),
    k=st.integers(0, 30),
)
@settings(max_examples=120, deadline=None)
def test_slots_cover_a_batch_exactly_once_on_any_number_of_workers(pairs, size, workers, micro_batch, k):
    order = make_order(pairs, size)
    per_rank = [order.slots(k, workers, micro_batch, rank) for rank in range(workers)]
    assert {len(slots) for slots in per_rank} == {order.micro_batches(workers, micro_batch)}
    assert all(len(slots) == micro_batch for rank in per_rank for slots in rank)
    dealt = np.concatenate([slots for rank in per_rank for slots in rank])
    assert sorted(dealt[dealt != EMPTY_SLOT]) == sorted(order.batch(k))
    if size >= workers * order.micro_batches(workers, micro_batch):
        assert all((slots != EMPTY_SLOT).any() for rank in per_rank for slots in rank)


def test_the_order_is_pinned_so_that_an_upgrade_cannot_change_a_resumed_run():
    prompts, responses = np.arange(10) % 4 + 3, np.arange(10) % 3 + 1
    order = BatchOrder(prompts, responses, 4, seed=1234)
    assert [order.batch(k).tolist() for k in range(5)] == [
        [1, 3, 7, 2],
        [0, 9, 4, 8],
        [5, 6, 0, 9],
        [4, 6, 8, 1],
        [5, 3, 2, 7],
    ]


def test_seeds_and_epochs_give_different_permutations():
    pairs = [(1, 1)] * 64
    a, b = make_order(pairs, 8, seed=0), make_order(pairs, 8, seed=1)
    assert a.epoch(0).tolist() != b.epoch(0).tolist()
    assert a.epoch(0).tolist() != a.epoch(1).tolist()
    # (seed 0, epoch 1) and (seed 1, epoch 0) are other keys, not one sum
    assert a.epoch(1).tolist() != b.epoch(0).tolist()


def test_batches_are_of_like_length_but_do_not_come_sorted():
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, 500, 4096)
    order = BatchOrder(prompts, np.ones(4096, np.int64), 16, seed=3)
    spread = [np.ptp(order.lengths[order.batch(k)]) for k in range(256)]
    assert np.median(spread) < 60  # 16 random samples spread over some 440 of 500
    means = [order.lengths[order.batch(k)].mean() for k in range(16)]
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_micro_batches_that_run_together_have_like_lengths():
    rng = np.random.default_rng(1)
    order = BatchOrder(rng.integers(1, 500, 64), np.ones(64, np.int64), 32, seed=0)
    first, second = order.slots(0, 2, 4, 0), order.slots(0, 2, 4, 1)
    for mine, theirs in zip(first, second, strict=True):
        assert abs(order.lengths[mine].max() - order.lengths[theirs].max()) <= 60
    longest = [order.lengths[slots].max() for slots in first]
    assert longest == sorted(longest, reverse=True)


def test_token_counts_are_those_of_the_batch():
    order = BatchOrder([3, 4, 5, 6], [1, 2, 3, 4], 6, seed=0)
    for k in range(4):
        assert order.response_tokens(k) == sum(int(order.response_lengths[i]) for i in order.batch(k))
        assert order.total_tokens(k) == sum(int(order.lengths[i]) for i in order.batch(k))


def test_batch_size_follows_from_tokens_and_mean_length():
    lengths = np.array([10, 20, 30])
    assert sequences_per_batch(200, lengths) == 10
    assert sequences_per_batch(1, lengths) == 1
    with pytest.raises(ValueError, match="empty"):
        sequences_per_batch(200, np.array([], np.int32))
    with pytest.raises(ValueError, match="at least 1"):
        sequences_per_batch(0, lengths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 4, 0), "empty"),
        (([1], [1, 2], 4, 0), "same length"),
        (([1], [1], 0, 0), "sequences_per_batch"),
        (([1], [1], 1, -1), "seed"),
    ],
)
def test_impossible_orders_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchOrder(*arguments)


def test_impossible_requests_are_refused():
    order = BatchOrder([1, 2], [1, 2], 2, 0)
    with pytest.raises(ValueError, match="start at 0"):
        order.batch(-1)
    with pytest.raises(ValueError, match="rank"):
        order.slots(0, 2, 1, 2)
    with pytest.raises(ValueError, match="micro_batch"):
        order.slots(0, 1, 0, 0)


def test_random_access_far_into_a_run_costs_no_more_than_one_epoch():
    order = BatchOrder(np.full(50, 3), np.full(50, 2), 7, seed=0)
    order.batch(10**9)
    assert len(order._epochs) <= 2
