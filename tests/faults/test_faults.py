"""Nothing is lost: a few fixed faults in real runs. `make faults` strikes at random, hundreds of times."""

from __future__ import annotations

import pytest

from tests.faults.chain import Injection, run_chain, unbroken
from tests.faults.place import Place
from tests.faults.strikes import FAULTS
from tests.faults.verdict import Result

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

BY_NAME = {fault.name: fault for fault in FAULTS}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("faults") / "place")


@pytest.fixture(scope="module")
def expected(place: Place) -> Result:
    """What the run that nothing happens to comes to."""
    return unbroken(place)


def check(place: Place, expected: Result, *injections: Injection) -> None:
    outcome = run_chain(place, injections, expected, seed="0")
    assert not outcome.problems, "\n".join([*map(str, outcome.struck), *outcome.problems])
    assert not outcome.missed, "a fault that found nothing to hit proves nothing"


def test_workers_drivers_and_the_machine_die_while_another_driver_wants_the_same_and_a_scheduler_ends_the_run(
    place, expected
):
    check(
        place,
        expected,
        Injection(BY_NAME["kill -9 of a Ray Data task"], "data"),
        Injection(BY_NAME["kill -9 of a training worker"], "teacher", step=7),
        Injection(BY_NAME["kill -9 of the driver"], "teacher", step=9),
        Injection(BY_NAME["two drivers at once"], "prune"),
        Injection(BY_NAME["kill -9 of the driver"], "distill", step=6),
        Injection(BY_NAME["truncated step checkpoint"], "distill", step=10),
        Injection(BY_NAME["SIGTERM"], "evaluate", after=1.0),
        Injection(BY_NAME["two drivers at once"], "evaluate"),
    )
