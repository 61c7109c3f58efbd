"""`make faults`: many runs with faults at random times, and a table of what became of them.

    python -m tests.faults [-n INJECTIONS] [--seed SEED] [--length FAULTS] [--only WORD ...] [--minutes MINUTES]
                           [--folder FOLDER]

The last line is JSON. Exit code 1 when anything was lost; the stores of those runs stay in the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from pipeline.record import source_commit
from tests.faults.chain import Outcome, draw_chain, run_chain, unbroken
from tests.faults.place import Place
from tests.faults.strikes import FAULTS, Fault, Kind
from tests.faults.surroundings import Unavailable
from tests.faults.verdict import Result

WEIGHTS: dict[Kind, int] = {"plain": 8, "disk": 2, "server": 2, "cluster": 2, "clock": 2}
"""How often a run has what around it."""

FRUITLESS = 3
"""Runs one after another in which no fault found anything to hit: the next would not either."""


def main() -> int:
    """Inject until the number is reached or the time is up; the exit code."""
    options = _options()
    faults = [fault for fault in FAULTS if not options.only or any(word in fault.name for word in options.only)]
    folder = Path(options.folder or tempfile.mkdtemp(prefix="overfill-faults-"))
    place = Place(folder.absolute() / "place")
    print(f"working in {folder.absolute()}", flush=True)
    try:
        outcomes, skipped = _run_all(place, _unbroken(place, folder), faults, options)
    finally:
        place.end()
    _print_table(outcomes, faults)
    for kind, why in skipped.items():
        print(f"skipped: {kind}: {why}")
    summary = _summary(outcomes, options.seed, skipped)
    print(json.dumps(summary, sort_keys=True))
    return 1 if summary["lost"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description="Faults in real runs, and a table of what became of them."
    )
    parser.add_argument("-n", "--injections", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of faults and moments; the same seed draws the same")
    parser.add_argument("--length", type=int, default=5, help="faults in one run")
    parser.add_argument("--only", nargs="*", help="words; only faults whose name has one of them")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--folder", help="where to work, and what to keep there of lost runs; a new one by default")
    return parser.parse_args()


def _unbroken(place: Place, folder: Path) -> Result:
    """The unbroken run's result; one that an earlier call of the same commit left in the folder is used again."""
    path = folder / f"unbroken-{source_commit()}.json"
    if not path.exists():
        place.clear()
        unbroken(place).write(path)
    return Result.read(path)


def _run_all(
    place: Place, expected: Result, faults: Sequence[Fault], options: argparse.Namespace
) -> tuple[list[Outcome], dict[str, str]]:
    random = Random(options.seed)
    outcomes: list[Outcome] = []
    skipped: dict[str, str] = {}
    end, injected = time.monotonic() + 60 * options.minutes, 0
    kinds: list[Kind] = [kind for kind, weight in WEIGHTS.items() for _ in range(weight)]
    possible = {fault.kind for fault in faults}
    while injected < options.injections and time.monotonic() < end and possible - skipped.keys():
        if len(outcomes) >= FRUITLESS and not any(outcome.struck for outcome in outcomes[-FRUITLESS:]):
            break
        kind = random.choice([kind for kind in kinds if kind in possible])
        seed = random.randrange(10**6)
        if kind in skipped:
            continue
        chain = draw_chain(random, kind, min(options.length, options.injections - injected), faults)
        try:
            outcome = run_chain(place, chain, expected, seed)
        except Unavailable as why:
            skipped[kind] = str(why)
            continue
        except Exception as error:  # an unfinished run says nothing, but must not end the others
            traceback.print_exc()
            outcome = Outcome(kind, problems=[f"the harness failed: {error!r}"])
        injected += len(outcome.struck)
        outcomes.append(outcome)
        _print_outcome(outcome, seed)
    return outcomes, skipped


def _print_outcome(outcome: Outcome, seed: int) -> None:
    word = "LOST" if outcome.problems else "recovered"
    print(f"{word} ({outcome.kind}, {outcome.drivers} drivers, {outcome.seconds:.0f} s, {seed})")
    for injection, hit in outcome.struck:
        print(f"    {injection}: {hit}")
    for problem in outcome.problems:
        print(f"    ! {problem}")
    sys.stdout.flush()


def _print_table(outcomes: Sequence[Outcome], faults: Sequence[Fault]) -> None:
    """Of a lost run all of its faults count as lost: any of them may have done it."""
    injected, recovered = _count(outcomes), _count([outcome for outcome in outcomes if not outcome.problems])
    rows = [(fault.name, injected[fault.name], recovered[fault.name]) for fault in faults]
    rows += [("all", sum(injected.values()), sum(recovered.values()))]
    print(f"| {'fault':32} | injected | recovered | lost |\n|{'-' * 34}|---------:|----------:|-----:|")
    for name, times, well in rows:
        print(f"| {name:32} | {times:8} | {well:9} | {times - well:4} |")


def _count(outcomes: Sequence[Outcome]) -> Counter[str]:
    return Counter(injection.fault.name for outcome in outcomes for injection, _ in outcome.struck)


def _summary(outcomes: Sequence[Outcome], seed: int, skipped: dict[str, str]) -> dict[str, Any]:
    injected, recovered = _count(outcomes), _count([outcome for outcome in outcomes if not outcome.problems])
    return {
        "injected": sum(injected.values()),
        "recovered": sum(recovered.values()),
        "lost": sum(injected.values())
        - sum(recovered.values())
        + sum(bool(o.problems) and not o.struck for o in outcomes),
        "runs": len(outcomes),
        "drivers": sum(outcome.drivers for outcome in outcomes),
        "seconds": round(sum(outcome.seconds for outcome in outcomes)),
        "missed": sum(len(outcome.missed) for outcome in outcomes),
        "seed": seed,
        "commit": source_commit(),
        "skipped": skipped,
        "faults": {name: [times, recovered[name]] for name, times in sorted(injected.items())},
        "problems": [problem for outcome in outcomes for problem in outcome.problems],
    }


if __name__ == "__main__":
    sys.exit(main())
