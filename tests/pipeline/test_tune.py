"""Early stopping: who competes with whom, and that a decision is a request."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from synthetic_store import toy_cells

from pipeline.config import AshaConfig
from pipeline.lease import acquire
from pipeline.stop import STOP_FILE
from pipeline.store import Store
from pipeline.tune import DEATH_KNOWN_S, RUNG_METRIC, AfterDeath, CooperativeAsha, request_stop


@pytest.fixture
def cells() -> list[Any]:
    return [
        cell
        for cell in toy_cells(distill={"tokens": 100_000, "batch_tokens": 100})
        if cell.stage("distill") is not None
    ]


def scheduler(cells: list[Any], root: Any) -> CooperativeAsha:
    asha = AshaConfig(grace_steps=10, reduction=2)
    return CooperativeAsha(asha, cells, Store(root))


def attempt_at(store: Store, cell: Any) -> Path:
    """An attempt's folder, with a lease that is over: a request to stop only looks for the newest."""
    folder = store.create(cell.stage("distill")) / "attempts"
    with acquire(folder, after=0) as lease:
        return lease.folder


def trial(place: int) -> Any:
    return SimpleNamespace(config={"place": place}, trial_id=f"trial-{place}", is_finished=lambda: False)


def report(asha: CooperativeAsha, who: Any, step: int, nll: float) -> str:
    return asha.on_trial_result(None, who, {"step": step, RUNG_METRIC: nll, "training_iteration": step})


def test_a_worse_cell_of_the_same_group_is_asked_to_stop_and_not_killed(cells, tmp_path):
    cell, store = cells[0], Store(tmp_path)
    twin = SimpleNamespace(**{name: getattr(cell, name) for name in ("teacher", "widths", "method", "seed", "config")})
    twin.index, twin.stage = 99, cell.stage
    stop = attempt_at(store, cell) / STOP_FILE
    asha = scheduler([cell, twin], tmp_path)
    better, worse = trial(0), trial(1)
    for one in (better, worse):
        asha.on_trial_add(None, one)
    assert report(asha, better, 10, 1.0) == asha.CONTINUE
    assert not stop.exists()
    assert report(asha, worse, 10, 2.0) == asha.CONTINUE, "a request, not a kill"
    assert "step 10" in stop.read_text()


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_cell_that_has_diverged_is_worse_than_any_other(cells, tmp_path, lost):
    group = [cells[0]] * 4
    stop = attempt_at(Store(tmp_path), cells[0]) / STOP_FILE
    asha = scheduler(group, tmp_path)
    for place in range(len(group)):
        asha.on_trial_add(None, trial(place))
    for place, nll in enumerate((lost, 1.0, 3.0)):
        report(asha, trial(place), 10, nll)
        assert not stop.exists(), "the first one, and two that are better"
    report(asha, trial(3), 10, lost)
    assert stop.exists()


def test_cells_of_other_ratios_methods_or_seeds_do_not_compete(cells, tmp_path):
    store = Store(tmp_path)
    asha = scheduler(cells, tmp_path)
    for place, cell in enumerate(cells):
        attempt_at(store, cell)
        asha.on_trial_add(None, trial(place))
        report(asha, trial(place), 10, 1.0 + place)
    assert not list(tmp_path.rglob(STOP_FILE))


def test_a_stop_can_only_be_asked_of_a_stage_that_has_begun(cells, tmp_path):
    store = Store(tmp_path)
    request_stop(cells[0], store, "because")
    store.create(cells[0].stage("distill"))
    request_stop(cells[0], store, "because")
    assert not list(tmp_path.rglob(STOP_FILE))


@pytest.mark.parametrize("again", [True, False])
def test_after_the_death_of_a_trial_what_it_had_reserved_is_looked_for_until_ray_must_know(cells, caplog, again):
    now, looks = [100.0], []
    callback = AfterDeath(cells, remove=lambda: looks.append(now[0]) or 0, clock=lambda: now[0])
    callback.on_step_end(0, [])
    assert looks == [], "nobody has died"
    died = callback.on_trial_recover if again else callback.on_trial_error
    died(0, [], trial(0))
    assert (f"{cells[0].label}: the process that drives the cell was killed" in caplog.text) == again
    while now[0] < 100.0 + 2 * DEATH_KNOWN_S:
        callback.on_step_end(0, [])
        now[0] += 0.25
    assert len(looks) == DEATH_KNOWN_S, "once a second"
    assert looks[0] == 100.0
    assert looks[-1] < 100.0 + DEATH_KNOWN_S
