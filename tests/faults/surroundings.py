"""What is around a run and can fail too: a small disk, an MLflow server, a cluster with a second node, the clock.

Each run has one of these at most, for they cost seconds. Every process that is started here is ended here.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.tracking.tracker import ui_command
from tests.faults.place import ROOT, Driver, Place, environment, session_processes

DISK_BYTES = 256 * 2**20
"""Size of the store's own file system while it is not full."""
SERVER_START_S = 120.0
NODE_START_S = 120.0
HERE = Path(__file__).parent


class Unavailable(Exception):
    """This machine does not allow what a fault needs; `str` says what."""


@dataclass
class Surroundings:
    """Nothing special. The methods of what is not there are never called: a fault names the kind that it needs."""

    place: Place
    beside: list[Driver] = field(default_factory=list)
    """Second drivers that are at work."""
    damaged: list[Path] = field(default_factory=list)
    """Folders of artifacts that were damaged: those may be built again."""
    tracking_uri: str | None = None
    """Where MLflow's runs can be read at the end; None for the store's own file."""

    def __post_init__(self) -> None:
        """Start what is needed."""

    def __enter__(self) -> Surroundings:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End what was started."""

    def settle(self) -> None:
        """Repair what is broken, before the run that must come to the end."""

    def processes(self, driver: Driver) -> dict[int, str]:
        """Pid -> command line of what works for a driver."""
        return driver.processes()

    # What only one kind has:

    def leave_free(self, size: int) -> None:
        raise NotImplementedError

    def make_room(self) -> None:
        raise NotImplementedError

    def lose_server(self, seconds: float) -> None:
        raise NotImplementedError

    def lose_node(self, seconds: float) -> None:
        raise NotImplementedError

    def reclaim_node(self, seconds: float) -> None:
        raise NotImplementedError

    def set_clock(self, offset: float) -> None:
        raise NotImplementedError


class SmallDisk(Surroundings):
    """The store lies on a file system of its own, in memory, whose size can be changed."""

    def __post_init__(self) -> None:
        self.place.store.mkdir(exist_ok=True)
        self._mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs")

    def _mount(self, *arguments: str) -> None:
        done = subprocess.run(["mount", *arguments, str(self.place.store)], capture_output=True, text=True)
        if done.returncode != 0:
            raise Unavailable(f"mount is not permitted ({' '.join(done.stderr.split())})")

    def leave_free(self, size: int) -> None:
        used = os.statvfs(self.place.store)
        self._resize((used.f_blocks - used.f_bfree) * used.f_frsize + size)

    def make_room(self) -> None:
        self._resize(DISK_BYTES)

    settle = make_room

    def _resize(self, size: int) -> None:
        # 0 would mean half of the memory; a page is the least.
        self._mount("-o", f"remount,size={max(size, 4096)}")

    def close(self) -> None:
        self.place.end()
        subprocess.run(["umount", str(self.place.store)], check=True)


class WithServer(Surroundings):
    """MLflow runs as a server on this machine, over a database beside the store."""

    def __post_init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._database = self.place.folder / "server"
        self._database.mkdir()
        self.tracking_uri = f"sqlite:///{self._database}/mlflow.db"
        self.place.environment["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{self._port}"
        self._server: subprocess.Popen[bytes] | None = None
        self._return: threading.Timer | None = None
        self._start()
        self._wait_until_it_answers()

    def _start(self) -> None:
        command, extra = ui_command(self._database, self._port)
        with (self.place.folder / "server.txt").open("ab") as stream:
            self._server = subprocess.Popen(
                command, env=environment() | extra, stdout=stream, stderr=stream, start_new_session=True
            )

    def _wait_until_it_answers(self) -> None:
        end = time.monotonic() + SERVER_START_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5):
                    return
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def lose_server(self, seconds: float) -> None:
        self._kill()
        self._return = threading.Timer(seconds, self._start)
        self._return.start()

    def _kill(self) -> None:
        if self._return is not None:
            self._return.join()
        if self._server is not None:
            Driver(self._server, self.place.folder / "server.txt").kill_all()

    def settle(self) -> None:
        if self._return is not None:
            self._return.join()
        self._wait_until_it_answers()

    def close(self) -> None:
        self._kill()


class TwoNodes(Surroundings):
    """A Ray cluster: a head that holds the trials, and a second node on which all work runs."""

    def __post_init__(self) -> None:
        self._program = subprocess.Popen(
            [sys.executable, str(HERE / "nodes.py")],
            cwd=self.place.folder,
            env=environment() | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.place.folder / "nodes.txt").open("wb"),
            text=True,
            start_new_session=True,
        )
        self.place.arguments = ("--address", self._answer())

    def _answer(self) -> str:
        assert self._program.stdout is not None
        answer = self._program.stdout.readline().strip()
        if not answer:
            raise RuntimeError(f"the cluster ended; see {self.place.folder / 'nodes.txt'}")
        return answer

    def processes(self, driver: Driver) -> dict[int, str]:
        return driver.processes() | session_processes(self._program.pid)

    def lose_node(self, seconds: float) -> None:
        self._tell(f"lose {seconds}")

    def reclaim_node(self, seconds: float) -> None:
        self._tell(f"reclaim {seconds}")

    def _tell(self, command: str) -> None:
        assert self._program.stdin is not None
        self._program.stdin.write(f"{command}\n")
        self._program.stdin.flush()
        self._answer()

    def close(self) -> None:
        self.place.end()
        Driver(self._program, self.place.folder / "nodes.txt").kill_all()


class WithClock(Surroundings):
    """Drivers and all of their processes read the time through `sitecustomize.py` in a folder beside this file."""

    def __post_init__(self) -> None:
        self._offset = self.place.folder / "offset"
        self.set_clock(0.0)
        self.place.environment["OVERFILL_CLOCK_OFFSET"] = str(self._offset)
        self.place.environment["PYTHONPATH"] = os.pathsep.join([str(HERE / "clock"), str(ROOT)])

    def set_clock(self, offset: float) -> None:
        fresh = self._offset.with_suffix(".new")
        fresh.write_text(str(offset))
        fresh.replace(self._offset)


KINDS = {"plain": Surroundings, "disk": SmallDisk, "server": WithServer, "cluster": TwoNodes, "clock": WithClock}
