"""Ctrl-C, SIGTERM and a terminal that is closed (SIGHUP): the first asks a run to end, the second ends it.

Asked, a run raises a flag that the trials of all its cells look for, wherever they are. A stage that trains sees it
after the step it is in, writes a step checkpoint and ends; one that cannot save its position is cancelled. What was
being built counts as interrupted, so the next run goes on with it by itself. The driver waits for all this for a grace
period and says for what. At its end, or at a second signal, KeyboardInterrupt goes through the driver as it always
did: workers end with it, and what they had not saved is lost, as in a crash, and nothing else.

A closed terminal sends SIGHUP to all of its processes, twice where its shell ends, and takes no more words. So the
second one ends nothing, processes of a Ray of our own do not hear any, and the driver's words go nowhere. Under nohup
SIGHUP stays ignored.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from pipeline.stop import StopFlag

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heard() -> list[signal.Signals]:
    """The signals that are requests here: all but a hangup that is ignored already, as under nohup."""
    return [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) is not signal.SIG_IGN]


@contextlib.contextmanager
def deaf_to_hangup() -> Iterator[None]:
    """Processes that are started inside, and theirs, do not hear a hangup: who has started them needs them until it ends.

    One that comes to this process meanwhile is heard at the end, unless the system gives it to another thread, where it is
    lost: a run that has not begun goes on then. Outside of the main thread nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL if before is None else before)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)


def leave_closed_terminal(descriptors: Sequence[int] = (1, 2)) -> None:
    """What is written to a terminal that is gone goes nowhere, instead of raising an error wherever something is said."""
    for descriptor in descriptors:
        try:
            termios.tcgetattr(descriptor)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # of a file or a pipe it is another one
                with Path(os.devnull).open("w") as nowhere:
                    os.dup2(nowhere.fileno(), descriptor)


class EndNow(KeyboardInterrupt):
    """The user does not want to wait, or has waited long enough."""


class Interruption:
    """While it is entered, in the main thread, signals are requests."""

    def __init__(
        self, flag: StopFlag, grace_s: float, waiting_for: Callable[[], Sequence[str]], say: Callable[[str], None]
    ) -> None:
        self.flag = flag
        """Says that this run shall end; it is taken down when the run is over."""
        self._grace_s = grace_s
        self._waiting_for = waiting_for
        self._say = say
        self._asked = threading.Event()
        self._over = threading.Event()
        self._before: dict[int, Any] = {}

    def requested(self) -> bool:
        """Whether the run was asked to end."""
        return self._asked.is_set()

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in heard()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._over.set()
        with contextlib.suppress(OSError):  # nobody looks for it any more
            self.flag.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_closed_terminal()
            if self._asked.is_set():
                return
        if self._asked.is_set() or self._grace_s <= 0:
            raise EndNow
        self._asked.set()
        # In a thread: whatever lock the terminal or the store needs may be held by the code that this has interrupted.
        threading.Thread(target=self._wait, name="grace period", daemon=True).start()

    def _what_runs(self) -> str:
        try:
            return ", ".join(self._waiting_for()) or "what runs"
        except OSError:  # it is for a message alone
            log.warning("what runs cannot be seen", exc_info=True)
            return "what runs"

    def _wait(self) -> None:
        try:
            self.flag.ask()
            what = self._what_runs()
            self._say(f"asked to end: waiting up to {self._grace_s:g} s for {what}; a second Ctrl-C ends at once")
            self._over.wait(self._grace_s)
        except Exception:  # a full disk, say: nobody can be asked, so there is nothing to wait for
            log.warning("the run could not be asked to end and is ended at once", exc_info=True)
        if not self._over.is_set():
            os.kill(os.getpid(), signal.SIGINT)
