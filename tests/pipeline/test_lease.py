"""One builder per artifact, whatever clocks, kills and races do."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.lease import (
    LEASE_FILE,
    Lease,
    LeaseLost,
    Owner,
    Watch,
    acquire,
    attempt_folder,
    host_key,
    newest_attempt,
    process_start,
)

HERE = Path(__file__).parent
SCRIPT = [sys.executable, str(HERE / "store_toys.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}


class Clock:
    """A monotonic clock that tests move by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def attempts(tmp_path: Path) -> Path:
    return tmp_path / "artifact" / "attempts"


@pytest.fixture
def lease(attempts: Path) -> Iterator[Lease]:
    taken = acquire(attempts, after=0, beat=60.0)
    assert taken is not None
    yield taken
    taken.release()


def failing(number: int) -> Callable[..., None]:
    """A call of the system that fails."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


disk_full = failing(errno.ENOSPC)


def foreign(attempts: Path, number: int = 1, beat: int = 0, state: str = "held") -> Path:
    """A lease of a process on another host, as that process would have written it."""
    folder = attempt_folder(attempts, number)
    folder.mkdir(parents=True, exist_ok=True)
    owner = dataclasses.asdict(Owner("elsewhere/1/2", 12, 34, "token"))
    (folder / LEASE_FILE).write_text(json.dumps({"owner": owner, "state": state, "beat": f"{beat:012d}"}))
    return folder / LEASE_FILE


def test_a_fresh_artifact_is_free_a_leased_one_held_and_a_released_one_free_again(attempts: Path):
    watch = Watch(attempts)
    assert (watch.look().state, watch.look().attempt) == ("free", 0)
    lease = acquire(attempts, after=0)
    assert lease is not None
    assert (watch.look().state, watch.look().attempt) == ("held", 1)
    assert watch.look().owner == lease.owner
    lease.release()
    assert (watch.look().state, watch.look().attempt) == ("free", 1)


def test_a_number_that_is_taken_is_not_given_again(attempts: Path, lease: Lease):
    assert acquire(attempts, after=0) is None
    assert lease.held()
    assert sorted(path.name for path in attempts.iterdir()) == ["0001"]


def test_the_link_for_people_points_at_the_newest_attempt(attempts: Path, lease: Lease):
    link = attempts.parent / LEASE_FILE
    assert link.resolve() == lease.folder / LEASE_FILE
    lease.release()
    second = acquire(attempts, after=1)
    assert second is not None
    assert link.resolve() == second.folder / LEASE_FILE
    second.release()


def test_a_full_disk_takes_the_link_for_people_but_not_the_lease(attempts: Path, monkeypatch):
    """An exception after the number is taken would leave a lease without a heartbeat, and block its own process."""

    monkeypatch.setattr("pipeline.lease._point", disk_full)
    taken = acquire(attempts, after=0)
    assert taken is not None and taken.held()
    taken.release()
    assert Watch(attempts).look().state == "free"


def test_a_contender_that_cannot_write_leaves_nothing(attempts: Path, monkeypatch):
    monkeypatch.setattr("os.pwrite", disk_full)
    with pytest.raises(OSError, match="No space left"):
        acquire(attempts, after=0)
    assert list(attempts.iterdir()) == []


def test_a_holder_that_was_taken_over_knows_it_and_cannot_write_over_its_successor(attempts: Path, lease: Lease):
    successor = acquire(attempts, after=1, beat=60.0)
    assert successor is not None
    assert not lease.held()
    with pytest.raises(LeaseLost):
        lease.require()
    lease.release()
    assert successor.held()
    seen = Watch(attempts).look()
    assert (seen.state, seen.attempt, seen.owner) == ("held", 2, successor.owner)
    successor.release()


def test_a_holder_whose_folder_was_removed_or_replaced_knows_it(attempts: Path, lease: Lease):
    moved = attempts.with_name("gone")
    attempts.rename(moved)
    assert not lease.held()
    attempts.mkdir()
    foreign(attempts, 1)
    assert not lease.held()


def test_a_second_release_does_nothing_and_a_released_lease_is_not_held(lease: Lease):
    lease.release()
    lease.release()
    assert not lease.held()


def test_the_heartbeat_moves_the_file_and_keeps_it_readable(attempts: Path):
    lease = acquire(attempts, after=0, beat=0.01)
    assert lease is not None
    seen = set()
    deadline = time.monotonic() + 5.0
    while len(seen) < 4 and time.monotonic() < deadline:
        seen.add(json.loads((lease.folder / LEASE_FILE).read_text())["beat"])
    lease.release()
    assert len(seen) >= 4
    assert json.loads((lease.folder / LEASE_FILE).read_text())["state"] == "over"


def test_a_silent_holder_on_another_host_is_dead_after_the_ttl_of_the_waiters_clock(attempts: Path):
    foreign(attempts)
    clock = Clock()
    watch = Watch(attempts, ttl=90.0, clock=clock)
    states = []
    for _ in range(11):
        states.append(watch.look().state)
        clock.now += 10.0
    assert states == ["held"] * 9 + ["dead"] * 2
    assert "no sign of life for 90 s" in watch.look().why


def test_a_heartbeat_that_moves_however_late_keeps_the_lease_alive(attempts: Path):
    clock = Clock()
    watch = Watch(attempts, ttl=90.0, clock=clock)
    for beat in range(20):
        foreign(attempts, beat=beat)
        for _ in range(8):
            assert watch.look().state == "held"
            clock.now += 10.0


def test_no_file_time_and_no_wall_clock_can_kill_a_live_lease(attempts: Path, monkeypatch: pytest.MonkeyPatch):
    file = foreign(attempts)
    os.utime(file, (0, 0))  # a file server whose clock is in 1970
    watch = Watch(attempts, ttl=90.0)
    assert watch.look().state == "held"
    monkeypatch.setattr(time, "time", lambda: 4e9)  # our wall clock jumps to 2096
    assert watch.look().state == "held"


def test_a_waiter_that_was_suspended_with_the_holder_does_not_wake_up_and_kill_it(attempts: Path):
    foreign(attempts, beat=1)
    clock = Clock()
    watch = Watch(attempts, ttl=90.0, clock=clock)
    watch.look()
    clock.now += 100_000.0  # a laptop's lid: neither process ran
    assert watch.look().state == "held"
    foreign(attempts, beat=2)
    clock.now += 10.0
    assert watch.look().state == "held"


def test_a_new_attempt_gets_its_own_time(attempts: Path):
    foreign(attempts, 1)
    clock = Clock()
    watch = Watch(attempts, ttl=90.0, clock=clock)
    for _ in range(20):
        watch.look()
        clock.now += 10.0
    assert watch.look().state == "dead"
    foreign(attempts, 2)
    assert (watch.look().state, watch.look().attempt) == ("held", 2)


def test_a_holder_on_this_host_is_dead_at_once_when_its_process_is_gone_even_unreaped(attempts: Path):
    process = subprocess.Popen(["sleep", "60"])
    file = foreign(attempts)
    owner = Owner(host_key(), process.pid, process_start(process.pid), "token")
    file.write_text(json.dumps({"owner": dataclasses.asdict(owner), "state": "held", "beat": "0"}))
    assert Watch(attempts).look().state == "held"
    process.kill()
    deadline = time.monotonic() + 5.0
    while not owner.is_gone() and time.monotonic() < deadline:
        time.sleep(0.005)
    seen = Watch(attempts).look()  # a zombie still: nobody has waited for it
    process.wait()
    assert (seen.state, seen.why) == ("dead", f"process {process.pid} on {host_key().split('/')[0]} is gone")
    assert Watch(attempts).look().state == "dead"


def test_a_process_that_has_got_the_number_of_a_dead_holder_does_not_keep_it_alive():
    me = Owner.here()
    assert not me.is_gone()
    assert dataclasses.replace(me, started=(me.started or 0) - 1).is_gone()


def test_a_pid_of_another_host_boot_or_container_says_nothing():
    assert not Owner("elsewhere/1/2", 2**22 - 1, 1, "token").is_gone()
    assert not Owner(host_key() + "9", 2**22 - 1, 1, "token").is_gone()


def test_an_unreadable_lease_is_left_to_the_heartbeats_clock(attempts: Path):
    foreign(attempts).write_text("{")
    clock = Clock()
    watch = Watch(attempts, ttl=90.0, clock=clock)
    assert watch.look().state == "held"
    for _ in range(10):
        clock.now += 20.0
        watch.look()
    assert watch.look().state == "dead"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_lease_that_cannot_be_looked_at_is_left_to_the_heartbeats_clock(
    attempts: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch, number: int
):
    clock = Clock()
    watch = Watch(attempts, ttl=90.0, clock=clock)
    with monkeypatch.context() as away:
        away.setattr(Path, "read_bytes", failing(number))
        states = []
        for _ in range(6):
            states.append(watch.look().state)
            clock.now += 20.0
    assert states == ["held"] * 5 + ["dead"]
    assert watch.look().state == "held", "it can be read again"


def test_what_is_no_lease_in_its_place_is_dead_at_once(attempts: Path):
    foreign(attempts, 1).unlink()
    (attempt_folder(attempts, 1) / LEASE_FILE).mkdir()
    assert Watch(attempts).look().state == "dead"
    attempt_folder(attempts, 2).touch()
    assert Watch(attempts).look().state == "dead"
    attempt_folder(attempts, 3).mkdir()
    (attempt_folder(attempts, 3) / LEASE_FILE).symlink_to(LEASE_FILE)
    assert Watch(attempts).look().state == "dead"


def test_a_holder_that_cannot_look_at_its_lease_goes_on_but_does_not_publish(
    lease: Lease, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Path, "read_bytes", failing(errno.EMFILE))
    assert lease.held()
    with pytest.raises(OSError, match="Too many open files"):
        lease.require()


def test_an_attempt_without_a_lease_is_dead(attempts: Path):
    attempt_folder(attempts, 3).mkdir(parents=True)
    assert (Watch(attempts).look().state, newest_attempt(attempts)) == ("dead", 3)


def test_what_a_contender_left_that_died_before_its_rename_is_cleared(attempts: Path):
    (attempts / ".new-dead").mkdir(parents=True)
    (attempts / ".new-dead" / LEASE_FILE).write_text("{}")
    lease = acquire(attempts, after=0)
    assert lease is not None
    lease.release()
    assert [path.name for path in attempts.iterdir()] == ["0001"]


def test_of_four_processes_that_take_over_the_same_dead_lease_exactly_one_wins(tmp_path: Path):
    """With a check and then a plain move in place of the one rename, several win in every second round."""
    rounds = 60
    for turn in range(rounds):
        foreign(tmp_path / str(turn) / "attempts")
    command = [*SCRIPT, "contend", str(tmp_path), str(rounds)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [1] * rounds
