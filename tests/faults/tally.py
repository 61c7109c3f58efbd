"""What became of all runs of a folder so far: a line of JSON each, and the table of them.

Several processes append to the file, and later calls go on with it, so that a long run can be made of short ones.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.chain import Outcome
from tests.faults.strikes import FAULTS, Fault

FILE = "verdicts.jsonl"


@dataclass(frozen=True)
class Verdict:
    """One run."""

    seed: str
    commit: str
    """Of the program."""
    kind: str
    struck: list[tuple[str, str]] = field(default_factory=list)
    """Name of a fault, when it was due and what it hit."""
    missed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unavailable: str = ""
    """Why this machine does not allow this kind of run; then there was none."""
    drivers: int = 0
    seconds: float = 0.0
    ended: float = field(default_factory=time.time)

    @classmethod
    def of(cls, outcome: Outcome, seed: str, commit: str) -> Verdict:
        """In words what a chain came to."""
        return cls(
            seed=seed,
            commit=commit,
            kind=outcome.kind,
            struck=[(injection.fault.name, f"{injection}: {hit}") for injection, hit in outcome.struck],
            missed=[str(injection) for injection in outcome.missed],
            problems=outcome.problems,
            drivers=outcome.drivers,
            seconds=round(outcome.seconds, 1),
        )

    def __str__(self) -> str:
        word = "not possible here" if self.unavailable else "LOST" if self.problems else "recovered"
        return "\n".join(
            [f"{word} ({self.kind}, {self.drivers} drivers, {self.seconds:.0f} s, seed {self.seed})"]
            + [f"    {what}" for _, what in self.struck]
            + [f"    - missed: {what}" for what in self.missed]
            + [f"    ! {problem}" for problem in self.problems]
        )


def append(folder: Path, verdict: Verdict) -> None:
    """Add a line, whole: other processes add theirs."""
    descriptor = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, json.dumps(asdict(verdict)).encode() + b"\n")
    finally:
        os.close(descriptor)


def read(folder: Path) -> list[Verdict]:
    """All verdicts so far."""
    path = folder / FILE
    return [Verdict(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def count(verdicts: Sequence[Verdict]) -> Counter[str]:
    """Fault -> how often it was injected."""
    return Counter(fault for verdict in verdicts for fault, _ in verdict.struck)


def table(verdicts: Sequence[Verdict], faults: Sequence[Fault] = FAULTS) -> str:
    """Of a lost run all of its faults count as lost: any of them may have done it."""
    injected, recovered = count(verdicts), count(_well(verdicts))
    rows = [(fault.name, injected[fault.name], recovered[fault.name]) for fault in faults]
    rows += [("all", sum(injected.values()), sum(recovered.values()))]
    lines = [f"| {'fault':32} | injected | recovered | lost |", f"|{'-' * 34}|---------:|----------:|-----:|"]
    return "\n".join(lines + [f"| {name:32} | {all_:8} | {well:9} | {all_ - well:4} |" for name, all_, well in rows])


def unavailable(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Kind of run -> why this machine does not allow it."""
    return {verdict.kind: verdict.unavailable for verdict in verdicts if verdict.unavailable}


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The table and what is not in it, for a machine."""
    injected, recovered = count(verdicts), count(_well(verdicts))
    runs = [verdict for verdict in verdicts if not verdict.unavailable]
    without_fault = sum(bool(verdict.problems) and not verdict.struck for verdict in runs)
    return {
        "injected": sum(injected.values()),
        "recovered": sum(recovered.values()),
        "lost": sum(injected.values()) - sum(recovered.values()) + without_fault,
        "runs": len(runs),
        "drivers": sum(verdict.drivers for verdict in runs),
        "seconds": round(sum(verdict.seconds for verdict in runs)),
        "missed": sum(len(verdict.missed) for verdict in runs),
        "commits": dict(Counter(verdict.commit for verdict in runs)),
        "skipped": unavailable(verdicts),
        "faults": {name: [times, recovered[name]] for name, times in sorted(injected.items())},
        "problems": [f"{verdict.seed}: {problem}" for verdict in runs for problem in verdict.problems],
    }


def _well(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [verdict for verdict in verdicts if not verdict.problems]
