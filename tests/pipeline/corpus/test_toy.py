"""The toy corpus is a pure function with disjoint splits, and its answers are right."""

import pytest

from pipeline.corpus.toy import LETTERS, TASKS, Draws, belongs_to_test, toy_row

ALL = tuple(TASKS)


def solve(prompt):
    """An independent reading of a toy prompt."""
    head, _, rest = prompt.partition(": ")
    task, _, number = head.partition(" ")
    if task == "get":
        return rest.split()[int(number) - 1]
    if task == "sort":
        return "".join(sorted(rest))
    if task == "reverse":
        return "".join(reversed(rest))
    if task == "shift":
        ring = LETTERS * 2
        return "".join(ring[LETTERS.index(letter) + int(number)] for letter in rest)
    if task == "add":
        a, b = rest.split(" + ")
        return str(int(a) + int(b))
    raise AssertionError(prompt)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_is_right_and_every_prompt_in_its_split(split):
    for i in range(400):
        row = toy_row(ALL, 3, split, i)
        assert row["completion"] == solve(row["prompt"])
        assert belongs_to_test(row["prompt"]) == (split == "test")
        assert row["task"] == ALL[i % len(ALL)]
        assert len(row["prompt"]) <= 40 and 1 <= len(row["completion"]) <= 10


def test_no_test_prompt_is_trained_on_whatever_the_seeds():
    train = {toy_row(ALL, seed, "train", i)["prompt"] for seed in (0, 1) for i in range(1000)}
    test = {toy_row(ALL, seed, "test", i)["prompt"] for seed in (0, 2) for i in range(300)}
    assert not train & test
    assert len(train) > 1950  # few repetitions


def test_a_sample_is_a_function_of_seed_split_and_number_alone():
    assert toy_row(ALL, 0, "train", 17) == toy_row(ALL, 0, "train", 17)
    rows = {
        toy_row(("reverse",), seed, split, i)["prompt"]
        for seed in (0, 1)
        for split in ("train", "test")
        for i in (0, 1)
    }
    assert len(rows) == 8


def test_the_first_samples_are_pinned_so_that_a_corpus_never_changes_under_a_stage():
    assert [toy_row(ALL, 0, "test", i)["prompt"] for i in range(5)] == [
        "get 2: edflb gpbeo dchmf",
        "sort: hijapnc",
        "reverse: nampdo",
        "shift 1: iilage",
        "add: 953 + 583",
    ]


def test_draws_are_uniform_and_below_their_bound():
    draws = Draws("k")
    values = [draws.below(26) for _ in range(26_000)]
    counts = [values.count(i) for i in range(26)]
    assert min(counts) > 840 and max(counts) < 1160  # mean 1000, standard deviation 31
    assert sorted(Draws("d").distinct(LETTERS, 16)) == list(LETTERS)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match=r"'prove'.*known: get"):
        toy_row(("prove",), 0, "train", 0)
