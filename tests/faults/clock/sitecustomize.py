"""A clock that can be set for the processes of one run: `time.time` plus what stands in a file."""

import os
import time

_file = os.environ.get("OVERFILL_CLOCK_OFFSET", "")
_real, _real_ns, _steady = time.time, time.time_ns, time.monotonic
_LOOK_EVERY_S = 0.2
_offset, _looked = 0.0, float("-inf")


def _now() -> float:
    """The offset, read again every fifth of a second."""
    global _offset, _looked
    if _steady() - _looked > _LOOK_EVERY_S:
        with open(_file, encoding="ascii") as stream:  # noqa: PTH123 - pathlib would be loaded into every process
            _offset = float(stream.read())
        _looked = _steady()
    return _offset


# Functions with names in a module, because Ray pickles what refers to `time.time`.
def wall_clock() -> float:
    """In place of `time.time`."""
    return _real() + _now()


def wall_clock_ns() -> int:
    """In place of `time.time_ns`."""
    return _real_ns() + int(_now() * 1e9)


if _file:
    time.time, time.time_ns = wall_clock, wall_clock_ns
