"""What to do next: a pure function from facts to actions, so that every decision is tested without a machine.

`plan` looks only at what the targets need: a finished artifact needs nothing of what it was made from, nor does one
that another process is building. For each needed stage, in order:

    its artifact is whole                          -> Reuse
    another process builds it                      -> Wait
    an attempt of this run's time failed           -> Refuse: it would fail again
    it was stopped by the scheduler                -> Refuse, unless stopped stages are to be continued
    an input waits or is refused                   -> Wait
    a step checkpoint or answered shards are there -> Resume
    otherwise, also where its artifact is altered  -> Run

Run and Resume name in `after` those of their inputs that this plan builds first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.difference import Nearest
from pipeline.lease import TTL
from pipeline.stage import Stage, sinks, topological

Outcome = Literal["done", "failed", "stopped", "interrupted"]


@dataclass(frozen=True)
class Facts:
    """What the store knows of one stage."""

    artifact: Literal["ok", "altered", "missing"] = "missing"
    """Whether it is finished, and whether its files are those of its record."""
    problem: str = ""
    """Of an altered artifact: which, and in what it differs."""
    lease: Literal["free", "held", "dead"] = "free"
    """Whether somebody is building it."""
    holder: str = ""
    """Who holds the lease, or held it: `process 12 on host`."""
    silent: bool = False
    """Whether a held lease looks like that of a killed process; for people alone: only waiting can tell."""
    attempt: int = 0
    """Number of the newest attempt; 0 for none."""
    outcome: Outcome | None = None
    """How the newest attempt ended; None while it runs or where there is none."""
    error: str = ""
    """One line about a failed or interrupted attempt."""
    log: str = ""
    """Log of the newest attempt."""
    checkpoint: int | None = None
    """Step of the newest whole step checkpoint."""
    torn: str = ""
    """Newer step checkpoints that are not whole, and why."""
    shards: str = ""
    """Of tasks: the shards and documents that are answered."""
    stopped: str = ""
    """Why the scheduler stopped it; empty when it did not."""
    nearest: Nearest | None = None
    """The existing artifact of the same stage with the fewest differing fields."""

    @property
    def settled(self) -> bool:
        """Whether its inputs do not matter: finished, or in the hands of another process."""
        return self.artifact == "ok" or self.lease == "held"


@dataclass(frozen=True)
class _Action:
    stage: Stage
    reason: str
    """In words, without the action's own name."""

    @property
    def kind(self) -> str:
        """`reuse`, `resume`, `run`, `wait` or `refuse`."""
        return type(self).__name__.lower()

    def __str__(self) -> str:
        return f"{self.kind} {self.stage}: {self.reason}"


@dataclass(frozen=True)
class Reuse(_Action):
    """The artifact is there and whole."""


@dataclass(frozen=True)
class Run(_Action):
    """Build it from the start."""

    after: tuple[str, ...] = ()
    """Names of its inputs that must be built first, by this plan; empty when it can start now."""


@dataclass(frozen=True)
class Resume(_Action):
    """Build it, going on from its step checkpoint, or behind its finished shards."""

    after: tuple[str, ...] = ()
    """As in Run."""


@dataclass(frozen=True)
class Wait(_Action):
    """Another process is building it, or one of its inputs."""


@dataclass(frozen=True)
class Refuse(_Action):
    """It cannot be built as things are; the reason ends with the way out."""

    cause: Literal["failed", "stopped"] = "failed"


Action = Reuse | Resume | Run | Wait | Refuse


