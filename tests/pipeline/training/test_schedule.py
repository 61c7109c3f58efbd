from __future__ import annotations

import itertools
import math

import pytest

from pipeline.config_training import TrainingConfig
from pipeline.training.schedule import learning_rate


def rates(steps: int = 10, **settings: object) -> list[float]:
    config = TrainingConfig.model_validate({"learning_rate": 1.0, "warmup": 0.0} | settings)
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warm_up_rises_in_equal_steps_to_a_peak_that_is_reached() -> None:
    assert rates(warmup=0.3, schedule="constant")[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_starts_at_the_peak_is_half_way_down_in_the_middle_and_never_wastes_a_step_on_zero() -> None:
    values = rates()
    assert values[0] == 1.0
    assert values[5] == pytest.approx(0.5)
    assert values[-1] == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


def test_linear_falls_by_the_same_amount_every_step_to_the_final_share() -> None:
    values = rates(schedule="linear", final_learning_rate=0.5)
    assert [a - b for a, b in itertools.pairwise(values)] == pytest.approx([0.05] * 9)
    assert values[-1] == pytest.approx(0.55)


def test_a_run_of_one_step_trains_at_the_peak() -> None:
    assert rates(steps=1) == [1.0]
