"""A run that is struck several times and must still come to the result of the unbroken one.

Faults come in the order of the stages. A driver that has ended is started again, at once, as a user or a scheduler
would; after the last fault the experiment is run to its end, and everything about it is compared. Several faults in one
run cost less than one each (most of a run's minute is starting), and meet each other's consequences.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from tests.faults import verdict
from tests.faults.place import LONGEST_RUN_S, STAGES, STEPS, Left, Place, name_of, starts
from tests.faults.strikes import FAULTS, Fault, Kind, Target, wait_for_second_drivers
from tests.faults.surroundings import KINDS, Surroundings

DURATIONS_S = {
    "tokenizer": 1.0, "data": 5.0, "teacher": 10.0, "calibrate": 7.0,
    "prune": 4.0, "distill": 12.0, "evaluate": 6.0, "benchmark": 0.7,
}  # fmt: skip
"""About how long each stage takes, the start of its workers included: faults strike at any time in it."""
EARLY_S = 3.0
"""In which an early fault is due: before the workers that it strikes are there, so that it meets them as they come."""
TRIES_S = 12.0
"""How long a fault that is due looks for something to hit, before it is the next one's turn."""
MOST_STARTS = 4
"""Drivers that end one after another, without a fault in between, before that counts as no progress."""
PATIENCE_S = 120.0
"""How long processes may take to end by themselves, after the run that they belong to: the agents of a node whose driver
was killed look for it once a minute."""


@dataclass(frozen=True)
class Injection:
    """A fault, and when it is due."""

    fault: Fault
    stage: str
    after: float = 0.0
    """Seconds after an attempt at the stage begins."""
    step: int = 0
    """Or as soon as this step was logged; 0 for a moment in time."""

    def __str__(self) -> str:
        when = f"step {self.step}" if self.step else f"{self.after:.1f} s"
        return f"{self.fault.name} in {self.stage} at {when}"

    @classmethod
    def draw(cls, fault: Fault, random: Random) -> Injection:
        """Anywhere that the fault can strike."""
        stage = random.choice(fault.stages)
        if fault.early:
            return cls(fault, stage, after=random.uniform(0.0, EARLY_S))
        if stage in STEPS and (fault.at_step or random.random() < 0.5):
            return cls(fault, stage, step=random.randint(max(1, fault.at_step), STEPS[stage] - 2))
        return cls(fault, stage, after=random.uniform(0.0, DURATIONS_S[stage]))


@dataclass
class Outcome:
    """How a chain ended."""

    kind: Kind
    struck: list[tuple[Injection, str]] = field(default_factory=list)
    """What was injected, and what it hit."""
    missed: list[Injection] = field(default_factory=list)
    """What found its stage finished, or nothing to hit."""
    problems: list[str] = field(default_factory=list)
    """Why the result is not that of the unbroken run; empty when it is."""
    drivers: int = 0
    seconds: float = 0.0


def draw_chain(
    random: Random, length: int, faults: Sequence[Fault] = FAULTS, injected: Mapping[str, int] | None = None
) -> list[Injection]:
    """Faults for one run, rather those that were injected less often so far.

    The first one says what is around the run; the others need the same, or nothing."""
    times = injected or {}
    weights = {fault: 1 / (1 + times.get(fault.name, 0)) ** 2 for fault in faults}
    first = random.choices(faults, list(weights.values()))[0]
    possible = [fault for fault in faults if fault.kind in ("plain", first.kind)]
    others = random.choices(possible, [weights[fault] for fault in possible], k=length - 1)
    drawn = [Injection.draw(fault, random) for fault in (first, *others)]
    return sorted(drawn, key=lambda one: (STAGES.index(one.stage), one.step or one.after))


def kind_of(injections: Sequence[Injection]) -> Kind:
    """What they need around the run: one thing at most beside the plain ones."""
    kinds: list[Kind] = [one.fault.kind for one in injections if one.fault.kind != "plain"]
    return kinds[0] if kinds else "plain"


def unbroken(place: Place) -> verdict.Result:
    """The result that every chain must have: of a run that nothing happens to."""
    place.start()
    code = place.driver.wait(LONGEST_RUN_S)
    assert code == 0, f"the unbroken run ended with {code}:\n{place.driver.text()}"
    wrong = verdict.leftovers(place.store, place.cells) + [f"process {pid}: {line}" for pid, line in _left(place)]
    assert not wrong, wrong
    return verdict.Result.of(place.store)


def run_chain(place: Place, injections: Sequence[Injection], expected: verdict.Result, seed: str) -> Outcome:
    """Run the experiment in an empty place, with these faults.

    Raises Unavailable when this machine does not allow what they need."""
    outcome, began = Outcome(kind_of(injections)), time.monotonic()
    place.clear()
    place.environment.clear()
    place.arguments = ()
    with KINDS[outcome.kind](place) as around:
        try:
            _Chain(place, around, outcome, Random(seed)).run(injections, expected)
        finally:
            place.end()
            if outcome.problems:
                _keep(place, seed)
    outcome.drivers, outcome.seconds = len(place.drivers), time.monotonic() - began
    return outcome


