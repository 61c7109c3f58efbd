"""Where an attempt's log is written."""

from __future__ import annotations

import contextlib
import logging
import sys


class AttemptLog(logging.FileHandler):
    """A log file that ends nothing when it cannot be written: on a full disk what matters is what the stage raises."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Lose the line in silence; a mistake in the call itself is still shown."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        """Close the file; lines that do not fit any more are lost."""
        with contextlib.suppress(OSError):
            super().close()
