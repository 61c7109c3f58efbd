"""Run a function on Ray Train workers for a stage, and turn what goes wrong into one line.

The run's name is the stage's identity and its storage the stage's progress folder. Step checkpoints are found by our
own rules (`pipeline.training.checkpoints`), so Ray's list of them, which refuses to start when one of its folders was
removed, is deleted before a start.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.exceptions import RayError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError

from pipeline.cluster import check_workers, largest_cluster, worker_bundle
from pipeline.stage import StageRun
from pipeline.training.backend import RendezvousConfig, Trainer, dashboard_runs
from pipeline.training.resources import STOP_FILE, StopFile, stage_resources

STOP_POLL_S = 0.5
CONTROLLER_FAILURES = 240
"""Each is a minute of waiting for CPUs that other runs hold, so this is four hours."""
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
RAY_TRAIN_ENVIRONMENT = {
    # Ray polls workers every 2 s by default, and a report waits for the next poll.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Metrics for Prometheus.
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # The controller runs in the trial's process, whose logging is not Ray's to configure.
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    # Paths are absolute here, and a worker's folder is no place for results.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
ON_ONE_MACHINE = {
    # A process that watches for nodes that are being reclaimed.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


class TrainingFailed(Exception):
    """Training failed more often than it may; `str` is one line with the cause and the place of the logs."""


def run_workers(function: Callable[[dict[str, Any]], dict[str, Any]], run: StageRun) -> dict[str, Any]:
    """Call `function({"run": run})` on every worker that the stage's resources ask for; returns rank 0's result.

    Raises UserError when the cluster can never hold the workers, TrainingFailed for what outlived the retries."""
    resources = stage_resources(run)
    check_workers(run.stage.name, resources, largest_cluster())
    for name, value in (RAY_TRAIN_ENVIRONMENT | ({} if dashboard_runs() else ON_ONE_MACHINE)).items():
        os.environ.setdefault(name, value)
    name = run.stage.identity
    (run.progress / name / "checkpoint_manager_snapshot.json").unlink(missing_ok=True)
    stop = StopFile(run.progress / STOP_FILE)
    stop.path.unlink(missing_ok=True)
    trainer = Trainer(
        function,
        train_loop_config={"run": replace(run, stop_requested=stop)},
        backend_config=RendezvousConfig(),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=worker_bundle(resources),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(run.progress),
            failure_config=FailureConfig(
                max_failures=resources.max_failures, controller_failure_limit=CONTROLLER_FAILURES
            ),
        ),
    )
    with _forward_stop(run.stop_requested, stop.path):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise TrainingFailed(f"{one_line(error)}; the workers' logs are in {run.attempt}") from error
    return dict(result.return_value or {})


def one_line(error: TrainingFailedError) -> str:
    """What went wrong, from Ray Train's report of it: the first worker's own error, not its peers' lost connections."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        causes = {rank: _cause(failure) for rank, failure in sorted(error.worker_failures.items())}
        own = {rank: cause for rank, cause in causes.items() if not any(word in cause for word in LOST_PEER)}
        rank, cause = next(iter((own or causes).items()))
        return f"worker {rank}: {cause}"
    return _cause(error.controller_failure if isinstance(error, ControllerError) else error)


def _cause(error: Exception) -> str:
    """Type and first line; of Ray's own errors, which say what happened to a process, the first line alone."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, RayError) or not first:
        return first or type(error).__name__
    return f"{type(error).__name__}: {first}"


@contextmanager
def _forward_stop(requested: Callable[[], bool], path: Path) -> Iterator[None]:
    """While inside, make the stop file as soon as the stage is asked to stop."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(STOP_POLL_S):
            if requested():
                path.touch()
                return

    watcher = threading.Thread(target=watch, name="forward-stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
