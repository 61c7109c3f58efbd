"""What the fuzz tests share: how many examples, the command line in this process, and what every end must look like.

Valid files are damaged, so that most examples get past the first check. An example may run, or end in one line with exit
code 2: a traceback, a second line, a hang and a changed file are failures. `make test` takes the quick number of
examples, the same ones every time; `make fuzz` (OVERFILL_FUZZ=full) the large one, others every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import signal
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from pipeline.cli import main

FULL = os.environ.get("OVERFILL_FUZZ") == "full"
LIMIT_S = 20
"""Seconds after which an example counts as hanging; most take a twentieth of one."""
LONGEST_LINE = 4_000
"""Characters of an error line: what is longer is no line that anybody reads."""

# Nothing here may ask the network: a Hub id that is not cached has to end in one line too.
os.environ["HF_HUB_OFFLINE"] = "1"


def examples(quick: int, full: int) -> settings:
    """Hypothesis settings for a test with so many examples."""
    return settings(
        max_examples=full if FULL else quick,
        derandomize=not FULL,
        database=None,
        phases=(
            Phase.explicit,
            Phase.generate,
        ),  # files damaged in a few places are small already; shrinking hangs takes hours
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


class Hang(Exception):
    """An example took too long."""


@contextlib.contextmanager
def time_limit(seconds: float = LIMIT_S) -> Iterator[None]:
    """Raise Hang in the main thread after so many seconds."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def overfill(*arguments: str) -> Ended:
    """Call the command line in this process, its streams as strict as a terminal's; what it raises is a failure."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True)
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit():
        try:
            main(list(arguments))
        except SystemExit as end:
            code = end.code or 0
    texts = [stream.buffer.getvalue().decode("utf-8") for stream in (out, err)]  # type: ignore[attr-defined]
    return Ended(code, *texts)


def ends_well(ended: Ended, *names: str) -> bool:
    """Assert that a command ran, or ended in one line with exit code 2 that names a field or one of `names`.

    Gives whether it ran."""
    assert "Traceback" not in ended.err
    assert ended.code in (0, 2), f"exit code {ended.code}: {ended.err}"
    if ended.code == 0:
        return True
    lines = ended.err.splitlines()
    assert len(lines) == 1, f"not one line: {ended.err!r}"
    assert lines[0].startswith("overfill: ") and len(lines[0]) <= LONGEST_LINE, lines[0][:400]
    assert len(lines[0].split()) >= 5, f"says too little: {lines[0]}"
    named = re.match(r"overfill: [a-z_]+(\.[a-z_]+)+( =|:) ", lines[0]) or any(name in lines[0] for name in names)
    assert named or not names, f"{lines[0]} names no field and none of {names}"
    return False


def contents(folder: Path) -> dict[str, str]:
    """What lies in a folder: relative name -> kind, or digest of the content."""
    found: dict[str, str] = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                found[str(path)] = f"-> {path.readlink()}"
            elif stat.S_ISREG(mode):
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            else:
                found[str(path)] = str(stat.S_IFMT(mode))
    return found
