"""What a failure is, and whether to try again. Decisions over values: Ray Train's policy and `run_on_worker` ask.

Causes have budgets of their own, for they say different things. A lost node says nothing about the work, and on
reclaimable machines it happens every few hours; a dead worker may be bad luck or a fault that comes again; a user's
mistake and a model that does not fit come again for certain, so they are not tried a second time, and say what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ray.exceptions import (
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)

from overfill.errors import UserError, disk_full
from pipeline.config import StageResources


class NodeReclaimed(Exception):
    """A node of this run is being taken away; the position is saved, and the run goes on elsewhere."""


Cause = Literal["user", "memory", "node", "worker"]
ORDER: tuple[Cause, ...] = ("user", "memory", "node", "worker")
"""Of several workers' causes the first of these is the group's: when one dies, its peers lose their connections."""

MEMORY_WORDS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "running low on memory",  # Ray's memory monitor, of a process that it has killed
    "CUDA out of memory",
    "CUDA error: out of memory",  # of the driver, where torch's allocator was not asked
    "STATUS_ALLOC_FAILED",  # of cuBLAS, cuDNN and others
    "'out of memory'",  # NCCL quoting CUDA: "Cuda failure 2 'out of memory'"
    "std::bad_alloc",
    "Cannot allocate memory",  # ENOMEM
)
NODE_WORDS = ("node has died", "node is dead", "node was terminated", "raylet died")
LOST_NODE = (NodeReclaimed, NodeDiedError, LocalRayletDiedError, ObjectLostError, ActorUnavailableError)
"""An actor of a node that has died is unavailable at first: its process' own death would be reported as such."""
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def origin(error: BaseException) -> BaseException:
    """The error itself, out of what Ray wraps around it."""
    inner = getattr(error, "health_check_failure", None) or (error.cause if isinstance(error, RayTaskError) else None)
    return error if inner is None else origin(inner)


def cause_of(error: BaseException) -> Cause:
    """The cause of one worker's error."""
    error = origin(error)
    text = str(error)
    if isinstance(error, UserError) or disk_full(error):
        return "user"
    # By name: torch's own class may not be imported here, and Ray has one of the same name and meaning.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _any(MEMORY_WORDS, text):
        return "memory"
    if isinstance(error, LOST_NODE):
        return "node"
    if isinstance(error, RayActorError) and (error.preempted or _any(NODE_WORDS, text)):
        return "node"
    return "worker"


def cause_of_all(errors: Iterable[BaseException]) -> Cause:
    """The cause of a failure of several workers together."""
    found = {cause_of(error) for error in errors}
    for cause in ORDER:
        if cause in found:
            return cause
    return "worker"


def one_line(error: BaseException) -> str:
    """Type and first line; of Ray's own errors, which say what happened to a process, and of a user's mistake, the
    first line alone."""
    error = origin(error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, RayError | UserError) or not first:
        return first or type(error).__name__
    return f"{type(error).__name__}: {first}"


def first_of(cause: Cause, errors: Mapping[int, BaseException]) -> tuple[int, BaseException]:
    """(rank, error) of the lowest rank that has this cause, and not just a peer that it lost."""
    alike = {rank: error for rank, error in sorted(errors.items()) if cause_of(error) == cause}
    own = {rank: error for rank, error in alike.items() if not _any(LOST_PEER, str(origin(error)))}
    return next(iter((own or alike).items()))


def _any(words: Iterable[str], text: str) -> bool:
    return any(word in text for word in words)


@dataclass
class Budget:
    """How often a stage may still be tried again, by cause."""

    limits: Mapping[Cause, int]
    used: Counter[Cause] = field(default_factory=Counter)

    @classmethod
    def of(cls, resources: StageResources) -> Budget:
        """The budget that a stage's resources give it."""
        return cls({"user": 0, "memory": 0, "node": resources.max_preemptions, "worker": resources.max_failures})

    def spend(self, cause: Cause) -> bool:
        """Count a failure; whether to try again."""
        self.used[cause] += 1
        return self.used[cause] <= self.limits[cause]

    def told(self, cause: Cause) -> str:
        """`failure 2, 2 may be retried`, for a log."""
        what = "lost node" if cause == "node" else "failure"
        return f"{what} {self.used[cause]}, {self.limits[cause]} may be retried"


def out_of_memory(stage: str, resources: StageResources, error: BaseException) -> str:
    """One line about a stage that did not fit, with what to lower."""
    where = "GPU memory" if resources.gpus_per_worker else "memory"
    return f"{stage} ran out of {where} ({one_line(error)[:160]}); {memory_advice(stage, resources)}"


def memory_advice(stage: str, resources: StageResources) -> str:
    """Which settings to change, best first; those that cannot give more are left out."""
    name = f"resources.{stage}"
    ways: list[str] = []
    if stage == "benchmark":
        ways.append("lower benchmark.batch, benchmark.prompt or benchmark.output")
    elif stage != "prune" and resources.micro_batch > 1:
        ways.append(f"lower {name}.micro_batch (now {resources.micro_batch})")
    if stage in ("teacher", "distill"):
        ways.append(f"raise {name}.loss_chunks (now {resources.loss_chunks})")
        ways += [] if resources.activation_checkpointing else [f"set {name}.activation_checkpointing: true"]
    if stage in ("teacher", "distill", "calibrate") and (resources.zero_stage < 3 or resources.workers == 1):
        more = "" if resources.workers > 1 else f" with more than one of {name}.workers"
        ways.append(f"set {name}.zero_stage: 3{more}")
    return ", or ".join(ways) or "run it where there is more memory"
