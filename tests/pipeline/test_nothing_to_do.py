"""`overfill run` when everything is there: quick, and without the machinery."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_mlflow import FakeServer, push
from synthetic_store import SyntheticStore, toy_cells

from pipeline.config_io import dump_yaml
from pipeline.experiment import Experiment, is_done, planned, read_experiment
from pipeline.stage import Stage
from pipeline.store import Store
from pipeline.sweep import to_build
from pipeline.tracking.tracker import Tracker

PROGRAM = """
import json, resource, sys
from pipeline.cli import main
try:
    main(["run", sys.argv[1], "--store", sys.argv[2]])
except SystemExit as end:
    code = end.code
used = resource.getrusage(resource.RUSAGE_SELF)
loaded = [name for name in ("ray", "torch", "mlflow", "transformers", "deepspeed") if name in sys.modules]
print(json.dumps({"code": code, "loaded": loaded, "seconds": used.ru_utime + used.ru_stime}))
"""


def experiment_file(folder: Path) -> Path:
    """An experiment of thirteen cells."""
    values = toy_cells()[0].config.model_dump(mode="json", exclude_unset=True)
    axes: dict[str, Any] = {"prune": [{"hidden": r, "intermediate": r} for r in (0.3, 0.5, 0.7)]}
    axes["distill.method"] = ["full", "overfill", "pruned"]
    values["sweep"] = {"axes": axes, "seeds": [0, 1]}
    (folder / "toy.yaml").write_text(dump_yaml(values))
    return folder / "toy.yaml"


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Experiment, SyntheticStore]:
    experiment = read_experiment(str(experiment_file(tmp_path)))
    synthetic = SyntheticStore(tmp_path / "runs")
    for cell in experiment.cells:
        synthetic.finish(cell)
    return experiment, synthetic


def test_a_run_with_nothing_to_do_ends_within_five_seconds_and_loads_neither_ray_nor_torch(
    tmp_path: Path, finished: tuple[Experiment, SyntheticStore], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    experiment, synthetic = finished
    push(Tracker(synthetic.store, experiment.config, experiment.cells)._make_sync(), FakeServer(), final=True)
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "toy.yaml"), str(synthetic.store.root)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    said = json.loads(done.stdout.splitlines()[-1])
    assert f"toy: all {len(experiment.cells)} cells are done already" in done.stderr
    assert said["loaded"] == []
    assert said["code"] in (0, None)
    assert said["seconds"] < 5.0, "of one core; this machine may be shared, so that a clock would say less"


def stage_of(experiment: Experiment, name: str) -> Stage:
    found = next(cell for cell in experiment.cells if cell.method == "overfill").stage(name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "file"), [("evaluate", "metrics.json"), ("benchmark", "latency.json"), ("distill", "model/config.json")]
)
def test_a_result_and_what_it_came_from_are_made_anew_when_they_were_altered(
    finished: tuple[Experiment, SyntheticStore], name: str, file: str
):
    experiment, synthetic = finished
    store, stage = Store(synthetic.store.root), stage_of(experiment, name)
    assert is_done(experiment, store)
    path = store.payload(stage) / file
    text = path.read_text()
    path.write_text(text.replace("1", "2", 1) if name != "distill" else text + " ")
    (action,) = (action for action in planned(experiment, store, explain=False) if action.kind != "reuse")
    assert action.stage == stage
    assert "it is set aside and built again" in action.reason
    assert file in action.reason
    users = [cell for cell in experiment.cells if cell.stage(name) == stage]
    for cell in experiment.cells:
        assert to_build(cell, ("evaluate", "benchmark"), store) == ([stage] if cell in users else [])
    other = "evaluate" if name == "benchmark" else "benchmark"
    assert to_build(users[0], (other,), store) == ([stage] if name == "distill" else []), "a leaf in its own turn"
