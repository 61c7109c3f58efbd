"""Causes of failures and what is done about them: every decision from values."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from ray.exceptions import ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.api.preemption import PreemptionInfo
from training_toys import distill_run

from overfill.errors import UserError
from pipeline.config import StageResources
from pipeline.training.failures import Budget, NodeReclaimed, cause_of, memory_advice, out_of_memory
from pipeline.training.launch import Retries, TrainingFailed, _final, describe

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE
LOST_PEER = RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:1234")
RECLAIMED = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]}))
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."


def died(text: str, preempted: bool = False) -> RayActorError:
    return RayActorError(error_msg=f"The actor died.\n\tpid: 7\n{text}", preempted=preempted)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (UserError("data.path = x: no such file"), "user"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/store/x"), "user"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "user"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
        (RuntimeError("ncclUnhandledCudaError: ...\nLast error:\nCuda failure 2 'out of memory'"), "memory"),
        (RuntimeError("std::bad_alloc"), "memory"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError(ALLOCATOR), "memory"),
        (OutOfMemoryError("Task was killed due to the node running low on memory."), "memory"),
        (died("The worker was killed as the node was running low on memory."), "memory"),
        (NodeReclaimed("step 5 is saved"), "node"),
        (NodeDiedError("Task failed because the node it was running on is dead or unavailable."), "node"),
        (ActorUnavailableError("RpcError: Socket closed", None), "node"),
        (died("The actor is dead because its node has died."), "node"),
        (died("", preempted=True), "node"),
        (died("The actor is dead because its worker process has died."), "worker"),
        # Ray's word for whatever has killed it.
        (died("(1) The process is killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop"), "worker"),
        (WorkerCrashedError(), "worker"),
        (ValueError("the loss is NaN"), "worker"),
        (LOST_PEER, "worker"),
    ],
)
def test_an_error_has_one_cause_also_inside_of_what_ray_wraps_around_it(error: Exception, cause: str) -> None:
    assert cause_of(error) == cause
    assert cause_of(WorkerHealthCheckFailedError("A worker health check failed.", error)) == cause


def retries(**limits: int) -> Retries:
    return Retries(Budget.of(StageResources.model_validate(limits)))


def group(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("...", dict(enumerate(errors)))


def test_failures_of_workers_and_lost_nodes_have_budgets_of_their_own() -> None:
    policy = retries(max_failures=1, max_preemptions=2)
    dead = group(died("The worker process has died."))
    assert [policy.make_decision(error) for error in (RECLAIMED, dead, RECLAIMED, dead)] == [RETRY, RETRY, RETRY, RAISE]
    assert policy.make_decision(group(died("its node has died"))) == RAISE, "the third lost node"


@pytest.mark.parametrize("error", [UserError("no such folder"), torch.OutOfMemoryError("CUDA out of memory.")])
def test_what_would_come_again_is_never_tried_again(error: Exception) -> None:
    assert retries(max_failures=9).make_decision(group(LOST_PEER, error)) == RAISE


def test_of_a_group_the_cause_decides_and_not_the_connections_that_its_peers_lost() -> None:
    policy = retries(max_failures=0, max_preemptions=1)
    assert policy.make_decision(group(LOST_PEER, NodeReclaimed("step 5 is saved"))) == RETRY
    assert policy.make_decision(group(LOST_PEER)) == RAISE


def test_a_start_that_waits_for_cpus_is_left_to_rays_own_limit() -> None:
    policy = retries(max_failures=0)
    assert policy.make_decision(ControllerError(WorkerGroupStartupTimeoutError(2))) == RETRY
    assert policy.make_decision(ControllerError(ValueError("a fault of the controller"))) == RAISE


def at_start(death: Exception) -> ControllerError:
    failure = WorkerGroupStartupFailedError("One of the worker actors failed to initialize due to error:\n...")
    failure.__cause__ = death
    return ControllerError(failure)


@pytest.mark.parametrize(
    ("death", "retried"),
    [(died("The worker process has died."), 1), (died("Its node has died"), 3), (died("running low on memory"), 0)],
)
def test_a_death_at_the_start_has_the_budget_of_its_cause(death: RayActorError, retried: int) -> None:
    policy = retries(max_failures=1, max_preemptions=3)
    decisions = [policy.make_decision(at_start(death)) for _ in range(retried + 1)]
    assert decisions == [RETRY] * retried + [RAISE]


def test_the_worker_that_failed_by_itself_is_named_not_its_peers() -> None:
    own = ValueError("no token in batch 7\nand more")
    assert describe(group(LOST_PEER, own)) == "worker 1: ValueError: no token in batch 7"
    assert describe(group(LOST_PEER)).startswith("worker 0: RuntimeError: [gloo]")


def test_a_dead_worker_and_a_failed_controller_are_told_in_their_first_line() -> None:
    assert describe(group(WorkerHealthCheckFailedError("A worker ...", died("...")))) == "worker 0: The actor died."
    assert describe(at_start(died("..."))) == "a worker, at its start: The actor died."
    assert describe(ControllerError(TimeoutError("no CPUs"))) == "TimeoutError: no CPUs"


def test_what_is_raised_in_the_end_says_what_to_do(tmp_path) -> None:
    run = distill_run(tmp_path, {}, resources={"micro_batch": 8})
    mistake = _final(group(LOST_PEER, UserError("data: no such file")), run, run.resources)
    assert (type(mistake), str(mistake)) == (UserError, "data: no such file")
    disk = _final(group(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/store/x")), run, run.resources)
    assert str(disk) == "/store/x: the disk is full; free some space and run again"
    full = _final(group(MemoryError("no room")), run, run.resources)
    assert isinstance(full, UserError)
    assert str(full) == (
        "distill ran out of memory (MemoryError: no room); lower resources.distill.micro_batch (now 8), or raise "
        "resources.distill.loss_chunks (now 1), or set resources.distill.activation_checkpointing: true, or set "
        "resources.distill.zero_stage: 3 with more than one of resources.distill.workers"
    )
    at_once = _final(at_start(died("running low on memory")), run, run.resources)
    assert str(at_once).startswith("distill ran out of memory (The actor died.); lower")
    other = _final(group(ValueError("NaN")), run, run.resources)
    assert isinstance(other, TrainingFailed)
    assert str(other) == f"worker 0: ValueError: NaN; the workers' logs are in {run.attempt}"


@pytest.mark.parametrize(
    ("stage", "resources", "advice"),
    [
        ("evaluate", {"micro_batch": 64}, "lower resources.evaluate.micro_batch (now 64)"),
        ("prune", {}, "run it where there is more memory"),
        ("benchmark", {}, "lower benchmark.batch, benchmark.prompt or benchmark.output"),
        ("calibrate", {"micro_batch": 1, "workers": 2}, "set resources.calibrate.zero_stage: 3"),
        (
            "teacher",
            {"micro_batch": 1, "workers": 2, "zero_stage": 3, "activation_checkpointing": True, "loss_chunks": 4},
            "raise resources.teacher.loss_chunks (now 4)",
        ),
    ],
)
def test_the_advice_names_what_the_stage_has_and_can_still_change(stage: str, resources: dict, advice: str) -> None:
    assert memory_advice(stage, StageResources.model_validate(resources)) == advice


def test_memory_of_a_gpu_is_named_as_such() -> None:
    on_gpu = StageResources(gpus_per_worker=1)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    assert out_of_memory("evaluate", on_gpu, error).startswith(
        "evaluate ran out of GPU memory (OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.); lower "
    )
