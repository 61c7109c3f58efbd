"""Run a function on Ray Train workers for a stage, and turn what goes wrong into one line.

Step checkpoints are found by our own rules (`pipeline.training.checkpoints`), and Ray hears of none: its list of them
refuses to start when one of its folders was removed. What it writes lies in the attempt's own folder while it runs, for
the controller of an attempt that has lost its lease may still be at work beside its successor's.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import PreemptionError

from overfill.errors import UserError, disk_full
from pipeline.cluster import check_holds
from pipeline.config import StageResources
from pipeline.stage import StageRun
from pipeline.stop import StopFlag
from pipeline.submission.fitting import worker_bundle
from pipeline.training.backend import RendezvousConfig, Trainer, dashboard_runs
from pipeline.training.failures import Budget, Cause, cause_of, cause_of_all, first_of, one_line, origin, out_of_memory
from pipeline.training.resources import stage_resources

log = logging.getLogger(__name__)

STOP_POLL_S = 0.5
CONTROLLER_FAILURES = 240
"""Each is a minute of waiting for CPUs that other runs hold, so this is four hours."""
RAYS_OWN = "ray"
"""Folder of what Ray Train writes down of a run, in the attempt's."""
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

    Raises UserError when the cluster can never hold the workers, for a mistake that a worker has met and for too little
    memory, TrainingFailed for what outlived the retries."""
    resources = stage_resources(run)
    check_holds(run.stage.name, resources)
    for name, value in (RAY_TRAIN_ENVIRONMENT | ({} if dashboard_runs() else ON_ONE_MACHINE)).items():
        os.environ.setdefault(name, value)
    stop = run.stop_flag()
    trainer = Trainer(
        Retries(Budget.of(resources)),
        function,
        train_loop_config={"run": replace(run, stop_requested=stop)},
        backend_config=RendezvousConfig(),
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus_per_worker > 0,
            resources_per_worker=worker_bundle(resources),
            placement_strategy="PACK",  # few nodes: what workers tell each other at every step stays inside them
        ),
        run_config=RunConfig(
            name=run.stage.identity,
            storage_path=str(run.attempt / RAYS_OWN),
            failure_config=FailureConfig(controller_failure_limit=CONTROLLER_FAILURES),  # the rest is in `Retries`
        ),
    )
    with _forward_stop(run.stop_requested, stop):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise _final(error, run, resources) from error
        finally:
            shutil.rmtree(run.attempt / RAYS_OWN, ignore_errors=True)
    return dict(result.return_value or {})


class Retries(DefaultFailurePolicy):
    """Ray Train's failure policy with this project's causes and budgets; waiting for a place to start is left to Ray's."""

    def __init__(self, budget: Budget) -> None:
        super().__init__(FailureConfig(controller_failure_limit=CONTROLLER_FAILURES))
        self._budget = budget

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether to start the workers again."""
        if isinstance(training_failed_error, ControllerError) and death_at_start(training_failed_error) is None:
            return super().make_decision(training_failed_error)
        cause = cause_of_failure(training_failed_error)
        again = self._budget.spend(cause)
        told = f"{describe(training_failed_error)} ({self._budget.told(cause)})"
        log.warning("%s; %s", told, "starting again from the newest step checkpoint" if again else "that is the end")
        return FailureDecision.RETRY if again else FailureDecision.RAISE


def cause_of_failure(error: TrainingFailedError) -> Cause:
    """The cause of what Ray Train reports."""
    if isinstance(error, PreemptionError):
        return "node"
    if isinstance(error, WorkerGroupError):
        return cause_of_all(error.worker_failures.values())
    death = death_at_start(error)
    return "worker" if death is None else cause_of(death)


def death_at_start(error: TrainingFailedError) -> BaseException | None:
    """What a worker died of before its function was called; None for every other failure."""
    failure = error.controller_failure if isinstance(error, ControllerError) else None
    return (failure.__cause__ or failure) if isinstance(failure, WorkerGroupStartupFailedError) else None


def describe(error: TrainingFailedError) -> str:
    """What went wrong in one line: the error of the worker that is its cause, not its peers' lost connections."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        rank, own = first_of(cause_of_failure(error), error.worker_failures)
        return f"worker {rank}: {one_line(own)}"
    if (death := death_at_start(error)) is not None:
        return f"a worker, at its start: {one_line(death)}"
    return one_line(error.controller_failure if isinstance(error, ControllerError) else error)


def _final(error: TrainingFailedError, run: StageRun, resources: StageResources) -> Exception:
    """What to raise for what Ray Train gave up on."""
    cause, own = cause_of_failure(error), death_at_start(error)
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        _, own = first_of(cause, error.worker_failures)
    if own is not None and cause == "memory":
        return UserError(out_of_memory(run.stage.name, resources, own))
    if own is not None and cause == "user":
        return disk_full(origin(own)) or UserError(str(origin(own)))
    return TrainingFailed(f"{describe(error)}; the workers' logs are in {run.logs}")


@contextmanager
def _forward_stop(requested: Callable[[], bool], flag: StopFlag) -> Iterator[None]:
    """While inside, raise the flag that workers look for as soon as the stage is asked to stop.

    A file system that fails for a moment delays that, and no more."""
    ended = threading.Event()

    def watch() -> None:
        warned = False
        while not ended.wait(STOP_POLL_S):
            try:
                if requested():
                    flag.ask()
                    return
            except OSError as error:
                if not warned:  # an outage is many looks
                    log.warning("whether to stop cannot be looked up or told to the workers; trying again: %s", error)
                warned = True

    watcher = threading.Thread(target=watch, name="forward-stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
