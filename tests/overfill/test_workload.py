"""What a decode step must read, and which systems can be measured where."""

from __future__ import annotations

import pytest

from overfill.errors import UserError
from overfill.shapes import ModelShape
from overfill.workload import SYSTEMS, Point, chosen_systems, grid, step_bytes, unfit

FULL = ModelShape("llama", 128, 352, 4, 4, 2, 32, 100, tied=True)
STUDENT = FULL.pruned(64, 160)
POINT = Point(batch=2, prompt=10, output=33, dtype="bf16")


def test_a_grid_holds_every_combination_batch_slowest():
    points = grid([1, 8], [128], [32, 64], "fp32")
    assert [(p.batch, p.prompt, p.output, p.dtype) for p in points] == [
        (1, 128, 32, "fp32"),
        (1, 128, 64, "fp32"),
        (8, 128, 32, "fp32"),
        (8, 128, 64, "fp32"),
    ]


@pytest.mark.parametrize("output", [2, 9, 32])
def test_the_mean_context_is_the_mean_over_decode_steps(output):
    steps = [10 + step for step in range(1, output)]  # step n reads the prompt and n new tokens, its own included
    assert Point(1, 10, output, "bf16").mean_context == pytest.approx(sum(steps) / len(steps), abs=0.5)


def test_a_step_reads_the_decoding_models_matrices_and_every_rows_cache():
    cache = 2 * (10 + 16) * STUDENT.kv_bytes_per_token("bf16")
    for system, shape in {
        "full": FULL,
        "transformers-full": FULL,
        "student": STUDENT,
        "overfill": STUDENT,
        "transformers-student": STUDENT,
    }.items():
        assert step_bytes(system, FULL, STUDENT, POINT) == 2 * shape.matrix_parameters() + cache, system


def test_a_refresh_puts_the_full_model_in_the_place_of_every_nth_step():
    student, full = (step_bytes(name, FULL, STUDENT, POINT) for name in ("student", "full"))
    assert student is not None and full is not None
    # 32 steps, 4 of them by the full model
    assert step_bytes("overfill-refresh", FULL, STUDENT, POINT, 8) == (28 * student + 4 * full) // 32
    assert step_bytes("overfill-refresh", FULL, STUDENT, POINT, "entropy>2.0") is None


def test_what_depends_on_the_tokens_has_no_number():
    assert step_bytes("exact", FULL, STUDENT, POINT) is None
    assert step_bytes("transformers-assisted", FULL, STUDENT, POINT) is None


def test_all_systems_that_apply_are_chosen_in_their_order():
    one = [Point(1, 8, 100, "fp32")]
    assert chosen_systems(None, one, 64, student=True) == list(SYSTEMS)
    assert chosen_systems(["transformers-full", "overfill"], one, 64, student=True) == ["overfill", "transformers-full"]
    assert chosen_systems(None, one, 64, student=False) == ["full", "transformers-full"]
    batched = [Point(8, 8, 32, "fp32")]
    left_out = set(SYSTEMS) - set(chosen_systems(None, batched, 64, student=True))
    assert left_out == {"overfill-refresh", "transformers-assisted"}
    assert "transformers-assisted" in chosen_systems(None, one + batched, 64, student=True), "it fits one of the points"


def test_a_refresh_fits_where_it_happens():
    assert unfit("overfill-refresh", Point(1, 8, 64, "fp32"), 64)
    assert unfit("overfill-refresh", Point(1, 8, 65, "fp32"), 64) is None
    assert unfit("overfill-refresh", Point(1, 8, 8, "fp32"), "entropy>1") is None
    assert unfit("overfill-refresh", Point(1, 8, 65, "fp32"), None)


@pytest.mark.parametrize(
    ("names", "student", "words"),
    [
        (["overfil"], True, "'overfil' is not known.*transformers-assisted"),
        (["full", "exact"], False, "exact needs a student"),
        (["transformers-assisted"], True, "one row at a time"),
        (["overfill-refresh"], True, "end before the first refresh at 64"),
    ],
)
def test_a_system_that_cannot_be_measured_is_refused(names, student, words):
    with pytest.raises(UserError, match=words):
        chosen_systems(names, [Point(8, 8, 32, "fp32")], 64, student)
