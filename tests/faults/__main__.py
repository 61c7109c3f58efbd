"""`make faults`: many runs with faults at random times, and a table of what became of them.

    python -m tests.faults [-n INJECTIONS] [--seed SEED] [--length FAULTS] [--only WORD ...] [--minutes MINUTES]
                           [--jobs RUNS] [--workers WORKERS] [--cells CELLS] [--folder FOLDER] [--table]

A folder that has verdicts of earlier calls is gone on with. The last line is JSON. Exit code 1 when anything was lost;
the stores of those runs stay in the folder.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from random import Random

from pipeline.record import source_commit
from tests.faults import tally
from tests.faults.chain import Injection, Outcome, draw_chain, kind_of, run_chain, unbroken
from tests.faults.place import Place
from tests.faults.strikes import FAULTS, Fault
from tests.faults.surroundings import Unavailable
from tests.faults.tally import Verdict
from tests.faults.verdict import Result

FRUITLESS = 3
"""Runs one after another in which no fault found anything to hit: the next would not either."""


def main() -> int:
    """Inject until the number is reached or the time is up; the exit code."""
    # A shell that starts this in the background has Ctrl-C ignored, and drivers would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    options = _options()
    faults = [fault for fault in FAULTS if not options.only or any(word in fault.name for word in options.only)]
    folder = Path(options.folder or tempfile.mkdtemp(prefix="overfill-faults-")).absolute()
    broken = False
    if not options.table:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"working in {folder}", flush=True)
        broken = _run_jobs(folder, faults, options)
    verdicts = tally.read(folder)
    print(tally.table(verdicts, faults))
    for kind, why in tally.unavailable(verdicts).items():
        print(f"skipped: {kind}: {why}")
    summary = tally.summary(verdicts)
    print(json.dumps(summary, sort_keys=True))
    return 1 if summary["lost"] or broken else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description="Faults in real runs, and a table of what became of them."
    )
    parser.add_argument("-n", "--injections", type=int, default=200, help="in the folder, earlier calls included")
    parser.add_argument("--seed", type=int, default=0, help="of faults and moments")
    parser.add_argument("--length", type=int, default=5, help="faults in one run")
    parser.add_argument("--only", nargs="*", help="words; only faults whose name has one of them")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side: much of a run is waiting")
    parser.add_argument("--workers", type=int, default=1, help="of each stage that trains")
    parser.add_argument("--cells", type=int, default=1, choices=(1, 2), help="of the experiment")
    parser.add_argument("--folder", help="where to work, and what to keep there of lost runs; a new one by default")
    parser.add_argument("--table", action="store_true", help="only print what the folder's runs have come to")
    return parser.parse_args()


def _run_jobs(folder: Path, faults: Sequence[Fault], options: argparse.Namespace) -> bool:
    """Run side by side, each job at a place of its own; whether one of them ended by an error of its own."""
    end = time.monotonic() + 60 * options.minutes
    context = get_context("fork")
    numbers = range(1, options.jobs + 1)
    jobs = [context.Process(target=_run_job, args=(folder, number, faults, options, end)) for number in numbers]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    return any(job.exitcode for job in jobs)


def _run_job(folder: Path, job: int, faults: Sequence[Fault], options: argparse.Namespace, end: float) -> None:
    place = Place(folder / f"place-{job}", options.workers, options.cells)
    commit = source_commit() or "unknown"
    try:
        expected = _unbroken(place, folder / f"unbroken-{job}-{options.cells}x{options.workers}-{commit}.json")
        fruitless = 0
        while fruitless < FRUITLESS and time.monotonic() < end:
            verdicts = tally.read(folder)
            missing = options.injections - sum(tally.count(verdicts).values())
            possible = [fault for fault in faults if fault.kind not in tally.unavailable(verdicts)]
            if missing <= 0 or not possible:
                return
            prefix = f"{options.seed}-{job}-"
            seed = f"{prefix}{sum(verdict.seed.startswith(prefix) for verdict in verdicts)}"
            random = Random(seed)
            chain = draw_chain(random, min(options.length, missing), possible, tally.count(verdicts))
            verdict = _judge(place, chain, expected, seed, commit)
            fruitless = 0 if verdict.struck else fruitless + 1
            tally.append(folder, verdict)
            print(verdict, flush=True)
    finally:
        place.end()


def _judge(place: Place, chain: Sequence[Injection], expected: Result, seed: str, commit: str) -> Verdict:
    try:
        outcome = run_chain(place, chain, expected, seed)
    except Unavailable as why:
        return Verdict(seed, commit, kind_of(chain), unavailable=str(why))
    except Exception as error:  # an unfinished run says nothing, but must not end the others
        traceback.print_exc()
        outcome = Outcome(kind_of(chain), problems=[f"the harness failed: {error!r}"])
    return Verdict.of(outcome, seed, commit)


def _unbroken(place: Place, path: Path) -> Result:
    """The unbroken run's result; one that an earlier call of the same commit left is used again.

    Of every place its own: a student's manifest names its full model's folder."""
    if not path.exists():
        place.clear()
        unbroken(place).write(path)
    return Result.read(path)


if __name__ == "__main__":
    sys.exit(main())
