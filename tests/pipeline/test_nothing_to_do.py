"""`overfill run` when everything is there: quick, and without the machinery."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_store import SyntheticStore, toy_cells
from test_tracking import FakeServer, push

from pipeline.config_io import dump_yaml
from pipeline.experiment import read_experiment
from pipeline.tracking import Tracker

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


def test_a_run_with_nothing_to_do_ends_within_five_seconds_and_loads_neither_ray_nor_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    values = toy_cells()[0].config.model_dump(mode="json", exclude_unset=True)
    axes = {"prune": [{"hidden": r, "intermediate": r} for r in (0.3, 0.5, 0.7)]}
    axes["distill.method"] = ["full", "overfill", "pruned"]
    values["sweep"] = {"axes": axes, "seeds": [0, 1]}
    (tmp_path / "toy.yaml").write_text(dump_yaml(values))
    experiment = read_experiment(str(tmp_path / "toy.yaml"))
    synthetic = SyntheticStore(tmp_path / "runs")
    for cell in experiment.cells:
        synthetic.finish(cell)
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
    print(f"{said['seconds']:.1f} s")
    assert said["seconds"] < 5.0, "of one core; this machine may be shared, so that a clock would say less"