@dataclass
class _Chain:
    place: Place
    around: Surroundings
    outcome: Outcome
    random: Random
    finished: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Artifact -> (attempt, end) of what was finished before a fault: nothing of it may be done again, unless damaged."""
    starts: int = 0
    """Drivers that were started since the last fault."""
    left: list[Left] = field(default_factory=list)
    """After a fault: where every training stood."""

    def run(self, injections: Sequence[Injection], expected: verdict.Result) -> None:
        self.place.start()
        for injection in injections:
            hit = self._inject(injection)
            if hit is None:
                self.outcome.missed.append(injection)
            else:
                self.outcome.struck.append((injection, hit))
            if self.outcome.problems:
                return
        self.around.settle()
        self._finish()
        if not self.outcome.problems:
            self._judge(expected)

    def _inject(self, injection: Injection) -> str | None:
        """Wait for the moment and strike; what was hit, or None when it never came to that."""
        due: float | None = None
        last: float | None = None
        while self._keep_going(injection.stage):
            if self.place.running(injection.stage):
                now = time.monotonic()
                due = now + injection.after if due is None else due
                if self._is_due(injection, due):
                    last = now + TRIES_S if last is None else last
                    if (hit := self._strike(injection)) is not None or now > last:
                        return hit
            time.sleep(0.02)
        return None

    def _is_due(self, injection: Injection, due: float) -> bool:
        if injection.step:
            return self.place.step(injection.stage) >= injection.step
        return time.monotonic() >= due

    def _strike(self, injection: Injection) -> str | None:
        before = {name: (record.attempt, record.finished) for name, record in verdict.records(self.place.store).items()}
        target = Target(self.place, self.around, injection.stage, self.random)
        hit = injection.fault.strike(target)
        self.outcome.problems += target.problems
        if hit is not None:
            self.finished |= before
            self.starts = 0
            now = [Left.of(folder) for stage in STEPS for folder in self.place.artifacts(stage)]
            self.left = expected_after(self.left, now, injection.fault.tears)
        return hit

    def _keep_going(self, stage: str) -> bool:
        """Whether the stage can still be struck: it is not finished. A driver that has ended is started again."""
        if self.place.finished(stage) or self.outcome.problems:
            return False
        if not self.place.driver.alive:
            self._start_again()
        return not self.outcome.problems

    def _start_again(self) -> None:
        if self.starts == MOST_STARTS:
            self.outcome.problems.append(f"{MOST_STARTS} drivers ended one after another")
            return
        self.starts += 1
        self.place.start()

    def _finish(self) -> None:
        """Run to the end. What was broken is repaired, so when the driver at work does not get there, the next must."""
        code = self.place.driver.wait(LONGEST_RUN_S)
        if code not in (0, None):
            self._start_again()
            code = self.place.driver.wait(LONGEST_RUN_S)
        target = Target(self.place, self.around, "", self.random)
        wait_for_second_drivers(target)
        self.outcome.problems += target.problems
        if code != 0:
            end = f"no end after {LONGEST_RUN_S:.0f} s" if code is None else f"exit code {code}"
            self.outcome.problems.append(f"the last run ({self.place.driver.output.name}): {end}")

    def _judge(self, expected: verdict.Result) -> None:
        problems = verdict.leftovers(self.place.store, self.place.cells)
        problems += [f"process {pid} is left: {line[:100]}" for pid, line in _left(self.place)]
        problems += verdict.differences(expected, verdict.Result.of(self.place.store, self.around.tracking_uri))
        there = verdict.records(self.place.store)
        damaged = {name_of(folder) for folder in self.around.damaged}
        for name, before in self.finished.items():
            if name not in damaged and (name not in there or (there[name].attempt, there[name].finished) != before):
                problems.append(f"{name} was finished (attempt {before[0]}) and was done again")
        for left in self.left:
            began = starts(left.folder)[left.starts : left.starts + 1]
            if name_of(left.folder) not in damaged and began and began[0] < left.step:
                problems.append(f"{name_of(left.folder)} went on from step {began[0]}, and step {left.step} was saved")
        self.outcome.problems += problems


def expected_after(before: list[Left], now: list[Left], torn: bool) -> list[Left]:
    """What is known of where trainings must go on, with what a fault has left them.

    A fault that tears a step checkpoint takes back what was expected of a training that has not begun again since."""
    replaced = {(left.folder, left.starts) for left in now} if torn else set()
    return [left for left in before if (left.folder, left.starts) not in replaced] + now


def _left(place: Place) -> list[tuple[int, str]]:
    return sorted(place.leftover_processes(PATIENCE_S).items())


def _keep(place: Place, seed: str) -> None:
    """Set the store of a lost run aside, with what its drivers printed."""
    target = place.folder.parent / f"lost-{seed}"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(place.folder, target, symlinks=True)
