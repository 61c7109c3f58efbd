"""The words in which `plan` says why something is built again."""

from __future__ import annotations

from store_toys import toy

from pipeline.difference import Difference, Nearest, differences
from pipeline.stage import External, Stage


def between(there: Stage, here: Stage) -> list[str]:
    return [str(difference) for difference in differences(there.full_description, here.full_description)]


def test_equal_stages_do_not_differ_whatever_their_labels():
    assert between(toy(label="a", loss={"kv": 3.0}), toy(label="b", loss={"kv": 3.0})) == []


def test_a_difference_names_the_field_and_both_values():
    assert between(toy(loss={"kv": 3.0, "kl": 1.0}), toy(loss={"kv": 0.0, "kl": 1.0})) == [
        "config.loss.kv: 3.0 there, 0.0 here"
    ]


def test_absent_fields_empty_ones_and_types_are_told_apart():
    assert between(toy(a=None, b={}, c=1), toy(b={"x": 1}, c=1.0)) == [
        "config.a: null there, nothing here",
        "config.b: {} there, nothing here",
        "config.c: 1 there, 1.0 here",
        "config.b.x: nothing there, 1 here",
    ]


def test_version_and_function_count():
    assert between(toy(version=1), toy(version=2, does="slow")) == [
        "version: 1 there, 2 here",
        'function: "store_toys:write" there, "store_toys:slow" here',
    ]


def test_a_difference_upstream_is_found_in_the_input_it_is_in():
    def student(revision: str) -> Stage:
        return toy("distill", {"teacher": toy("teacher", {"model": External("model", "llama", revision)})})

    assert between(student("abc"), student("abd")) == ['inputs.teacher.inputs.model.revision: "abc" there, "abd" here']


def test_an_input_that_several_stages_share_differs_once_and_at_its_shortest_path():
    def evaluate(layers: int) -> Stage:
        teacher = toy("teacher", layers=layers)
        return toy("evaluate", {"teacher": teacher, "student": toy("distill", {"teacher": teacher})})

    assert between(evaluate(4), evaluate(2)) == ["inputs.teacher.config.layers: 4 there, 2 here"]


def test_many_differences_are_counted_and_long_values_cut():
    many = Nearest("distill/xyz_ab12", tuple(Difference(f"config.{name}", "1", "2") for name in "abcde"))
    assert str(many) == (
        "nearest is distill/xyz_ab12, which differs in config.a: 1 there, 2 here; "
        "config.b: 1 there, 2 here; config.c: 1 there, 2 here; and 2 more"
    )
    long = Nearest("distill/xyz_ab12", (Difference("config.template", "x" * 5000, "y" * 5000),))
    assert len(str(long)) < 200