def plan(
    stages: Sequence[Stage],
    facts: Mapping[str, Facts],
    targets: Sequence[Stage] | None = None,
    *,
    continue_stopped: bool = False,
    before: Mapping[str, int] | None = None,
) -> list[Action]:
    """Actions for the stages that the targets need, inputs first.

    `stages` may leave out inputs: they are added. `targets` are by default the stages that no other is made from.
    `facts` maps an identity to what is known of it; nothing known (a missing key) is a stage nobody has touched.
    `before` maps an identity to the newest attempt that had ended when this run began: a failure of a later one is final,
    whoever made it, and an earlier one is tried again, as all are without it. Numbers, since clocks may jump."""
    actions: dict[str, Action] = {}
    for stage in needed(stages, facts, targets):
        known = facts.get(stage.identity, Facts())
        actions[stage.identity] = _decide(stage, known, actions, continue_stopped, before)
    return list(actions.values())


def needed(stages: Sequence[Stage], facts: Mapping[str, Facts], targets: Sequence[Stage] | None = None) -> list[Stage]:
    """The targets, and the inputs of every needed stage whose inputs matter, inputs first."""
    wanted: set[str] = set()

    def visit(stage: Stage) -> None:
        if stage.identity in wanted:
            return
        wanted.add(stage.identity)
        if not facts.get(stage.identity, Facts()).settled:
            for source in stage.input_stages:
                visit(source)

    for target in sinks(stages) if targets is None else targets:
        visit(target)
    return [stage for stage in topological([*stages, *(targets or ())]) if stage.identity in wanted]


def _decide(
    stage: Stage,
    facts: Facts,
    decided: Mapping[str, Action],
    continue_stopped: bool,
    before: Mapping[str, int] | None,
) -> Action:
    if facts.artifact == "ok":
        return Reuse(stage, "its artifact is there")
    if facts.lease == "held" and facts.silent:
        end = f"it is taken over after {TTL:.0f} s without a sign of life"
        return Wait(stage, f"{facts.holder} was building it (attempt {facts.attempt}); {end}")
    if facts.lease == "held":
        return Wait(stage, f"{facts.holder} is building it (attempt {facts.attempt})")
    if facts.outcome == "failed" and before is not None and facts.attempt > before.get(stage.identity, 0):
        return Refuse(stage, f"attempt {facts.attempt} failed: {facts.error} ({facts.log})", "failed")
    if facts.stopped and not continue_stopped:
        return Refuse(stage, f"{facts.stopped}; `overfill resume --continue-stopped` continues it", "stopped")
    sources = [(source, decided[source.identity]) for source in _distinct(stage.input_stages)]
    blocked = [source.name for source, action in sources if isinstance(action, Wait | Refuse)]
    if blocked:
        return Wait(stage, f"waits for: {', '.join(blocked)}")
    after = tuple(source.name for source, action in sources if not isinstance(action, Reuse))
    if facts.checkpoint is not None:
        return Resume(stage, f"from step checkpoint {facts.checkpoint}{_history(facts, ' of ')}{_torn(facts)}", after)
    if facts.shards:
        return Resume(stage, f"behind {facts.shards}{_history(facts, ' of ')}", after)
    if facts.artifact == "altered":
        return Run(stage, f"it is set aside and built again: {facts.problem}", after)
    return Run(stage, f"no artifact{_history(facts, '; ')}{_torn(facts)}{_comparison(facts)}", after)


def _distinct(stages: Sequence[Stage]) -> list[Stage]:
    return list(dict.fromkeys(stages))


def _history(facts: Facts, joint: str) -> str:
    if not facts.attempt:
        return ""
    if facts.stopped:
        return f"{joint}attempt {facts.attempt}: {facts.stopped}"
    relative = " which " if joint == " of " else " "
    if facts.outcome == "done":
        return f"{joint}attempt {facts.attempt}, whose payload was removed since"
    if facts.outcome == "failed":
        return f"{joint}attempt {facts.attempt}{relative}failed: {facts.error}"
    return f"{joint}attempt {facts.attempt}{relative}was interrupted" + (f": {facts.error}" if facts.error else "")


def _torn(facts: Facts) -> str:
    return f"; not whole: {facts.torn}" if facts.torn else ""


def _comparison(facts: Facts) -> str:
    return f"; {facts.nearest}" if facts.nearest is not None else ""
